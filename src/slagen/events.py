"""What a run reports while it goes on, to a progress bar or a log."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from slagen.timing import StepTimes


@dataclass(frozen=True)
class Event:
    """What a run reports while it goes on.

    Args:
        kind: "stage" where a stage begins, "step" or "part" where a step or another part of it has ended, "note" or
            "warning" for what the user should know; of many videos, clips or measurements also "plan", and "job",
            "run" or "clip" where one begins, and "picture" where a file of one is new.
        text: of a stage its name, of a picture its path, of a part what is next (it may be empty), otherwise a
            sentence.
        step: the times of a step that has ended.
        num_steps: of a stage its steps or other parts, of a job, run or clip how many there are; 0: not known.
        done: how many of them are done.
        about: of a job, run or clip: what it is, for a live display, such as "clip 2 of 8: 'a red circle'".
        left_s: seconds until all of them are done, where they are known better than from their number.
        worker: whose event it is, where several work.
    """

    kind: str
    text: str = ""
    step: StepTimes | None = None
    num_steps: int = 0
    worker: int = 0
    done: int = 0
    about: str = ""
    left_s: float | None = None


def nth(noun: str, number: int, total: int, name: str) -> str:
    """One of several things, for `Event.about`: "clip 2 of 8: 'a red circle'", of a single one its name alone."""
    return f"'{name}'" if total == 1 else f"{noun} {number} of {total}: '{name}'"


def loaded_parts(on_event: Callable[[Event], None]) -> Callable[[str, int, int], None]:
    """What `load_pipeline` calls before each part that it loads."""
    return lambda part, done, total: on_event(Event("part", f"loading {part}", num_steps=total, done=done))


def counted_parts(on_event: Callable[[Event], None], total: int) -> Callable[[], None]:
    """What to call after each part of a stage."""
    done = itertools.count(1)
    return lambda: on_event(Event("part", num_steps=total, done=next(done)))
