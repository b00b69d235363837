"""Validate a training every so many steps: error on held-out clips, and side-by-side videos, of the average weights."""

from __future__ import annotations

from slagen.events import Event
from slagen.training.comparison import Stopped, write_clips
from slagen.training.log import ValidationRecord, add_line, validated
from slagen.training.run import Run, anneal, measure_velocity


def validate_if_due(run: Run, step: int) -> None:
    """Validate the average weights, where a step is one that is validated."""
    every = run.setup.config.validate_every or max(1, run.setup.schedule.steps // 2)
    if step % every == 0:
        with run.trainer.averaged():
            validate(run, step)


def validate(run: Run, step: int) -> None:
    """Write the error to the teacher and clips of the student as it is into the log and beside it.

    Neither where the step was validated before, or the run is told to stop meanwhile.
    """
    setup = run.setup
    if setup.team.agree(run.is_first and step in validated(setup.folder)):
        return
    setup.emit(Event("stage", "measure"))
    anneal(run, setup.schedule.steps)  # at the sparsity that it will have
    error = measure_velocity(run.trainer, run.held_out) if step else run.before.error
    try:
        files = write_clips(run, step)
    except Stopped:
        return
    if run.is_first:
        add_line(setup.folder, ValidationRecord(step, error, files))
        text = f"step {step}: error to the teacher {error:.4f} (it was {run.before.error:.4f})"
        setup.emit(Event("note", text))
