"""Drawings of what was measured, by matplotlib."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


def draw_bench(content: dict[str, Any], folder: Path) -> list[Path]:
    """bench.png and bench.svg: forward time against the length of the sequence, and against sparsity.

    Args:
        content: what `slagen.bench.bench` measured.
    Returns: the files, each written beside its name and renamed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in content["rows"] if row["forward_ms"]]
    longest = max(_length(row) for row in rows)
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    by_length, by_sparsity = figure.subplots(1, 2)
    swept = _swept(rows)
    for i, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
        style = {"label": method, "color": f"C{i}"}
        own = [row for row in rows if row["method"] == method]
        curve = sorted((r for r in own if r["sparsity"] in (None, swept)), key=_length)
        if curve:
            by_length.plot([_length(r) for r in curve], [r["forward_ms"]["median"] for r in curve], "o-", ms=4, **style)
        level = [r for r in own if _length(r) == longest]
        if level and level[0]["sparsity"] is None:
            by_sparsity.axhline(level[0]["forward_ms"]["median"], ls="--", lw=1, **style)
        elif level:
            level.sort(key=lambda r: r["sparsity"])
            by_sparsity.plot(
                [r["sparsity"] for r in level], [r["forward_ms"]["median"] for r in level], "o-", ms=4, **style
            )
    by_length.set(xscale="log", yscale="log", xlabel="tokens", ylabel="forward, ms")
    by_length.set_title(f"sparsity {swept:g}" if swept is not None else "dense")
    by_sparsity.set(yscale="log", xlabel="sparsity", title=f"{longest:,} tokens")
    for axes in (by_length, by_sparsity):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    about = content["machine"]
    figure.suptitle(f"{about['name']}, {rows[0]['dtype']}, {about['date'][:10]}", fontsize="medium")
    files = []
    for kind in ("png", "svg"):
        path = folder / f"bench.{kind}"
        part = path.with_name(path.name + ".part")
        figure.savefig(part, format=kind, dpi=150)
        os.replace(part, path)
        files.append(path)
    return files


def _length(row: dict[str, Any]) -> int:
    return int(row["shape"].split("x")[2])


def _swept(rows: list[dict[str, Any]]) -> float | None:
    """The sparsity that was measured at the most lengths."""
    found = [row["sparsity"] for row in rows if row["sparsity"] is not None]
    return max(dict.fromkeys(found), key=found.count) if found else None
