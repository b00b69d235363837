"""What `slagen bench` measured, as tables and sentences."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slagen.benchmark.compare import EVEN, SLOWER
from slagen.benchmark.rows import BenchMachine, BenchRow, ModelRow, SameTopK
from slagen.io.records import read_record
from slagen.io.text import counted
from slagen.timing import TurnTimes

COLUMNS = (
    "shape", "method", "backend", "sparsity", "forward ms (quartiles, repeats)", "backward ms",
    "dense-equivalent TFLOP/s", "speed-up",
)  # fmt: skip
MODEL_COLUMNS = ("model", "attention", "backend", "sparsity", "step ms (quartiles)", "attention share", "speed-up")
SHORT_COLUMNS = (
    "method", "backend", "sparsity", "forward\nms", "backward\nms", "dense-\nequiv.\nTFLOP/s", "speed-up",
)  # fmt: skip
SHORT_MODEL_COLUMNS = ("attention", "backend", "sparsity", "step ms", "attention\nshare", "speed-up")
NEVER = "SLA is slower than dense attention at the longest sequence measured"


@dataclass
class BenchResult:
    """What was measured.

    Args:
        machine: where and when.
        rows: of attention calls. models: of denoising loops.
        break_even_tokens: by shape, the length from which on SLA is faster than dense attention; None if never.
        same_top_k: sparsities that were not timed, as they keep the same blocks; None where no shape was timed.
        even_tokens: by shape, a length with no verdict; None where SLA was not timed.
        files: that were written.
    """

    machine: BenchMachine
    rows: list[BenchRow] = field(default_factory=list)
    models: list[ModelRow] = field(default_factory=list)
    break_even_tokens: dict[str, int | None] = field(default_factory=dict)
    same_top_k: list[SameTopK] | None = None
    even_tokens: dict[str, int | None] | None = None
    files: list[Path] = field(default_factory=list)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> BenchResult:
        """What a bench.json says."""
        about = content["machine"]
        machine = read_record(BenchMachine, {**about, "device": about})
        return read_record(cls, {**content, "machine": machine})

    def to_dict(self) -> dict[str, Any]:
        """What --json prints and bench.json holds."""
        content: dict[str, Any] = {
            "machine": self.machine.to_dict(),
            "rows": [row.to_dict() for row in self.rows],
            "models": [row.to_dict() for row in self.models],
            "break_even_tokens": self.break_even_tokens,
        }
        if self.same_top_k is not None:
            content["same_top_k"] = [group.to_dict() for group in self.same_top_k]
        if self.even_tokens is not None:
            content["even_tokens"] = self.even_tokens
        return content

    @property
    def tables(self) -> list[tuple[tuple[str, ...], list[list[str]]]]:
        """Column names and rows, as text: of attention calls, and of models."""
        return [
            (COLUMNS, [cells(row) for row in self._shown]),
            (MODEL_COLUMNS, [model_cells(row) for row in self.models]),
        ]

    @property
    def short_tables(self) -> list[tuple[str, tuple[str, ...], list[list[str]], list[str]]]:
        """For 80 columns: a heading, column names, rows, and what is said below, of each shape or model."""
        rows: dict[str, list[BenchRow]] = {}
        for row in self._shown:
            rows.setdefault(row.shape, []).append(row)
        models: dict[str, list[ModelRow]] = {}
        for model in self.models:
            models.setdefault(_model(model), []).append(model)
        wrong = {shape: [f"{row.method} is {row.reason}" for row in found if not row.forward_ms]
                 for shape, found in rows.items()}  # fmt: skip
        return [
            *[(shape, SHORT_COLUMNS, list(map(short_cells, found)), wrong[shape]) for shape, found in rows.items()],
            *[(name, SHORT_MODEL_COLUMNS, list(map(short_model_cells, found)), []) for name, found in models.items()],
        ]

    @property
    def speedup_bars(self) -> dict[str, list[tuple[str, float]]]:
        """By the headings of `short_tables`: the name of each row, and its speed-up over dense attention."""
        named: list[tuple[str, str, BenchRow | ModelRow]] = [(row.shape, row.method, row) for row in self._shown]
        named += [(_model(row), row.attention + ", compiled" * row.compiled, row) for row in self.models]
        bars: dict[str, list[tuple[str, float]]] = {}
        for heading, name, row in named:
            if row.speedup is not None:
                sparsity = "" if row.sparsity is None else f", {row.sparsity:g}"
                bars.setdefault(heading, []).append((_named(name, row) + sparsity, row.speedup))
        return {heading: found for heading, found in bars.items() if len(found) > 1}

    @property
    def speedups(self) -> list[str]:
        """What SLA is beside dense attention, at each shape that was timed."""
        rows = [row for row in self.rows if row.method == "sla" and row.speedup]
        return [f"{_speedup(row, True)} at {row.shape}" for row in rows]

    @property
    def _shown(self) -> list[BenchRow]:
        return [row for row in self.rows if row.forward_ms or row.correct is False]

    @property
    def verdicts(self) -> list[str]:
        """Lines on what did not run and why, how steady the times are, and from what length on SLA pays."""
        reasons: dict[str, list[str]] = {}
        for row in self.rows:
            if row.reason and row.correct is not False:
                reasons.setdefault(row.reason, []).append(row.method)
        lines = [f"{', '.join(dict.fromkeys(names))}: {reason}" for reason, names in reasons.items()]
        lines += [str(group) for group in self.same_top_k or []]
        drifts = [_drift(row.forward_ms) for row in self.rows if row.forward_ms]
        if drifts:
            drift = f"{max(drifts):.0%}"
            lines.append(
                f"medians varied by up to {drift} between rounds; where quartiles overlap, a difference is noise"
            )
        for shape, tokens in self.break_even_tokens.items():
            even = (self.even_tokens or {}).get(shape)
            pays = f"SLA is faster than dense attention from {tokens:,} tokens on" if tokens else NEVER
            if even and not tokens:
                pays = (
                    f"no verdict: at {even:,} tokens the quartiles of SLA and of dense attention overlap, so their "
                    "difference is noise"
                )
            lines.append(f"{shape}: {pays}")
        return list(dict.fromkeys(lines))


def markdown(result: BenchResult) -> str:
    """The rows as tables, under the machine they were measured on."""
    about = result.machine
    lines = [f"# slagen bench: {about.device.name}", "", f"{about.date}; " + ", ".join(
        f"{package} {number}" for package, number in about.versions.items()
    ) + f"; matmul {about.matmul_tflops:.3g} TFLOP/s, copy {about.copy_gb_s:.3g} GB/s.", ""]  # fmt: skip
    for columns, rows in result.tables:
        if rows:
            lines += ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
            lines += ["| " + " | ".join(row) + " |" for row in rows] + [""]
    lines += [f"- {verdict}" for verdict in result.verdicts]
    return "\n".join(lines) + "\n"


def cells(row: BenchRow) -> list[str]:
    """One row of the table, as text; a method that was not timed says why."""
    shown = [row.shape, _named(row.method, row), row.backend, _number(row.sparsity)]
    if not row.forward_ms:
        return [*shown, row.reason or "", "", "", ""]
    forward, backward = row.forward_ms, row.backward_ms
    return [
        *shown,
        f"{forward.median:.4g} ({forward.q1:.4g}-{forward.q3:.4g}, {forward.repeats})",
        f"{backward.median:.4g}" if backward else "",
        f"{row.tflops_dense_equivalent:.4g}",
        _speedup(row, row.kind != "dense"),
    ]


def short_cells(row: BenchRow) -> list[str]:
    """As `cells`, without the shape and the quartiles; a backend that is the method itself is not said twice."""
    backend = "" if row.backend == row.method else row.backend
    shown = [_named(row.method, row), backend, _number(row.sparsity)]
    if not row.forward_ms:
        return [*shown, "wrong", "", "", ""]
    backward = row.backward_ms
    times = [_short(row.forward_ms.median), _short(backward.median) if backward else ""]
    return [*shown, *times, _short(row.tflops_dense_equivalent), _speedup(row, row.kind != "dense")]


def model_cells(row: ModelRow) -> list[str]:
    """One row of the table of models, as text."""
    step = row.step_ms
    attention, backend, sparsity, _, share, speedup = short_model_cells(row)
    times = f"{step.median:.4g} ({step.q1:.4g}-{step.q3:.4g})"
    return [_model(row), attention, backend, sparsity, times, share, speedup]


def short_model_cells(row: ModelRow) -> list[str]:
    """As `model_cells`, without the model and the quartiles."""
    return [
        _named(row.attention, row),
        row.backend + ", compiled" * row.compiled,
        _number(row.sparsity) if row.sparsity_schedule is None else "schedule",
        _short(row.step_ms.median),
        "" if row.attention_share is None else f"{row.attention_share:.0%}",
        _speedup(row, row.attention != "dense"),
    ]


def _named(method: str, row: BenchRow | ModelRow) -> str:
    return method if row.delta is None else f"{method}, delta {row.delta}"


def _model(row: ModelRow) -> str:
    return f"{row.model} {row.size}, {counted(row.num_frames, 'frame')}"


def _speedup(row: BenchRow | ModelRow, judged: bool) -> str:
    if row.speedup is None:
        return ""
    said = {SLOWER: " (slower)", EVEN: " (noise)"}.get(row.against_dense or "", "") if judged else ""
    return f"{row.speedup:.2f}x{said}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def _short(value: float | None) -> str:
    """A number in at most 8 characters, with at least three digits of it; nothing for None."""
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 1000 else f"{value:.4g}" if value >= 1 else f"{value:.3g}"


def _drift(times: TurnTimes) -> float:
    """How far the medians of the turns lie apart, as a share of the median of all."""
    medians = times.turn_medians
    return (max(medians) - min(medians)) / times.median
