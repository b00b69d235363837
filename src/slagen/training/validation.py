"""Validate the averaged weights every few steps: error on held-out clips, and side-by-side videos."""

from __future__ import annotations

from slagen.events import Event
from slagen.training.comparison import Stopped, write_clips
from slagen.training.log import ValidationRecord, add_line, validated
from slagen.training.run import Run, anneal, measure_velocity


def validate_if_due(run: Run, step: int) -> None:
    """Validate the averaged weights if this step is one of those that are validated."""
    every = run.setup.config.validate_every or max(1, run.setup.schedule.steps // 2)
    if step % every == 0:
        with run.trainer.averaged():
            validate(run, step)


def validate(run: Run, step: int) -> None:
    """Log the student's error to the dense teacher, and write side-by-side videos.

    Nothing is logged where the step was validated before, or the run is stopped meanwhile.
    """
    setup = run.setup
    if setup.team.agree(run.is_first and step in validated(setup.folder)):
        return
    anneal(run, setup.schedule.steps)  # at the final sparsity
    error = run.before.error
    if step:
        error = measure_velocity(run.trainer, run.held_out, setup.emit, f"after step {step}")
    try:
        files = write_clips(run, step)
    except Stopped:
        return
    if run.is_first:
        add_line(setup.folder, ValidationRecord(step, error, files))
        text = (
            f"step {step}: relative L2 error to the dense teacher {error:.4f} ({run.before.error:.4f} before training)"
        )
        setup.emit(Event("note", text))
