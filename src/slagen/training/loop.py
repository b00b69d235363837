"""The training loop: steps, log, checkpoints and validations, until the last step or a signal."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from slagen.attention.learned import matrix_norms
from slagen.attention.registry import parameter_group
from slagen.events import Event
from slagen.interrupts import stopping, telling_what_is_kept
from slagen.machine import peak_memory_gib
from slagen.training.checkpoints import RunState, save_state
from slagen.training.distributed import full_tensor
from slagen.training.log import StepRecord, add_line
from slagen.training.output_folder import TENSORBOARD
from slagen.training.run import Run, anneal
from slagen.training.trainer import StepResult
from slagen.training.validation import validate_if_due


def train(run: Run, step: int, seconds: float) -> float:
    """Train from a step to the last one; returns the seconds of training in all, given those before.

    Raises: KeyboardInterrupt after SIGINT or SIGTERM, with a checkpoint written.
    """
    setup, steps = run.setup, run.setup.schedule.steps
    save_every = setup.config.save_every or max(10, steps // 10)
    if step < steps:
        validate_if_due(run, step)
    setup.emit(Event("stage", "train", num_steps=steps))
    first, before, saved = step, seconds, step
    began = time.monotonic()
    text = "stopping after this step, once a checkpoint is saved; press Ctrl-C again to stop now"
    repeated_s = 0 if setup.team.size == 1 else 5
    with (
        telling_what_is_kept(lambda: _kept_so_far(setup.folder, saved, steps)),
        stopping(run.stop, lambda: setup.emit(Event("warning", text)), repeated_s=repeated_s),
        _tensorboard(run, step) as board,
    ):
        while step < steps:
            if run.stopping():  # during a validation
                if step > saved:
                    _save(run, step, seconds)
                raise KeyboardInterrupt
            anneal(run, step)
            start = time.monotonic()
            result = run.trainer.step(step)
            step += 1
            now = time.monotonic()
            seconds = before + now - began
            left_s = (seconds - before) / (step - first) * (steps - step)
            _log_step(run, step, result, now - start, seconds, left_s, board)
            ending = run.stopping()
            if ending or step % save_every == 0 or step == steps:
                _save(run, step, seconds)
                saved = step
            if ending and step < steps:
                raise KeyboardInterrupt
            if step < steps:
                validate_if_due(run, step)
    anneal(run, steps)
    return seconds


def _kept_so_far(folder: Path, saved: int, steps: int) -> str:
    """What an interrupted training says."""
    if saved == 0:
        return "No checkpoint was saved yet; the prepared clips are kept. Run the same command again."
    return f"Step {saved} of {steps} is saved in {folder}. Run the same command again to resume."


def _save(run: Run, step: int, seconds: float) -> None:
    save_state(run.trainer, run.setup.folder, RunState(step, seconds, run.before, run.settings))


def _log_step(
    run: Run, step: int, result: StepResult, step_s: float, seconds: float, left_s: float, board: Any
) -> None:
    """Write a step to the log and to TensorBoard."""
    parameters = {name: p.detach() for name, p in run.trainer.student.named_parameters() if parameter_group(name)}
    groups = matrix_norms({name: full_tensor(p) for name, p in parameters.items() if not name.endswith(".bias")})
    norms = [math.hypot(*of_layer) for of_layer in zip(*groups.values(), strict=False)]
    if not run.is_first:
        return
    record = StepRecord(
        step, run.setup.schedule.steps, result.loss, result.error, result.grad_norm, result.lr, norms,
        result.num_tokens / step_s, peak_memory_gib(run.setup.team.device), seconds, left_s,
    )  # fmt: skip
    add_line(run.setup.folder, record)
    if board is not None:
        values = {"loss": result.loss, "error": result.error, "grad_norm": result.grad_norm, "lr": result.lr}
        for name, value in values.items():
            if value is not None:
                board.add_scalar(f"train/{name}", value, step)
        for layer, norm in enumerate(norms):
            board.add_scalar(f"proj_l/{layer:02d}", norm, step)
    run.setup.emit(record)


@contextmanager
def _tensorboard(run: Run, step: int) -> Iterator[Any]:
    """A TensorBoard writer that continues after a step, or None; a warning where TensorBoard is not installed."""
    if not (run.setup.config.tensorboard and run.is_first):
        yield None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        run.setup.emit(
            Event(
                "warning",
                "no TensorBoard files will be written, because TensorBoard is not installed. Install it: pip install "
                "'slagen[tensorboard]'",
            )
        )
        yield None
        return
    with SummaryWriter(run.setup.folder / TENSORBOARD, purge_step=step + 1) as board:
        yield board
