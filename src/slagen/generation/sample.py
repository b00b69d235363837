"""What is sampled of a plan: its latents with what was noted of their steps, and the decoded frames."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from slagen.generation.frames import Frames
from slagen.generation.offload import Placement
from slagen.generation.resolve import Plan
from slagen.generation.stage_clock import StageClock
from slagen.generation.video_report import Processes, UsedWeights
from slagen.timing import StepRecorder


@dataclass
class Denoised:
    """One video before it is decoded.

    Args:
        latents: (1, C, T, h, w), as the sampler leaves them. recorder: its steps.
        densities: the fraction of all query-key pairs that each layer attended exactly; None where it does not say.
        step_densities: the same in each step, where a --sparsity-schedule sets the sparsity of steps.
    """

    latents: torch.Tensor
    recorder: StepRecorder
    densities: Sequence[float | None] = ()
    step_densities: Sequence[Sequence[float | None]] = ()


@dataclass
class Sample:
    """One video, sampled and decoded but not written.

    Args:
        plan: what it was made with.
        frames: (F, H, W, 3) uint8, whole where they are kept.
        latents: (1, C, T, h, w) float32 on the CPU.
        denoised: its steps, and what they attended to.
        clock: of its stages, which goes on until it is written.
        weights: what the report says of them.
        vae: what decoded it.
        processes: that made it together; None for one.
        placement: where the model's parts were.
    """

    plan: Plan
    frames: Frames
    latents: torch.Tensor
    denoised: Denoised
    clock: StageClock
    weights: UsedWeights
    vae: Any = None
    processes: Processes | None = None
    placement: Placement = Placement("none", False, "")


def mean(values: Sequence[float | None]) -> float | None:
    """The mean of those that are known; None where none is."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
