"""A training under way: what its loop, its validation and its result share."""

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
    """What an error is measured on: clips that are never trained on, and noise levels."""

    examples: Sequence[Example]
    levels: Sequence[float]


@dataclass(frozen=True)
class Run:
    """A training that is set up, with its data and models.

    Args:
        settings: all that changes what is learnt, as a checkpoint keeps it.
        before: the student's error before the first step. stop: set by SIGINT or SIGTERM.
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
        """Whether any process was told to stop; all of them ask at once."""
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
    """Set the sparsity of a step: it rises over the first half of the steps, where that is asked for."""
    start, sla = run.setup.config.anneal_from, run.setup.sla
    if start is None:
        return
    part = min(1.0, 2 * step / run.setup.schedule.steps)
    sla = dataclasses.replace(sla, sparsity=start + (sla.sparsity - start) * part)
    for block in run.models.student.blocks:
        block.attn1.processor.config = sla
