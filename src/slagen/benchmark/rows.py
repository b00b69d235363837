"""What `slagen bench` measured, typed: the machine, rows of attention calls and of models. No torch here."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from slagen.device import Device
from slagen.timing import Times, TurnTimes


@dataclass(frozen=True)
class BenchMachine:
    """Where and when something was measured: the device, versions, the peak of a matrix product and of a copy."""

    device: Device
    versions: dict[str, str]
    matmul_tflops: float
    copy_gb_s: float
    date: str

    def to_dict(self) -> dict[str, Any]:
        """Its object in the JSON."""
        about = vars(self).copy()
        return {**about.pop("device").to_dict(), **about}


@dataclass(frozen=True)
class BenchRow:
    """One method at one shape and sparsity. What is None was not measured; `reason` says why.

    Args:
        kind: "sla", "sparse" or "dense". shape: BxHxLxD.
        sparsity: None where the method's work does not depend on it.
        correct: whether the check against the float64 reference passed. error: its largest error there, in units of
            the largest output.
        compile_s: seconds of the first call.
        forward_ms: the forward pass as inference runs it. training_forward_ms: the one before a backward pass.
        parts_ms: where the forward time goes, by part, each timed alone.
        tflops_dense_equivalent: TFLOP/s, as if every pair of tokens were attended.
        speedup, speedup_forward_backward: over the fastest dense method at the same shape.
        against_dense: "faster", "slower" or "within the noise".
        delta: query rows of which one was attended exactly, where the method was corrected by it.
    """

    method: str
    kind: str
    backend: str
    shape: str
    dtype: str
    sparsity: float | None
    correct: bool | None = None
    error: float | None = None
    reason: str | None = None
    compile_s: float | None = None
    forward_ms: TurnTimes | None = None
    training_forward_ms: TurnTimes | None = None
    backward_ms: TurnTimes | None = None
    parts_ms: dict[str, float] | None = None
    tflops_dense_equivalent: float | None = None
    speedup: float | None = None
    against_dense: str | None = None
    speedup_forward_backward: float | None = None
    delta: int | None = None

    @property
    def tokens(self) -> int:
        """The length of the sequence."""
        return int(self.shape.split("x")[2])

    @property
    def both_ms(self) -> float | None:
        """The medians of the forward pass that saves for the backward pass, and of that, together."""
        if self.training_forward_ms is None or self.backward_ms is None:
            return None
        return self.training_forward_ms.median + self.backward_ms.median

    def to_dict(self) -> dict[str, Any]:
        """Its object in the JSON."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class ModelRow:
    """The denoising loop of a model with one attention method.

    Args:
        size: width x height in pixels. steps: that were timed. compiled: whether its blocks were, which hides the
            attention's own time.
        step_ms, attention_ms: of a step, and of the attention in it. attention_share: of all steps' time.
        speedup: over the fastest dense row. against_dense: "faster", "slower" or "within the noise".
        delta: as in BenchRow. sparsity_schedule: where one set the sparsity.
        lora: the LoRAs with their scales, and whether they were merged; None where there are none.
    """

    model: str
    attention: str
    backend: str
    sparsity: float | None
    size: str
    num_frames: int
    steps: int
    compiled: bool
    step_ms: Times
    attention_ms: Times | None
    attention_share: float | None
    peak_memory_gib: float
    speedup: float | None = None
    against_dense: str | None = None
    delta: int | None = None
    sparsity_schedule: str | None = None
    lora: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Its object in the JSON."""
        return {name: x for name, x in dataclasses.asdict(self).items() if name != "lora" or x is not None}


@dataclass(frozen=True)
class SameTopK:
    """Sparsities that keep the same key blocks at a shape: `sparsity` was measured, `also` stands for the others.

    Args:
        kept, blocks: how many key blocks are kept, of how many.
    """

    shape: str
    sparsity: float
    also: list[float]
    kept: int
    blocks: int

    def to_dict(self) -> dict[str, Any]:
        """Its object in the JSON."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        *most, last = (f"{other:g}" for other in self.also)
        others = f"sparsities {', '.join(most)} and {last}" if most else f"sparsity {last}"
        verbs = ("keep", "are") if most else ("keeps", "is")
        return (
            f"{self.shape}: {others} {verbs[0]} {self.kept} of {self.blocks} key blocks, the same as "
            f"{self.sparsity:g}, and {verbs[1]} not timed separately"
        )
