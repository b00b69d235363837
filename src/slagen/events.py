"""What a run reports while it goes on, to a progress bar or a log."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from slagen.timing import StepTimes


@dataclass(frozen=True)
class Event:
    """What a run reports while it goes on: a stage or a clip begins, a step has ended, or what the user should know."""

    kind: str  # "stage", "step", "note" or "warning"; of many videos or clips also "plan", "job", "run" and "clip"
    text: str = ""
    step: StepTimes | None = None
    num_steps: int = 0
    worker: int = 0  # whose event it is, where several work
