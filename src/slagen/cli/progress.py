"""A run's events on stderr: a live display on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from slagen.cli import console
from slagen.cli.inline_images import show
from slagen.cli.live import Activity, Pace, lines_of, live
from slagen.cli.table import Segments
from slagen.errors import STAGE, Interrupted

LOADING = "Loading PyTorch and diffusers..."
LOADER = -1  # in place of a worker
NOTHING_KEPT = "Nothing was written. Run the same command again."
LINE_S = 15.0  # between lines on what goes on, where there is no terminal

STAGES = {
    "hash": "hashing the weights",
    "load": "loading the model",
    "text": "encoding the prompt",
    "image": "encoding the image",
    "measure": "measuring",
    "denoise": "denoising",
    "decode": "decoding",
    "write": "writing",
    "train": "training",
    "time": "timing",
}
OF_ALL = ("hash", "load", "train")  # stages of all videos or clips together
UNITS = {"denoise": "step", "decode": "latent frame", "train": "step"}  # what a part of a stage is called


def say_loading() -> None:
    """A line on stderr where torch is not imported yet, which takes seconds."""
    if "torch" not in sys.modules:
        console.log(LOADING)


class GenerateProgress:
    """Shows a run's events: two live lines for each worker on a terminal, plain lines of notes elsewhere."""

    def __init__(self) -> None:
        self._activities: dict[int, Activity] = {}  # by worker
        self._about: dict[int, str] = {}
        self._of_all: dict[int, Pace] = {}
        self._live = live(console.stderr, self._shown)
        self._last_line = 0.0
        self._stage = "starting"

    def __enter__(self) -> GenerateProgress:
        if not console.stderr.is_terminal:
            say_loading()
            return self
        if "torch" not in sys.modules:
            self._begin(LOADER, "loading PyTorch and diffusers")
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if console.stderr.is_terminal:
            self._live.stop()
        if isinstance(error, KeyboardInterrupt):
            kept = " ".join(getattr(error, "__notes__", [])) or NOTHING_KEPT
            raise Interrupted(f"interrupted {STAGE}{self._stage}. {kept}") from error
        if error is not None:
            error.add_note(f"{STAGE}{self._stage}")

    def _shown(self) -> list[Segments]:
        size = console.stderr.size
        encoding = console.stderr.encoding
        width = size.width - len("^C")  # which the terminal prints behind the last line
        return lines_of(dict(self._activities), width, size.height, time.monotonic(), encoding)

    def __call__(self, event: Any) -> None:
        """Show one `slagen.events.Event`, or a `slagen.training.log.StepRecord`."""
        self._activities.pop(LOADER, None)
        if not hasattr(event, "kind"):
            self._show_training_step(event)
        elif event.kind in ("note", "warning"):
            console.log_as(event.kind, "yellow" if event.kind == "warning" else "dim", event.text)
        elif event.kind == "picture":
            show(Path(event.text))
        elif event.kind == "plan":
            console.log(event.text)
        elif event.kind in ("job", "run", "clip"):
            self._begin_one(event)
        elif event.kind == "stage":
            self._begin_stage(event)
        elif event.kind in ("step", "part") and event.worker in self._activities:
            self._advance(self._activities[event.worker], event)

    def _begin(self, worker: int, text: str, total: int = 0, unit: str = "", done: int = 0) -> None:
        now = time.monotonic()
        pace = Pace(total, now, done) if total else None
        self._activities[worker] = Activity(text, now, pace, unit, of_all=self._of_all.get(worker))

    def _begin_one(self, event: Any) -> None:
        """One of several videos, clips or measurements begins: what the stages after it are about."""
        worker, now = event.worker, time.monotonic()
        self._about[worker] = event.about
        pace = self._of_all.get(worker)
        if event.num_steps and (pace is None or pace.total != event.num_steps or event.done < pace.done):
            pace = self._of_all[worker] = Pace(event.num_steps, now, event.done)
        if pace is not None:
            pace.advance(event.done, now, event.left_s)
        if event.kind == "clip":
            self._stage = "preparing clips"
            self._activities[worker] = Activity(event.text, now, pace, "clip")
        who = f"worker {worker}: " if worker else ""
        if event.kind != "job":
            self._log_sometimes(event.text)
        elif not console.stderr.is_terminal:
            console.log(who + event.text)

    def _begin_stage(self, event: Any) -> None:
        self._stage = STAGES[event.text]
        if event.text in OF_ALL:
            self._of_all.pop(event.worker, None)
            self._about.pop(event.worker, None)
        about = event.about or ("" if event.text == "text" else self._about.get(event.worker, ""))
        self._begin(event.worker, f"{self._stage} {about}".strip(), event.num_steps, UNITS.get(event.text, ""))

    def _advance(self, activity: Activity, event: Any) -> None:
        if event.kind == "part" and event.text:
            activity.text = event.text
        if activity.pace is None and event.num_steps:
            activity.pace = Pace(event.num_steps, time.monotonic(), event.done)
        if activity.pace is not None:
            done = event.step.index + 1 if event.step is not None else event.done
            activity.pace.advance(done, time.monotonic())
        if event.step is not None and event.step.attention_share is not None:
            activity.facts = [f"attention {event.step.attention_share:.0%}"]

    def _log_sometimes(self, text: str) -> None:
        """A line on what goes on, where there is no terminal and the last one is a while ago."""
        if text and not console.stderr.is_terminal and time.monotonic() - self._last_line > LINE_S:
            self._last_line = time.monotonic()
            console.log(text)

    def _show_training_step(self, step: Any) -> None:
        """Live on a terminal, one line in twenty elsewhere."""
        if console.stderr.is_terminal:
            self._show_training_live(step)
        elif step.step % 20 == 0 or step.step in (1, step.steps):
            error = "" if step.error is None else f", relative L2 error to the teacher {step.error:.4f}"
            norms = step.proj_norms
            projections = (
                f", norms of the attention's learned weights {min(norms):.3g} to {max(norms):.3g}" if norms else ""
            )
            console.log(
                f"step {step.step} of {step.steps}: loss {step.loss:.4e}{error}, gradient norm "
                f"{step.grad_norm:.3e}{projections}, {step.tokens_per_s:,.0f} tokens/s, {step.memory_gib:.1f} GiB, "
                f"{step.left_s / 60:.1f} min left"
            )

    def _show_training_live(self, step: Any) -> None:
        now, text = time.monotonic(), f"training step {step.step} of {step.steps}"
        activity = self._activities.get(0)
        if activity is None or activity.pace is None or not activity.text.startswith("training"):
            self._begin(0, text, step.steps, "step", step.step)
            activity = self._activities[0]
        assert activity.pace is not None
        activity.text = text
        activity.pace.advance(step.step, now, step.left_s)
        error = [] if step.error is None else [f"error {step.error:.4f}"]
        activity.facts = [
            f"loss {step.loss:.3e}", *error, f"gradient {step.grad_norm:.2e}", f"{step.tokens_per_s:,.0f} tokens/s",
            f"{step.memory_gib:.1f} GiB",
        ]  # fmt: skip
