"""Speed-ups over the fastest dense method, and whether they exceed the noise."""

from __future__ import annotations

import itertools
from typing import Any

SLOWER, EVEN, FASTER = "slower", "within the noise", "faster"  # than the measurement that a row is compared with


def set_speedups(rows: list[dict[str, Any]]) -> None:
    """Set each row's speed-up over the fastest dense method of the same shape, and whether it exceeds the noise."""
    dense = [row for row in rows if row["kind"] == "dense" and row["forward_ms"]]
    if not dense:
        return
    forward = min((row["forward_ms"] for row in dense), key=lambda times: times["median"])
    both = min((_both(row) for row in dense if row["backward_ms"]), default=None)
    for row in rows:
        if row["forward_ms"]:
            row["speedup"] = forward["median"] / row["forward_ms"]["median"]
            row["against_dense"] = compare_times(row["forward_ms"], forward)
            if both is not None and row["backward_ms"]:
                row["speedup_forward_backward"] = both / _both(row)


def _both(row: dict[str, Any]) -> float:
    return row["training_forward_ms"]["median"] + row["backward_ms"]["median"]


def _verdicts(rows: list[dict[str, Any]], sparsity: float) -> list[tuple[int, str]]:
    """Lengths at which SLA was measured, longest first, and whether it is faster there than dense attention."""
    found = {
        int(row["shape"].split("x")[2]): row["against_dense"]
        for row in rows
        if row["method"] == "sla" and row["sparsity"] == sparsity and row["speedup"] is not None
    }
    return sorted(found.items(), reverse=True)


def break_even(rows: list[dict[str, Any]], sparsity: float) -> int | None:
    """The shortest length measured from which on SLA is always faster than the fastest dense method, by more than the
    noise; None if never."""
    faster = itertools.takewhile(lambda found: found[1] == FASTER, _verdicts(rows, sparsity))
    return min((length for length, _ in faster), default=None)


def even_tokens(rows: list[dict[str, Any]], sparsity: float) -> int | None:
    """The longest length measured, where SLA differs from the fastest dense method by no more than noise there."""
    verdicts = _verdicts(rows, sparsity)
    return verdicts[0][0] if verdicts and verdicts[0][1] == EVEN else None


def compare_times(times: dict[str, Any], base: dict[str, Any]) -> str:
    """ "faster" or "slower" than another measurement, or "within the noise" if their quartiles overlap."""
    if times["q3"] < base["q1"]:
        return FASTER
    return SLOWER if times["q1"] > base["q3"] else EVEN
