"""Clips that run step by step, and how often the blocks of a model are compiled for them."""

import torch
from wan_models import run

from slagen.wan.processor import denoising


def compile_blocks(model, fullgraph=True):
    """Compile the repeated blocks of a transformer anew, without making code. Returns a list of all graphs to come."""
    graphs = []

    def backend(module, example):
        graphs.append(module)
        return module.forward

    torch._dynamo.reset()
    model.compile_repeated_blocks(dynamic=False, backend=backend, fullgraph=fullgraph)
    return graphs


def denoise(pipe, steps, dense=None, size=64, configs=None):
    """The final latents of a short guided clip whose attention is told of its steps, and of the part that is dense."""
    with denoising(pipe.transformer, steps, dense, configs) as end_step:
        return run(pipe, steps=steps, size=size, callback_on_step_end=lambda *_: end_step() or {})
