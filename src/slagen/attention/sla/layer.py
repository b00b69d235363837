"""SLA as a layer of a transformer: `SparseLinearAttention` behind the interface that every method has."""

from __future__ import annotations

from torch import Tensor

from slagen.attention.protocol import Grid, Inputs
from slagen.attention.sla.module import SparseLinearAttention


class SLA(SparseLinearAttention):
    """Sparse-linear attention in one layer. Holds that layer's `proj_l`."""

    def block_sizes(self, grid: Grid) -> tuple[int, int] | None:
        """The blocks whose means it takes; None where it chooses none."""
        chooses = self.branches != "linear" or self.config.linear_domain == "marginal"
        return (self.config.block_m, self.config.block_n) if chooses else None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs | None = None) -> Tensor:  # type: ignore[override]
        """Attend: q, k, v (B, H, L, head_dim) -> o (B, H, L, head_dim) in q's dtype."""
        return super().forward(q, k, v, None if inputs is None else inputs.block_means)
