"""The state of a running training that its loop, validation and result share."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from slagen.events import Event, counted_parts
from slagen.training.data.dataset import Dataset
from slagen.training.log import Emit
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
from slagen.wan.processor import set_layers

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


def measure_velocity(trainer: Trainer, held_out: HeldOut, emit: Emit, when: str) -> float:
    """Relative L2 error of the student's velocity to the dense teacher's.

    Args:
        when: "before training" or the like, for a live display.
    """
    count = _begin_measuring(emit, len(held_out.examples) * len(held_out.levels), when)
    return _velocity_error(trainer, held_out, count)


def measure(trainer: Trainer, held_out: HeldOut, emit: Emit, when: str) -> TeacherErrors:
    """The same, and the error of each layer's self-attention on a few of the clips and levels."""
    assert trainer.teacher is not None
    examples, levels = held_out.examples[:2], held_out.levels[::2]
    total = len(held_out.examples) * len(held_out.levels) + len(examples) * len(levels)
    count = _begin_measuring(emit, total, when)
    velocity = _velocity_error(trainer, held_out, count)
    layers = layer_errors(
        trainer.student, trainer.teacher, examples, levels, device=trainer.team.device, autocast=trainer.autocast,
        total=trainer.team.over_context if trainer.team.context_group is not None else lambda sums: sums,
        after_each=count,
    )  # fmt: skip
    return TeacherErrors(velocity, layers)


def _velocity_error(trainer: Trainer, held_out: HeldOut, after_each: Callable[[], None]) -> float:
    assert trainer.teacher is not None
    return velocity_error(
        trainer.student, trainer.teacher, held_out.examples, held_out.levels, device=trainer.team.device,
        autocast=trainer.autocast, after_each=after_each,
    )  # fmt: skip


def _begin_measuring(emit: Emit, total: int, when: str) -> Callable[[], None]:
    """Begin the stage "measure"; call what it returns after each of its parts."""
    emit(Event("stage", "measure", num_steps=total, about=f"the error to the dense teacher {when}"))
    return counted_parts(emit, total)


def anneal(run: Run, step: int) -> None:
    """With --anneal-from, set the sparsity of a step: it rises linearly over the first half of the steps."""
    start = run.setup.config.anneal_from
    if start is None:
        return
    part = min(1.0, 2 * step / run.setup.schedule.steps)
    set_layers(run.models.student, run.setup.layer_configs(start, part))
