"""Speed-ups over the fastest dense method, and whether they exceed the noise."""

from __future__ import annotations

import dataclasses
import itertools

from slagen.benchmark.rows import BenchRow
from slagen.timing import Times

SLOWER, EVEN, FASTER = "slower", "within the noise", "faster"  # than the measurement that a row is compared with


def with_speedups(rows: list[BenchRow]) -> list[BenchRow]:
    """The rows of one shape with their speed-ups over its fastest dense method, and whether they exceed the noise."""
    dense = [row for row in rows if row.kind == "dense"]
    forward = min((row.forward_ms for row in dense if row.forward_ms), key=lambda times: times.median, default=None)
    both = min((row.both_ms for row in dense if row.forward_ms and row.both_ms is not None), default=None)
    return [row if forward is None else _with_speedup(row, forward, both) for row in rows]


def _with_speedup(row: BenchRow, forward: Times, both_ms: float | None) -> BenchRow:
    if row.forward_ms is None:
        return row
    return dataclasses.replace(
        row,
        speedup=forward.median / row.forward_ms.median,
        against_dense=compare_times(row.forward_ms, forward),
        speedup_forward_backward=None if both_ms is None or row.both_ms is None else both_ms / row.both_ms,
    )


def _verdicts(rows: list[BenchRow], sparsity: float) -> list[tuple[int, str | None]]:
    """Lengths at which SLA was measured, longest first, and whether it is faster there than dense attention."""
    found = {
        row.tokens: row.against_dense
        for row in rows
        if row.method == "sla" and row.sparsity == sparsity and row.speedup is not None
    }
    return sorted(found.items(), reverse=True)


def break_even(rows: list[BenchRow], sparsity: float) -> int | None:
    """The shortest length measured from which on SLA is always faster than the fastest dense method, by more than the
    noise; None if never."""
    faster = itertools.takewhile(lambda found: found[1] == FASTER, _verdicts(rows, sparsity))
    return min((length for length, _ in faster), default=None)


def even_tokens(rows: list[BenchRow], sparsity: float) -> int | None:
    """The longest length measured, where SLA differs from the fastest dense method by no more than noise there."""
    verdicts = _verdicts(rows, sparsity)
    return verdicts[0][0] if verdicts and verdicts[0][1] == EVEN else None


def compare_times(times: Times, base: Times) -> str:
    """ "faster" or "slower" than another measurement, or "within the noise" if their quartiles overlap."""
    if times.q3 < base.q1:
        return FASTER
    return SLOWER if times.q1 > base.q3 else EVEN
