"""What `slagen bench` measured, as tables and sentences."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

COLUMNS = (
    "shape", "method", "backend", "sparsity", "forward ms (quartiles, repeats)", "backward ms", "dense TFLOP/s",
    "speed-up",
)  # fmt: skip
MODEL_COLUMNS = ("model", "attention", "backend", "sparsity", "step ms (quartiles)", "attention share", "speed-up")
NEVER = "SLA is slower than dense attention at the longest sequence measured"


@dataclass
class BenchResult:
    """What was measured. `content` is what --json prints; `files` were written."""

    content: dict[str, Any]
    files: list[Path] = field(default_factory=list)

    @property
    def tables(self) -> list[tuple[tuple[str, ...], list[list[str]]]]:
        """Column names and rows, as text: of attention calls, and of models."""
        return [
            (COLUMNS, [cells(row) for row in self.content["rows"] if row["forward_ms"] or row["correct"] is False]),
            (MODEL_COLUMNS, [model_cells(row) for row in self.content["models"]]),
        ]

    @property
    def verdicts(self) -> list[str]:
        """Lines on what did not run and why, how steady the times are, and from what length on SLA pays."""
        rows = self.content["rows"]
        lines = [f"{row['method']}: {row['reason']}" for row in rows if row["reason"] and row["correct"] is not False]
        drifts = [_drift(row["forward_ms"]) for row in rows if row["forward_ms"]]
        if drifts:
            drift = f"{max(drifts):.0%}"
            lines.append(f"the median of one call moved by up to {drift} between turns: smaller differences are noise")
        for shape, tokens in self.content["break_even_tokens"].items():
            pays = f"SLA is not slower than dense attention from {tokens:,} tokens on" if tokens else NEVER
            lines.append(f"{shape}: {pays}")
        return list(dict.fromkeys(lines))


def markdown(result: BenchResult) -> str:
    """The rows as tables, under the machine they were measured on."""
    about = result.content["machine"]
    lines = [f"# slagen bench: {about['name']}", "", f"{about['date']}; " + ", ".join(
        f"{package} {number}" for package, number in about["versions"].items()
    ) + f"; matmul {about['matmul_tflops']:.3g} TFLOP/s, copy {about['copy_gb_s']:.3g} GB/s.", ""]  # fmt: skip
    for columns, rows in result.tables:
        if rows:
            lines += ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
            lines += ["| " + " | ".join(row) + " |" for row in rows] + [""]
    lines += [f"- {verdict}" for verdict in result.verdicts]
    return "\n".join(lines) + "\n"


def cells(row: dict[str, Any]) -> list[str]:
    """One row of the table, as text; a method that was not timed says why."""
    shown = [row["shape"], row["method"], row["backend"], _number(row["sparsity"])]
    if not row["forward_ms"]:
        return [*shown, row["reason"] or "", "", "", ""]
    forward, backward = row["forward_ms"], row["backward_ms"]
    timed = f"{forward['median']:.4g} ({forward['q1']:.4g}-{forward['q3']:.4g}, {forward['repeats']})"
    speedup = row["speedup"]
    said = (
        "" if speedup is None else f"{speedup:.2f}x" + (" (slower)" if speedup < 1 and row["kind"] != "dense" else "")
    )
    return [
        *shown,
        timed,
        f"{backward['median']:.4g}" if backward else "",
        f"{row['tflops_dense_equivalent']:.4g}",
        said,
    ]


def model_cells(row: dict[str, Any]) -> list[str]:
    """One row of the table of models, as text."""
    step = row["step_ms"]
    return [
        f"{row['model']} {row['size']}, {row['num_frames']} frames",
        row["attention"],
        row["backend"] + ", compiled" * row["compiled"],
        _number(row["sparsity"]),
        f"{step['median']:.4g} ({step['q1']:.4g}-{step['q3']:.4g})",
        "" if row["compiled"] else f"{row['attention_share']:.0%}",
        f"{row['speedup']:.2f}x" + (" (slower)" if row["speedup"] < 1 and row["attention"] == "sla" else ""),
    ]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def _drift(times: dict[str, Any]) -> float:
    """How far the medians of the turns lie apart, as a share of the median of all."""
    medians = times["turn_medians"]
    return (max(medians) - min(medians)) / times["median"]
