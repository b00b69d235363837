"""What a training wrote down step by step, and the page of curves and clips that is made of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from slagen.errors import SlagenError
from slagen.files import append, write_text
from slagen.pages import Pair, training_page
from slagen.plot import Chart, Line, draw_chart
from slagen.video import make_thumbnail

LOG, PAGE, CLIPS = "log.jsonl", "index.html", "clips"


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's log that are whole; each has an `event`, "step" or "validation", and its `step`."""
    try:
        text = (folder / LOG).read_text(encoding="utf-8")
    except OSError:
        return []
    lines = []
    for line in text.splitlines():
        try:
            content = json.loads(line)
        except ValueError:
            continue
        if isinstance(content, dict) and isinstance(content.get("step"), int) and "event" in content:
            lines.append(content)
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
            for i in range(len(steps[0]["proj_norms"]) if steps else 0)
        ]),
        Chart("error of self-attention by layer", "layer", [
            Line(name, list(range(len(found))), found, True) for name, found in layers.items()
        ]),
    ]  # fmt: skip
    pairs = []
    for check in checks:
        for name in check["clips"]:
            path = folder / CLIPS / name
            if path.is_file():
                caption = captions[int(path.stem.rsplit("-", 1)[1])]
                pairs.append(Pair(check["step"], caption, make_thumbnail(path, 480), f"{CLIPS}/{name}"))
    write_text(folder / PAGE, training_page(title, facts, [draw_chart(chart) for chart in charts], pairs))
    return folder / PAGE
