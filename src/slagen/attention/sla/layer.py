"""SLA as a layer of a transformer: `SparseLinearAttention` behind the interface that every method has."""

from __future__ import annotations

import torch
from torch import Tensor

from slagen.attention.order import CubesOfPass
from slagen.attention.protocol import Grid, Inputs
from slagen.attention.sla.config import Backend, SLAConfig
from slagen.attention.sla.functional import Branches
from slagen.attention.sla.module import SparseLinearAttention


class SLA(CubesOfPass, SparseLinearAttention):
    """Sparse-linear attention in one layer. Holds that layer's `proj_l`."""

    def __init__(
        self, head_dim: int, config: SLAConfig, backend: Backend, branches: Branches,
        device: torch.device | str | None,
    ) -> None:  # fmt: skip
        super().__init__(head_dim, config, backend=backend, branches=branches, device=device)
        self.follow_cubes(device)

    def block_sizes(self, grid: Grid) -> tuple[int, int] | None:
        """The blocks in raster order whose means it takes; None where it takes none."""
        chooses = self.branches != "linear" or self.config.linear_domain == "marginal"
        return (self.config.block_m, self.config.block_n) if chooses and self.config.order == "raster" else None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs | None = None) -> Tensor:  # type: ignore[override]
        """Attend: q, k, v (B, H, L, head_dim) -> o (B, H, L, head_dim) in q's dtype.

        Raises: ValueError where tokens are in cube order, and the grid is unknown or not one of L tokens.
        """
        means = None if inputs is None else inputs.block_means
        return super().forward(q, k, v, means, self.cubes_in(inputs, q))
