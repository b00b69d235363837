"""Drawings of what was measured, by matplotlib."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Timed:
    """A forward pass that `slagen bench` timed: at how many tokens and what sparsity (None: dense), in milliseconds.

    Args:
        speedup: over the fastest dense method at the same shape; None where none was timed.
    """

    method: str
    tokens: int
    sparsity: float | None
    forward_ms: float
    speedup: float | None = None


def draw_bench(rows: list[Timed], title: str, folder: Path) -> list[Path]:
    """bench.png and bench.svg: a bar for each method at the longest sequence with its speed-up on it, and, where
    several lengths were timed, forward time against length.

    Args:
        rows: at least one.
    Returns: the files.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    longest = max(row.tokens for row in rows)
    level = [row for row in rows if row.tokens == longest]
    swept = len({row.tokens for row in rows}) > 1
    figure = Figure(figsize=(11 if swept else 6.5, max(2.5, 1.5 + 0.35 * len(level))), layout="constrained")
    FigureCanvasAgg(figure)
    bars, *others = figure.subplots(1, 1 + swept, squeeze=False)[0]
    _draw_bars(bars, level, longest)
    if swept:
        _draw_lengths(others[0], rows)
    figure.suptitle(title, fontsize="medium")
    files = []
    for kind in ("png", "svg"):
        path = folder / f"bench.{kind}"
        figure.savefig(path, format=kind, dpi=150)
        files.append(path)
    return files


def ratio_text(ratio: float) -> str:
    """A speed-up as it stands on a bar: "5.2x", and below 2 with two digits."""
    return f"{ratio:.1f}x" if ratio >= 2 else f"{ratio:.2f}x"


def _draw_bars(axes: Any, level: list[Timed], tokens: int) -> None:
    """The speed-up of each method, or its time where there is no dense one to compare with; the first one on top."""
    judged = any(row.speedup is not None for row in level)
    names = [row.method if row.sparsity is None else f"{row.method}, {row.sparsity:g}" for row in level]
    values = [row.speedup or 0.0 if judged else row.forward_ms for row in level]
    colours = {method: f"C{i}" for i, method in enumerate(dict.fromkeys(row.method for row in level))}
    found = axes.barh(range(len(level)), values, color=[colours[row.method] for row in level])
    axes.bar_label(found, [ratio_text(v) if judged else f"{v:.3g} ms" for v in values], padding=3, fontsize="small")
    axes.set_yticks(range(len(level)), names, fontsize="small")
    axes.invert_yaxis()
    axes.margins(x=0.15)
    if judged:
        axes.axvline(1.0, ls="--", lw=1, color="grey")
    axes.set_title(f"{tokens:,} tokens: {'speed-up over dense attention' if judged else 'forward, ms'}")


def _draw_lengths(axes: Any, rows: list[Timed]) -> None:
    swept = _swept(rows)
    for i, method in enumerate(dict.fromkeys(row.method for row in rows)):
        own = [row for row in rows if row.method == method and row.sparsity in (None, swept)]
        curve = sorted(own, key=lambda row: row.tokens)
        axes.plot([r.tokens for r in curve], [r.forward_ms for r in curve], "o-", ms=4, label=method, color=f"C{i}")
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="forward, ms")
    axes.set_title(f"sparsity {swept:g}" if swept is not None else "dense")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def _swept(rows: list[Timed]) -> float | None:
    """The sparsity that was measured at the most lengths."""
    found = [row.sparsity for row in rows if row.sparsity is not None]
    return max(dict.fromkeys(found), key=found.count) if found else None


@dataclass(frozen=True)
class Line:
    """A curve. marked: its points are drawn too."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    marked: bool = False


@dataclass(frozen=True)
class Chart:
    """Curves over one axis. log: the other is logarithmic."""

    title: str
    x_label: str
    lines: list[Line]
    log: bool = False


INK = "#010203"  # stands for the page's own text colour
HUES = [f"#0102{n:02x}" for n in range(4, 10)]  # stand for its variables --line-0 to --line-5


def draw_chart(chart: Chart) -> str:
    """A chart as an SVG element that stands in a page, in whose colours it is; text in it is text."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    ink = dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK)
    look: Any = {"svg.fonttype": "none", "svg.hashsalt": chart.title, "savefig.transparent": True, "grid.color": INK,
            "legend.framealpha": 0, **ink}  # fmt: skip
    text = io.StringIO()
    with matplotlib.rc_context(look):
        figure = Figure(figsize=(5.2, 3.2), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots()
        for index, line in enumerate(chart.lines):
            colour = HUES[index % len(HUES)]
            axes.plot(line.x, line.y, "o-" if line.marked else "-", ms=4, lw=1.4, label=line.label, color=colour)
        axes.set(xlabel=chart.x_label, title=chart.title)
        if chart.log and any(value > 0 for line in chart.lines for value in line.y):
            axes.set_yscale("log")
        axes.grid(alpha=0.2)
        if 1 < len(chart.lines) <= 12:
            axes.legend(fontsize="small")
        figure.savefig(text, format="svg", metadata={"Date": None})
    drawn = text.getvalue()[text.getvalue().index("<svg") :].replace(INK, "currentColor")
    for index, hue in enumerate(HUES):
        drawn = drawn.replace(hue, f"var(--line-{index})")
    return re.sub(r"(<text style=\"[^\"]*)\"", r'\1; fill: currentColor"', drawn)


@dataclass(frozen=True, eq=False)
class AttentionPicture:
    """What a head attends to, as arrays of numpy.

    Args:
        mass: (M, N), the share of its softmax that each query block gives to each key block.
        classes: (M, N), 1 for blocks that are attended exactly, 0 for others, -1 for negligible ones.
        weights: (T, H, W), the softmax of one query over all keys. kept: (T, H, W) bool, the keys attended exactly.
        query: frame, row and column of that query.
        best: (N + 1,), the mass that the n blocks of most mass hold, on average.
        density, kept_mass: of the blocks that are kept.
    """

    mass: Any
    classes: Any
    weights: Any
    kept: Any
    query: tuple[int, int, int]
    best: Any
    density: float
    kept_mass: float
    title: str = ""


def draw_attention(drawn: AttentionPicture) -> bytes:
    """A PNG: the mass of each pair of blocks, those that are kept, one query's keys frame by frame, and how fast the
    mass adds up."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import BoundaryNorm, ListedColormap, LogNorm
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 9.5), layout="constrained")
    FigureCanvasAgg(figure)
    (mass, classes), (query, curve) = figure.subplots(2, 2)
    rows, columns = drawn.mass.shape
    least = max(float(drawn.mass.max()) * 1e-4, 1e-12)
    image = mass.imshow(
        drawn.mass.clip(least), norm=LogNorm(least), cmap="magma", aspect="auto", interpolation="nearest"
    )
    figure.colorbar(image, ax=mass, label="share of the softmax")
    colours = ListedColormap(["#d9d9d9", "#9ecae1", "#08519c"])
    image = classes.imshow(
        drawn.classes,
        cmap=colours,
        norm=BoundaryNorm((-1.5, -0.5, 0.5, 1.5), 3),
        aspect="auto",
        interpolation="nearest",
    )
    bar = figure.colorbar(image, ax=classes, ticks=[-1, 0, 1])
    bar.ax.set_yticklabels(["negligible", "not exact", "exact"])
    for axes, title in ((mass, "softmax of dense attention"), (classes, "what becomes of each key block")):
        axes.set(xlabel=f"key block (of {columns})", ylabel=f"query block (of {rows})", title=title)
        axes.locator_params(integer=True)
    _draw_query(figure, query, drawn)
    share = [n / columns for n in range(columns + 1)]
    curve.plot(share, drawn.best, label="blocks of most mass")
    curve.plot([0, 1], [0, 1], "--", lw=1, color="grey", label="random blocks")
    curve.plot([drawn.density], [drawn.kept_mass], "o", color="#08519c", label="blocks that are kept")
    curve.set(
        xlabel="share of key blocks", ylabel="share of the softmax", title="mass held", xlim=(0, 1), ylim=(0, 1.02)
    )
    curve.grid(alpha=0.3)
    curve.legend(fontsize="small")
    figure.suptitle(drawn.title, fontsize="medium")
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=110)
    return data.getvalue()


def _draw_query(figure: Any, axes: Any, drawn: AttentionPicture) -> None:
    """The latent frames in rows, each key in the shade of its weight; those attended exactly are outlined."""
    import numpy as np
    from matplotlib.colors import LogNorm

    frames, height, width = drawn.weights.shape
    across = int(np.ceil(np.sqrt(frames)))
    down = -(-frames // across)
    sheet = np.full((down * (height + 1) - 1, across * (width + 1) - 1), np.nan)
    outlines = np.zeros_like(sheet)
    for frame in range(frames):
        top, left = frame // across * (height + 1), frame % across * (width + 1)
        sheet[top : top + height, left : left + width] = drawn.weights[frame]
        outlines[top : top + height, left : left + width] = drawn.kept[frame]
        axes.text(left, top - 0.2, str(frame), fontsize="x-small", va="top", color="white")
    least = max(float(drawn.weights.max()) * 1e-4, 1e-12)
    image = axes.imshow(np.maximum(sheet, least), norm=LogNorm(least), cmap="magma", interpolation="nearest")
    figure.colorbar(image, ax=axes, label="share of the softmax")
    for y, x in np.argwhere(outlines > 0):
        for dy, dx, line in ((-1, 0, ([-0.5, 0.5], [-0.5, -0.5])), (1, 0, ([-0.5, 0.5], [0.5, 0.5])),
                             (0, -1, ([-0.5, -0.5], [-0.5, 0.5])), (0, 1, ([0.5, 0.5], [-0.5, 0.5]))):  # fmt: skip
            beside = (y + dy, x + dx)
            inside = 0 <= beside[0] < sheet.shape[0] and 0 <= beside[1] < sheet.shape[1]
            if not inside or not outlines[beside]:
                axes.plot([x + offset for offset in line[0]], [y + offset for offset in line[1]], color="#4dd0e1", lw=1)
    frame, row, column = drawn.query
    top, left = frame // across * (height + 1), frame % across * (width + 1)
    axes.plot([left + column], [top + row], "+", color="lime", ms=9, mew=2)
    axes.set(
        title=f"softmax of query {frame},{row},{column} over the keys\nof each latent frame (outlined: exact)",
        xticks=[],
        yticks=[],
    )
