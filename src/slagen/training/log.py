"""The log of a training, log.jsonl: one line of JSON for each step and each validation."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slagen.errors import SlagenError
from slagen.events import Event
from slagen.io.documents import read_lines
from slagen.io.files import append, write_text
from slagen.io.forms import Fault, check, matching, one_of, whole

LOG, CLIPS = "log.jsonl", "clips"
_STEP = whole(0, 10**9)
FORMS: dict[str, dict[str, Any]] = {
    "step": {
        "step": _STEP, "steps": _STEP, "loss": float, "error": float | None, "grad_norm": float, "lr": float,
        "proj_norms": [float], "tokens_per_s": float, "memory_gib": float, "seconds": float, "left_s": float,
    },
    "validation": {
        "step": _STEP, "error": float,
        "clips": [matching(r"step-[0-9]{6,10}-[0-9]{1,4}\.mp4", "the name of a clip as slagen writes it")],
    },
}  # fmt: skip


@dataclass(frozen=True)
class StepRecord:
    """One step of the optimiser, for the console and the log.

    Args:
        step, steps: which one, from 1, and how many there will be.
        loss: its mean over the clips. error: relative L2 error of the velocity to the dense teacher's; None where the
            loss does not use the teacher.
        grad_norm: before any clipping. lr: of all but what the attention learns. proj_norms: of that by layer, of SLA
            of `proj_l`.
        seconds: of training so far. left_s: expected until the last step.
    """

    step: int
    steps: int
    loss: float
    error: float | None
    grad_norm: float
    lr: float
    proj_norms: list[float]
    tokens_per_s: float
    memory_gib: float
    seconds: float
    left_s: float

    def to_dict(self) -> dict[str, Any]:
        """Its line of the log."""
        return {"event": "step", **vars(self)}


@dataclass(frozen=True)
class ValidationRecord:
    """One validation: after which step, the error on held-out clips, and the names of the side-by-side videos."""

    step: int
    error: float
    clips: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Its line of the log."""
        return {"event": "validation", **vars(self)}


Record = StepRecord | ValidationRecord
RECORDS: dict[str, Callable[..., Record]] = {"step": StepRecord, "validation": ValidationRecord}
Emit = Callable[[Event | StepRecord], None]  # called with what a training does


def read_log(folder: Path) -> list[Record]:
    """The steps and validations of a run, in the order in which they were written."""
    records = []
    for line in read_lines(folder / LOG, {"event": one_of(*FORMS)}):
        with suppress(Fault):  # not a line that slagen wrote
            form = FORMS[line["event"]]
            check(line, form)
            records.append(RECORDS[line["event"]](**{name: line[name] for name in form}))
    return records


def add_line(folder: Path, record: Record) -> None:
    """Append a record. Raises SlagenError where it cannot be written."""
    try:
        append(folder / LOG, (json.dumps(record.to_dict()) + "\n").encode())
    except OSError as error:
        raise SlagenError(f"{folder / LOG} cannot be written: {error.strerror}. Fix this and run again.") from error


def cut_log(folder: Path, step: int) -> None:
    """Drop the records of later steps, which will be made again. Raises SlagenError as `add_line`."""
    records = [record for record in read_log(folder) if record.step <= step]
    try:
        write_text(folder / LOG, "".join(json.dumps(record.to_dict()) + "\n" for record in records))
    except OSError as error:
        raise SlagenError(f"{folder / LOG} cannot be written: {error.strerror}. Fix this and run again.") from error


def validated(folder: Path) -> set[int]:
    """The steps that were validated."""
    return {record.step for record in read_log(folder) if isinstance(record, ValidationRecord)}
