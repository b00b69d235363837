"""The denoising of one video: the sampling loop, with everything that is noted of its steps."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch

from slagen.events import Event
from slagen.generation.preview import Preview
from slagen.generation.resolve import Plan
from slagen.timing import StepRecorder
from slagen.wan.caches import read_cache
from slagen.wan.caching import caching
from slagen.wan.compiling import compiling
from slagen.wan.dense_beside import measuring_dense
from slagen.wan.observe import attach_recorder
from slagen.wan.processor import denoising


def run_denoising(
    pipe: Any,
    plan: Plan,
    embeds: dict[str, Any],
    on_event: Callable[[Event], None],
    count: Callable[[], None],
    preview: Preview | None,
) -> tuple[Any, StepRecorder]:
    """Run the sampling loop; returns the final latents (1, C, T, h, w) and the recorder with its steps.

    Args: count: called after each step. preview: draws the latents of some.
    """
    config, schedule = plan.config, plan.schedule
    level = "step" if config.compile and config.timing != "off" else config.timing
    cache = None if config.cache is None else read_cache(config.cache)
    layers = 0 if cache is None else len(pipe.transformer.blocks)
    recorder = StepRecorder(plan.weights.device.type, level, keep=config.trace is not None, num_layers=layers)

    def after_step(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        step = recorder.end_step(float(timestep))
        if blocks is not None:
            step.blocks_ran = blocks.take()
        end_step()
        count()
        if preview is not None and preview.take(pipe.scheduler, step.index, tensors["latents"]):
            recorder.begin_step()  # the next one begins behind the picture
        on_event(Event("step", "denoise", step, config.steps or 0))
        return {}

    generator = torch.Generator().manual_seed(config.seed)  # type: ignore[arg-type]
    if config.sampler == "rcm":
        assert config.width and config.height and config.num_frames
        frames = (config.num_frames - 1) // pipe.vae_scale_factor_temporal + 1
        height, width = (size // pipe.vae_scale_factor_spatial for size in (config.height, config.width))
        pipe.scheduler.generator = generator
        shape = (1, pipe.transformer.config.out_channels, frames, height, width)
        embeds = {**embeds, "latents": pipe.scheduler.initial_latents(shape, pipe._execution_device)}
    # prepared before: only its size counts
    image = {} if plan.picture is None else {"image": torch.zeros(1, 3, config.height or 0, config.width or 0)}
    with contextlib.ExitStack() as stack:
        if config.compile:  # nothing is timed inside
            stack.enter_context(compiling(_described(plan), recorder.compiled))
        else:
            stack.callback(attach_recorder(pipe.transformer, recorder))
        end_step = stack.enter_context(denoising(pipe.transformer, config.steps or 0, schedule.dense, schedule.by_step))
        stack.enter_context(measuring_dense(pipe.transformer, recorder, plan.measured_steps))
        blocks = None if cache is None else stack.enter_context(caching(pipe.transformer, cache, config.steps or 0))
        recorder.begin_step()
        output = pipe(
            **embeds, **image, height=config.height, width=config.width, num_frames=config.num_frames,
            num_inference_steps=config.steps, guidance_scale=config.guidance_scale, generator=generator,
            output_type="latent", callback_on_step_end=after_step,
            max_sequence_length=plan.weights.source.defaults.max_sequence_length,
        )  # fmt: skip
    if blocks is not None:
        recorder.cache_ratios = blocks.ratios
    return output.frames, recorder


def _described(plan: Plan) -> str:
    """What a plan's attention is called in a message."""
    backend = "" if plan.backend is None else f" on the {plan.backend} backend"
    return f"{plan.method.name} attention{backend}"
