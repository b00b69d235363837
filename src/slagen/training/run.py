"""The state of a running training that its loop, validation and result share."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from slagen.training.data.dataset import Dataset
from slagen.training.metrics import (
    LEVELS,
    Example,
    TeacherErrors,
    layer_errors,
    noise_levels,
    velocity_error,
)
from slagen.training.models import Models
from slagen.training.setup import Setup
from slagen.training.trainer import Trainer

MAX_HELD_OUT = 16  # clips that an error is measured on


@dataclass(frozen=True)
class HeldOut:
    """What errors are measured on: clips that are never trained on, and noise levels."""

    examples: Sequence[Example]
    levels: Sequence[float]


@dataclass(frozen=True)
class Run:
    """A running training: its setup, data, models and trainer.

    Args:
        settings: every setting that changes what is learnt, as a checkpoint stores it.
        before: the student's errors before the first step. stop: set by SIGINT or SIGTERM.
    """

    setup: Setup
    settings: dict[str, Any]
    data: Dataset
    models: Models
    trainer: Trainer
    held_out: HeldOut
    before: TeacherErrors
    stop: threading.Event = field(default_factory=threading.Event)

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.setup.team.first

    def stopping(self) -> bool:
        """Whether any process was asked to stop. All processes call this together."""
        return self.setup.team.agree(self.stop.is_set())


def choose_held_out(setup: Setup, data: Dataset) -> HeldOut:
    """The first held-out clips, at noise levels that are equally likely in training."""
    examples = [data.example(clip) for clip in data.held_out[:MAX_HELD_OUT]]
    schedule = setup.schedule
    return HeldOut(examples, noise_levels(LEVELS, schedule.log_sigma_mean, schedule.log_sigma_std))


def measure_velocity(trainer: Trainer, held_out: HeldOut) -> float:
    """Relative L2 error of the student's velocity to the dense teacher's."""
    assert trainer.teacher is not None
    return velocity_error(
        trainer.student, trainer.teacher, held_out.examples, held_out.levels, device=trainer.team.device,
        autocast=trainer.autocast,
    )  # fmt: skip


def measure(trainer: Trainer, held_out: HeldOut) -> TeacherErrors:
    """The same, and the error of each layer's self-attention on a few of the clips and levels."""
    assert trainer.teacher is not None
    velocity = measure_velocity(trainer, held_out)
    layers = layer_errors(
        trainer.student, trainer.teacher, held_out.examples[:2], held_out.levels[::2], device=trainer.team.device,
        autocast=trainer.autocast,
        total=trainer.team.over_context if trainer.team.context_group is not None else lambda sums: sums,
    )  # fmt: skip
    return TeacherErrors(velocity, layers)


def anneal(run: Run, step: int) -> None:
    """With --anneal-from, set the sparsity of a step: it rises linearly over the first half of the steps."""
    start, attention = run.setup.config.anneal_from, run.setup.attention
    if start is None:
        return
    part = min(1.0, 2 * step / run.setup.schedule.steps)
    attention = dataclasses.replace(attention, sparsity=start + (attention.sparsity - start) * part)
    for block in run.models.student.blocks:
        block.attn1.processor.config = attention
