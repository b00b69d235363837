"""A run's events on stderr: a live display on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from types import TracebackType
from typing import TYPE_CHECKING, Any

from slagen.cli import console
from slagen.errors import STAGE
from slagen.io.text import columns_of, encodable, line

if TYPE_CHECKING or find_spec("rich") is not None:
    from rich.console import Group, RenderableType
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TaskID, TimeElapsedColumn
    from rich.table import Table
    from rich.text import Text

    class LiveTasks(Progress):
        """A live line for each task; where the terminal is too narrow for it, its texts go above and below the bar."""

        def get_renderables(self) -> Iterator[RenderableType]:
            """What is shown of every task."""
            for task in self.tasks:
                yield self._shown(task)

        def _shown(self, task: Task) -> RenderableType:
            encoding = self.console.encoding
            about, detail = (encodable(text, encoding) for text in (task.description, task.fields["detail"]))
            bar = [BarColumn(BAR).render(task), MofNCompleteColumn().render(task), TimeElapsedColumn().render(task)]
            taken = sum(columns_of(str(part)) for part in (about, *bar[1:], detail)) + BAR + 4
            if taken <= self.console.width:
                return _side_by_side(Text(about), *bar, Text(detail))
            below = [Text(detail, overflow="fold")] if detail else []
            return Group(Text(about, overflow="fold"), _side_by_side(*bar), *below)

    def _side_by_side(*parts: Any) -> Table:
        row = Table.grid(padding=(0, 1))
        row.add_row(*parts)
        return row

else:
    from slagen.cli.plain import Progress as LiveTasks
    from slagen.cli.plain import TaskID

LOADING = "Loading PyTorch and diffusers..."
LOADER = -2  # in place of a worker
BAR = 24  # columns of a bar
LINE_S = 15.0  # between lines on what goes on, where there is no terminal

STAGES = {
    "hash": "hashing the weights",
    "load": "loading the model",
    "text": "encoding the prompt",
    "measure": "measuring",
    "denoise": "denoising",
    "decode": "decoding",
    "write": "writing",
    "train": "training",
}


def say_loading() -> None:
    """A line on stderr where torch is not imported yet, which takes seconds; of several processes the first says it."""
    if "torch" not in sys.modules and os.environ.get("RANK", "0") == "0":
        console.log(LOADING)


class GenerateProgress:
    """Shows a run's events: live on a terminal, plain lines of notes elsewhere."""

    def __init__(self) -> None:
        stderr = console.stderr
        self._progress = LiveTasks(console=stderr, transient=True, disable=not stderr.is_terminal)
        self._tasks: dict[int, TaskID] = {}  # by worker
        self._jobs: dict[int, str] = {}
        self._last_line = 0.0
        self._stage = "starting"

    def __enter__(self) -> GenerateProgress:
        self._progress.start()
        if not console.stderr.is_terminal:
            say_loading()
        elif "torch" not in sys.modules:
            self._show_stage(LOADER, LOADING, None)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
        if error is not None:
            error.add_note(f"{STAGE}{self._stage}")

    def __call__(self, event: Any) -> None:
        """Show one `slagen.events.Event`, or a `slagen.training.log.StepRecord`."""
        if LOADER in self._tasks:
            self._progress.remove_task(self._tasks.pop(LOADER))
        if not hasattr(event, "kind"):
            self._show_training_step(event)
        elif event.kind in ("note", "warning"):
            console.log_as(event.kind, "yellow" if event.kind == "warning" else "dim", event.text)
        elif event.kind == "plan":
            console.log(event.text)
        elif event.kind == "clip":
            self._stage = "preparing clips"
            self._show_stage(0, event.text, None)
            self._log_sometimes(event.text)
        elif event.kind == "run":
            self._jobs[0] = f"{event.text},"
            self._log_sometimes(event.text)
        elif event.kind == "job":
            who = f"worker {event.worker}: " if event.worker else ""
            self._jobs[event.worker] = who + event.text
            if not console.stderr.is_terminal:
                console.log(self._jobs[event.worker])
        elif event.kind == "stage":
            self._stage = STAGES[event.text]
            text = f"{self._jobs.get(event.worker, '')} {self._stage}".strip()
            self._show_stage(event.worker, text, event.num_steps or None)
        elif event.kind == "step" and event.worker in self._tasks:
            self._show_denoising_step(self._tasks[event.worker], event.step)

    def _log_sometimes(self, text: str) -> None:
        """A line on what goes on, where there is no terminal and the last one is a while ago."""
        if not console.stderr.is_terminal and time.monotonic() - self._last_line > LINE_S:
            self._last_line = time.monotonic()
            console.log(text)

    def _show_stage(self, worker: int, text: str, total: int | None) -> None:
        if worker in self._tasks:
            self._progress.remove_task(self._tasks[worker])
        self._tasks[worker] = self._progress.add_task(line(text), total=total, detail="")

    def _show_denoising_step(self, task: TaskID, step: Any) -> None:
        detail = f"step {step.latency_ms:.0f} ms" if step.latency_ms is not None else ""
        if step.attention_share is not None:
            detail += f", attention {step.attention_share:.0%}"
        self._progress.update(task, completed=step.index + 1, detail=detail)

    def _show_training_step(self, step: Any) -> None:
        """Live on a terminal, one line in twenty elsewhere."""
        error = "" if step.error is None else f", relative L2 error to the teacher {step.error:.4f}"
        norms = step.proj_norms
        projections = (
            f", norms of the attention's learned weights {min(norms):.3g} to {max(norms):.3g}" if norms else ""
        )
        detail = (
            f"loss {step.loss:.4e}{error}, gradient norm {step.grad_norm:.3e}{projections}, "
            f"{step.tokens_per_s:,.0f} tokens/s, {step.memory_gib:.1f} GiB, {step.left_s / 60:.1f} min left"
        )
        if -1 not in self._tasks:
            self._show_stage(-1, "training", step.steps)
        self._progress.update(self._tasks[-1], completed=step.step, detail=detail)
        if not console.stderr.is_terminal and (step.step % 20 == 0 or step.step in (1, step.steps)):
            console.log(f"step {step.step} of {step.steps}: {detail}")
