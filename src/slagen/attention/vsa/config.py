"""VSAConfig: how many cubes each cube attends to exactly, and whether there is a gate. No torch here."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from slagen.attention.sla.config import check_fraction
from slagen.errors import UsageError
from slagen.io.forms import shown
from slagen.settings import option

Backend = Literal["auto", "reference", "torch"]


@dataclass(frozen=True)
class VSAConfig:
    """How Video Sparse Attention divides its work between the fine and the coarse branch.

    Args:
        sparsity: fraction of the cubes that is not attended exactly, in [0, 1). At least one cube always is. FastWan2.1
            was trained with 0.8.
        gate: whether the coarse branch is added, times a gate, as the weights were trained. Without it, the fine branch
            is all there is.
    Raises: UsageError if a value is out of range.
    """

    sparsity: float = 0.8
    gate: bool = option(False, hidden=True)

    def __post_init__(self) -> None:
        check_fraction("sparsity", self.sparsity, "Try --sparsity 0.8.")
        if not isinstance(self.gate, bool):
            raise UsageError(f"gate is {shown(self.gate)}, but must be true or false.")

    def num_kept(self, num_cubes: int) -> int:
        """How many of the cubes a cube attends to exactly: rounded up, as FastVideo does, and at least 1."""
        return max(1, math.ceil((1 - self.sparsity) * num_cubes - 1e-6))
