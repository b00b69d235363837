"""The HTML page of a training: whether it helped, clips of the dense model beside the student's, and its curves."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from slagen.html.training import ClipRow, ShownChart, ShownClip, TrainingPage
from slagen.io.files import scratch, write_text
from slagen.plot import Chart, Line, draw_chart
from slagen.training.log import CLIPS, StepRecord, ValidationRecord, read_log
from slagen.video import encode_video, make_thumbnail, read_mp4

if TYPE_CHECKING:
    import numpy as np

PAGE = "index.html"
WIDTH = 320  # pixels of a clip at most
NOTED = 0.02  # change of an error, relative to it, that is worth a word
NOTED_DB = 0.2


@dataclass(frozen=True)
class Trained:
    """What a training was and gave.

    Args:
        before, after: relative L2 error to the dense teacher on held-out clips.
        layers: that of self-attention by layer, "before" and "after".
        captions: of the clips `step-NNNNNN-I.mp4`, by I. fps: of them.
        facts, commands: as the page has them.
    """

    title: str
    before: float
    after: float
    layers: dict[str, list[float]]
    captions: list[str]
    fps: int
    facts: dict[str, str]
    commands: list[tuple[str, str]]


def write_page(folder: Path, trained: Trained) -> Path:
    """The page of a run, from its log and clips. Raises SlagenError where a clip cannot be read."""
    log = read_log(folder)
    steps = [record for record in log if isinstance(record, StepRecord)]
    checks = [record for record in log if isinstance(record, ValidationRecord)]
    rows, nearness = _clip_rows(folder, checks, trained)
    pairs = list(zip(trained.layers["before"], trained.layers["after"], strict=True))
    page = TrainingPage(
        trained.title, verdict(trained.before, trained.after, nearness), _notes(pairs), rows,
        [ShownChart(draw_chart(chart), _described(chart)) for chart in _charts(steps, checks, trained.layers)],
        trained.commands, trained.facts, pairs,
    )  # fmt: skip
    write_text(folder / PAGE, page.render())
    return folder / PAGE


def verdict(before: float, after: float, nearness: tuple[float, float] | None) -> str:
    """Whether a training helped, by the error to the dense teacher and by the clips.

    Args:
        nearness: mean PSNR in dB of the student's clips to the dense model's, at the start and at the end.
    """
    change = after / before - 1 if before else math.inf if after else 0.0
    numbers = "on clips that were never trained on, the relative L2 error to the dense teacher "
    if abs(change) < NOTED:
        said, helped = f"Training changed little: {numbers}stayed at {after:.4f} ({before:.4f} before)", None
    elif change < 0:
        said = f"Training helped: {numbers}fell from {before:.4f} to {after:.4f} ({-change:.0%} lower)"
        helped = True
    else:
        said = f"Training made it worse: {numbers}rose from {before:.4f} to {after:.4f}"
        helped = False
    if nearness is None:
        return f"{said}."
    start, end = nearness
    values = f"PSNR {_db(start)} before, {_db(end)} after"
    if abs(end - start) < NOTED_DB or start == end:
        return f"{said}; the clips below are about as near to the dense model's as before ({values})."
    nearer = end > start
    link = "and" if helped is nearer else "but"
    return (
        f"{said}, {link} the clips below came {'nearer to' if nearer else 'further from'} the dense model's ({values})."
    )


def _db(value: float) -> str:
    return "without limit" if math.isinf(value) else f"{value:.1f} dB"


def _notes(layers: list[tuple[float, float]]) -> list[str]:
    """A sentence on the layers that got worse, if any did."""
    worse = [(i, before, after) for i, (before, after) in enumerate(layers) if after > before * (1 + NOTED)]
    if not worse:
        return []
    shown = ", ".join(f"layer {i} ({before:.4f} before, {after:.4f} after)" for i, before, after in worse)
    return [
        f"Self-attention got worse in {len(worse)} of {len(layers)} layers: {shown}. A layer's error includes that of "
        "the layers before it; more steps or a lower --lr may help."
    ]


def _clip_rows(
    folder: Path, checks: list[ValidationRecord], trained: Trained
) -> tuple[list[ClipRow], tuple[float, float] | None]:
    """A row of clips for each prompt, and the mean PSNR to the dense clips at the start and at the end."""
    rows, ends = [], []
    for number, caption in enumerate(trained.captions):
        dense_path = folder / CLIPS / f"dense-{number}.mp4"
        found = [(c.step, folder / CLIPS / name) for c in checks for name in c.clips if name.endswith(f"-{number}.mp4")]
        found = sorted((step, path) for step, path in found if path.is_file())
        if not dense_path.is_file() or not found:
            continue
        dense = read_mp4(dense_path)
        clips = [ShownClip("dense", make_thumbnail(dense_path, WIDTH), file=f"{CLIPS}/{dense_path.name}")]
        values = []
        for step, path in _start_middle_end(found):
            student = _student(read_mp4(path), dense)
            values.append(_psnr(student, dense))
            near = "identical to dense" if math.isinf(values[-1]) else f"PSNR to dense {values[-1]:.1f} dB"
            label = "before training" if step == 0 else f"step {step}"
            clips.append(ShownClip(label, _small(student, trained.fps), near, f"{CLIPS}/{path.name}"))
        rows.append(ClipRow(caption, clips))
        ends.append((values[0], values[-1]))
    if not ends:
        return rows, None
    return rows, (fmean(first for first, _ in ends), fmean(last for _, last in ends))


def _start_middle_end(found: list[tuple[int, Path]]) -> list[tuple[int, Path]]:
    """The first, the last, and the one nearest to the middle between them."""
    first, last = found[0], found[-1]
    between = found[1:-1]
    middle = min(between, key=lambda each: abs(each[0] - (first[0] + last[0]) / 2)) if between else None
    return list(dict.fromkeys(each for each in (first, middle, last) if each is not None))


def _student(both: np.ndarray, dense: np.ndarray) -> np.ndarray:
    """The student's half of a video of both side by side."""
    from slagen.generation.side_by_side import part_of

    return part_of(both, 1, dense.shape[1], dense.shape[2])


def _psnr(clip: np.ndarray, dense: np.ndarray) -> float:
    """In dB, over all frames that both have; infinite for identical ones."""
    frames = min(len(clip), len(dense))
    mse = float(((clip[:frames].astype("float64") - dense[:frames]) ** 2).mean())
    return math.inf if mse == 0 else 10 * math.log10(255**2 / mse)


def _small(frames: np.ndarray, fps: int) -> bytes:
    """Frames as a small MP4."""
    with scratch() as folder:
        encode_video(frames, folder / "clip.mp4", fps)
        return make_thumbnail(folder / "clip.mp4", WIDTH)


def _charts(steps: list[StepRecord], checks: list[ValidationRecord], layers: dict[str, list[float]]) -> list[Chart]:
    layers_seen = min((len(record.proj_norms) for record in steps), default=0)
    x = [record.step for record in steps]
    errors = [(record.step, record.error) for record in steps if record.error is not None]
    return [
        Chart("loss", "step", [Line("loss", x, [record.loss for record in steps])], log=True),
        Chart("relative L2 error to the dense teacher", "step", [
            Line("training clips", [step for step, _ in errors], [error for _, error in errors]),
            Line("held-out clips, averaged weights", [c.step for c in checks], [c.error for c in checks], True),
        ], log=True),
        Chart("gradient norm", "step", [Line("before clipping", x, [record.grad_norm for record in steps])], log=True),
        Chart("norm of the attention's learned weights by layer", "step", [
            Line(f"layer {i}", x, [record.proj_norms[i] for record in steps])
            for i in range(layers_seen)
        ]),
        Chart("relative L2 error of self-attention by layer", "layer", [
            Line(name, list(range(len(found))), found, True) for name, found in layers.items()
        ]),
    ]  # fmt: skip


def _described(chart: Chart) -> str:
    """What a chart shows, in words: each curve with its first and last value."""
    curves = [f"{line.label} from {line.y[0]:.4g} to {line.y[-1]:.4g}" for line in chart.lines if line.y]
    return f"{chart.title} by {chart.x_label}: {', '.join(curves) or 'nothing yet'}"
