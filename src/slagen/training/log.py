"""The log of a training, log.jsonl: one line of JSON for each step and each validation."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from slagen.errors import SlagenError
from slagen.io.documents import read_lines
from slagen.io.files import append, write_text
from slagen.io.forms import Fault, check, matching, one_of, whole

LOG, CLIPS = "log.jsonl", "clips"
_STEP = whole(0, 10**9)
FORMS = {
    "step": {"step": _STEP, "loss": float, "error": float | None, "grad_norm": float, "proj_norms": [float]},
    "validation": {
        "step": _STEP, "error": float,
        "clips": [matching(r"step-[0-9]{6,10}-[0-9]{1,4}\.mp4", "the name of a clip as slagen writes it")],
    },
}  # fmt: skip


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's log as slagen writes them; each has an `event`, "step" or "validation", and its `step`."""
    lines = []
    for line in read_lines(folder / LOG, {"event": one_of(*FORMS)}):
        with suppress(Fault):  # it is no line of ours
            check(line, FORMS[line["event"]])
            lines.append(line)
    return lines


def add_line(folder: Path, event: str, content: dict[str, Any]) -> None:
    """Write one line. Raises SlagenError where the disk does not take it."""
    try:
        append(folder / LOG, (json.dumps({"event": event, **content}) + "\n").encode())
    except OSError as error:
        raise SlagenError(f"{folder / LOG} cannot be written: {error.strerror}. Mend that, and start again.") from error


def cut_log(folder: Path, step: int) -> None:
    """Take back what was said of steps after one, for they are made again. Raises SlagenError as `add_line`."""
    lines = [line for line in read_log(folder) if line["step"] <= step]
    try:
        write_text(folder / LOG, "".join(json.dumps(line) + "\n" for line in lines))
    except OSError as error:
        raise SlagenError(f"{folder / LOG} cannot be written: {error.strerror}. Mend that, and start again.") from error


def validated(folder: Path) -> set[int]:
    """The steps whose validation was made."""
    return {line["step"] for line in read_log(folder) if line["event"] == "validation"}
