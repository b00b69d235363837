"""What a training wrote down step by step, and the page of curves and clips that is made of it."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from slagen.errors import SlagenError
from slagen.html import Pair, training_page
from slagen.io.documents import read_lines
from slagen.io.files import append, write_text
from slagen.io.forms import Fault, check, matching, one_of, whole
from slagen.plot import Chart, Line, draw_chart
from slagen.video import make_thumbnail

LOG, PAGE, CLIPS = "log.jsonl", "index.html", "clips"


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


def write_page(
    folder: Path, title: str, facts: dict[str, str], layers: dict[str, list[float]], captions: list[str]
) -> Path:
    """The page of a run, from its log and clips.

    Args:
        facts: what is told at its head. layers: error of self-attention by layer, "before" and "after".
        captions: of the clips `step-NNNNNN-I.mp4`, by I.
    """
    log = read_log(folder)
    steps = [line for line in log if line["event"] == "step"]
    checks = [line for line in log if line["event"] == "validation"]
    layers_seen = min((len(line["proj_norms"]) for line in steps), default=0)
    x = [line["step"] for line in steps]
    errors = [(line["step"], line["error"]) for line in steps if line["error"] is not None]
    charts = [
        Chart("loss", "step", [Line("loss", x, [line["loss"] for line in steps])], log=True),
        Chart("error to the dense teacher", "step", [
            Line("of the step's clips", [step for step, _ in errors], [error for _, error in errors]),
            Line("held out, average weights", [c["step"] for c in checks], [c["error"] for c in checks], True),
        ], log=True),
        Chart("gradient norm", "step", [Line("uncut", x, [line["grad_norm"] for line in steps])], log=True),
        Chart("norm of proj_l by layer", "step", [
            Line(f"layer {i}", x, [line["proj_norms"][i] for line in steps])
            for i in range(layers_seen)
        ]),
        Chart("error of self-attention by layer", "layer", [
            Line(name, list(range(len(found))), found, True) for name, found in layers.items()
        ]),
    ]  # fmt: skip
    pairs = []
    for validation in checks:
        for name in validation["clips"]:
            path, number = folder / CLIPS / name, int(name[:-4].rsplit("-", 1)[1])
            if path.is_file() and number < len(captions):
                caption = captions[number]
                pairs.append(Pair(validation["step"], caption, make_thumbnail(path, 480), f"{CLIPS}/{name}"))
    write_text(folder / PAGE, training_page(title, facts, [draw_chart(chart) for chart in charts], pairs))
    return folder / PAGE
