"""Weights distilled to few steps of another sampler than rCM: a warning where steps or guidance do not suit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slagen.io.text import counted

if TYPE_CHECKING:
    from slagen.generation.config import GenerateConfig
    from slagen.generation.resolve import Weights


def steps_warning(config: GenerateConfig, weights: Weights) -> str | None:
    """What looks wrong in steps and guidance for a LoRA or a transformer file, whose tensors do not say if it is
    distilled; None where nothing does."""
    steps, guidance, file = config.steps or 0, config.guidance_scale or 0.0, weights.source.weights
    many = steps > 10 or guidance > 1
    distilled = next((lora for lora in weights.loras if lora.few_steps), None)
    if distilled is not None:
        return _too_many(distilled.path.name, distilled.few_steps, steps, guidance) if many else None
    if file is None or weights.distilled:
        return None
    if weights.few_steps and many:
        return _too_many(file.name, weights.few_steps, steps, guidance)
    if not weights.few_steps and steps <= 8 and guidance > 1:
        return (
            f"{counted(steps, 'step')} with a guidance scale of {guidance:g} will not work well for Wan2.1. Weights "
            "distilled to few steps need --guidance-scale 1, and all others need 20 steps or more"
        )
    return None


def _too_many(name: str, word: str, steps: int, guidance: float) -> str:
    """The warning about a file that says by a word that it is for few steps."""
    return (
        f"{name} has {word!r} in its name or metadata, so it seems to be distilled to few steps. Such weights need "
        f"about 4 steps without guidance, not {counted(steps, 'step')} with a guidance scale of {guidance:g}. Try "
        "--steps 4 --guidance-scale 1 --sampler euler"
    )
