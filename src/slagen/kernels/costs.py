"""What a compiled kernel costs on a card, and which limits of the card it breaks: the records, without Triton."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class KernelCost:
    """One kernel on one target.

    uses_dot: it multiplies half-precision tiles of 64 rows or more with tl.dot.
    instructions: SASS instructions in all.
    round_instructions: those that a warp runs in a round of the main loop, by the shortest way that does all products;
        0 without a loop.
    row_instructions: those that a warp runs at most for a row of SELECTED_COLUMNS scores; None but for the selection.
    copies_in_flight: groups of copies that are still on their way after every wait of the main loop.
    programs_per_sm: programs that a multiprocessor holds at a time.
    warnings: what ptxas says that costs time (C75xx).
    fingerprint: of all that the compiler is given: equal ones compile to equal code under one version of Triton.
    """

    kernel: str
    target: str
    head_dim: int
    dtype: str
    fingerprint: str
    config: dict[str, int]
    shared_bytes: int
    shared_limit: int
    registers: int
    spill_bytes: int
    mma: str | None
    uses_dot: bool
    instructions: int
    round_instructions: int
    row_instructions: int | None
    copies_in_flight: int
    programs_per_sm: int
    warnings: list[str]

    @property
    def wgmma(self) -> bool:
        return self.mma == "wgmma"

    @property
    def faults(self) -> list[str]:
        """Which limits the kernel breaks on its target."""
        found = []
        if self.shared_bytes > self.shared_limit:
            found.append(f"{self.shared_bytes} bytes of shared memory, but the GPU has only {self.shared_limit}")
        if self.spill_bytes:
            found.append(f"{self.spill_bytes} bytes spilled")
        if self.uses_dot and self.mma is None:
            found.append("no tensor-core instruction")
        if self.uses_dot and self.target == "sm_90" and not self.wgmma:
            found.append("no wgmma")
        if self.uses_dot and self.target == "sm_100" and self.mma != "tcgen05":
            found.append("no tcgen05")
        if self.uses_dot and self.kernel.startswith("attend"):
            if self.copies_in_flight < 1:
                found.append("no asynchronous copies during the matrix products")
            if self.target == "sm_90" and self.config["tile_m"] <= 64 and self.programs_per_sm < 2:
                found.append("only one program per multiprocessor")
        return [*found, *self.warnings]

    def to_dict(self) -> dict[str, Any]:
        """Its object in the JSON."""
        return {**asdict(self), "wgmma": self.wgmma, "faults": self.faults}


@dataclass(frozen=True)
class Bounds:
    """How long the launches of one kernel should take together, in ms: by the tensor cores, the instructions issued,
    the second-level cache and memory. estimate: the slowest of these, and what the launches cost."""

    launches: int
    tensor: float
    issue: float
    l2: float
    dram: float
    estimate: float


@dataclass(frozen=True)
class OperatorCall:
    """What one call of the operator launches, and how long that should take.

    Args:
        shape: BxHxLxD. card: which the estimate is of. measured: False, for nothing is.
        estimate_ms: by kernel, and "total". bounds_ms: by kernel.
    """

    shape: str
    dtype: str
    sparsity: float
    linear_domain: str
    card: str
    measured: bool
    launches: int
    estimate_ms: dict[str, float]
    bounds_ms: dict[str, Bounds]

    def to_dict(self) -> dict[str, Any]:
        """Its object in the JSON."""
        return asdict(self)


@dataclass(frozen=True)
class KernelCosts:
    """Every kernel on every card, and a call of the operator. triton: the version that compiled them."""

    triton: str
    operator: OperatorCall
    kernels: list[KernelCost]

    def to_dict(self) -> dict[str, Any]:
        """What --json prints."""
        return {
            "triton": self.triton, "operator": self.operator.to_dict(),
            "kernels": [row.to_dict() for row in self.kernels],
        }  # fmt: skip
