"""Drawings of what was measured, by matplotlib."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Timed:
    """A forward pass that `slagen bench` timed: at how many tokens and what sparsity (None: dense), in milliseconds."""

    method: str
    tokens: int
    sparsity: float | None
    forward_ms: float


def draw_bench(rows: list[Timed], title: str, folder: Path) -> list[Path]:
    """bench.png and bench.svg: forward time against the length of the sequence, and against sparsity.

    Args:
        rows: at least one.
    Returns: the files.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    longest = max(row.tokens for row in rows)
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    by_length, by_sparsity = figure.subplots(1, 2)
    swept = _swept(rows)
    for i, method in enumerate(dict.fromkeys(row.method for row in rows)):
        style = {"label": method, "color": f"C{i}"}
        own = [row for row in rows if row.method == method]
        curve = sorted((r for r in own if r.sparsity in (None, swept)), key=lambda r: r.tokens)
        if curve:
            by_length.plot([r.tokens for r in curve], [r.forward_ms for r in curve], "o-", ms=4, **style)
        level = [r for r in own if r.tokens == longest]
        if level and level[0].sparsity is None:
            by_sparsity.axhline(level[0].forward_ms, ls="--", lw=1, **style)
        elif level:
            level.sort(key=lambda r: r.sparsity or 0.0)
            by_sparsity.plot([r.sparsity for r in level], [r.forward_ms for r in level], "o-", ms=4, **style)
    by_length.set(xscale="log", yscale="log", xlabel="tokens", ylabel="forward, ms")
    by_length.set_title(f"sparsity {swept:g}" if swept is not None else "dense")
    by_sparsity.set(yscale="log", xlabel="sparsity", title=f"{longest:,} tokens")
    for axes in (by_length, by_sparsity):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.suptitle(title, fontsize="medium")
    files = []
    for kind in ("png", "svg"):
        path = folder / f"bench.{kind}"
        figure.savefig(path, format=kind, dpi=150)
        files.append(path)
    return files


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


def draw_chart(chart: Chart) -> str:
    """A chart as an SVG element that stands in a page; text in it is text."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 3.2), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots()
    for line in chart.lines:
        axes.plot(line.x, line.y, "o-" if line.marked else "-", ms=4, lw=1.2, label=line.label)
    axes.set(xlabel=chart.x_label, title=chart.title)
    if chart.log and any(value > 0 for line in chart.lines for value in line.y):
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    if 1 < len(chart.lines) <= 12:
        axes.legend(fontsize="small")
    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": chart.title}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]
