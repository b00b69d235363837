"""--measure-dense: which steps run with dense attention too, and the speed-up that was measured. No torch here."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from slagen.attention.policy import DensePart
from slagen.errors import UsageError
from slagen.generation.video_report import MeasuredDense, MeasuredStep, Ratio
from slagen.io.text import counted
from slagen.timing import StepTimes

LEAVE_OUT = "Leave --measure-dense out"


def check_measured(count: int | None, dense: DensePart, reason: str = "") -> None:
    """Raise UsageError where fewer steps than `count` have anything to compare with dense attention.

    reason: why the clip is dense, where it is.
    """
    if count is None:
        return
    own = _sparse_steps(dense)
    if not own or reason:
        said = reason or "every step of this clip uses dense attention already"
        raise UsageError(f"{said}, so there is nothing to compare with it. {LEAVE_OUT}.")
    if count > len(own):
        has = f"the run has only {counted(dense.num_steps, 'step')}"
        if len(own) < dense.num_steps:
            has += f", of which {dense.num_steps - len(own)} have dense attention already"
        raise UsageError(f"measure_dense is {count}, but {has}. Try --measure-dense {min(3, len(own))}.")


def measured_steps(count: int | None, dense: DensePart) -> tuple[int, ...]:
    """The steps that are run with dense attention too: evenly spread, and without the first as long as others are
    enough, for in that kernels are compiled and memory is allocated."""
    own = _sparse_steps(dense)
    if count is None or not own:
        return ()
    if len(own) > count:
        own = own[1:]
    return tuple(own[(2 * i + 1) * len(own) // (2 * count)] for i in range(count))


def _sparse_steps(dense: DensePart) -> list[int]:
    return [step for step in range(dense.num_steps) if dense.share_of(step) < 1]


def dense_section(steps: Sequence[StepTimes]) -> MeasuredDense | None:
    """What the steps took that were run both ways; None where none was."""
    rows = [
        MeasuredStep(
            step.index, sum(step.attention_ms), step.dense.dense_attention_ms, step.latency_ms,
            step.latency_ms - step.dense.own_ms + step.dense.dense_ms,
        )
        for step in steps
        if step.dense is not None and step.latency_ms is not None
    ]  # fmt: skip
    if not rows:
        return None
    attention = _ratio([row.dense_attention_ms / row.attention_ms for row in rows])
    return MeasuredDense(attention, _ratio([row.dense_latency_ms / row.latency_ms for row in rows]), rows)


def _ratio(values: Sequence[float]) -> Ratio:
    return Ratio(statistics.median(values), min(values), max(values))


def describe_dense(measured: MeasuredDense) -> str:
    """The speed-ups in one sentence."""
    attention, step = (_said(ratio) for ratio in (measured.attention_speedup, measured.step_speedup))
    steps = len(measured.steps)
    of = "one step" if steps == 1 else f"medians and ranges of {steps} steps"
    return f"measured speed-up over dense attention: attention {attention}, the whole step {step} ({of}, run both ways)"


def _said(ratio: Ratio) -> str:
    spread = "" if ratio.least == ratio.most else f" ({ratio.least:.2f} to {ratio.most:.2f})"
    return f"{ratio.median:.2f}x{spread}"
