"""Check what is asked of a training, and fill in the model's defaults, before data or models are read."""

import dataclasses

from slagen.machine import pick_device
from slagen.training.config import FinetuneConfig
from slagen.wan.defaults import TrainingDefaults

DEFAULT_ON_CUDA = "wan2.1-t2v-1.3b"  # generate's default there is a few-step model, which is no teacher


def default_model(name: str | None, device: str) -> str | None:
    """The model that is trained where none is named: generate's own, but on CUDA."""
    return name or (DEFAULT_ON_CUDA if pick_device(device).type == "cuda" else None)


def training_schedule(config: FinetuneConfig, defaults: TrainingDefaults) -> TrainingDefaults:
    """The model's own numbers, with what the user said in their place."""
    names = ("steps", "lr", "proj_multiplier", "warmup_steps", "batch_size", "micro_batch", "caption_dropout")
    return dataclasses.replace(defaults, **{n: getattr(config, n) for n in names if getattr(config, n) is not None})
