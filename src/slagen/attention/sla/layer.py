"""SLA as a layer of a transformer: `SparseLinearAttention` behind the interface that every method has."""

from __future__ import annotations

import torch
from torch import Tensor

from slagen.attention.block_maps import BlockMap, map_in_order
from slagen.attention.order import CubesOfPass
from slagen.attention.protocol import Grid, Inputs, Layer
from slagen.attention.ranking import head_seeds, selector_scores
from slagen.attention.sla.block_map import block_map, block_scores
from slagen.attention.sla.config import Backend, SLAConfig
from slagen.attention.sla.functional import Branches
from slagen.attention.sla.module import SparseLinearAttention


class SLA(CubesOfPass, SparseLinearAttention):
    """Sparse-linear attention in one layer. Holds that layer's `proj_l`."""

    seeds: Tensor

    def __init__(
        self, layer: Layer, config: SLAConfig, backend: Backend, branches: Branches, device: torch.device | str | None
    ) -> None:
        super().__init__(layer.head_dim, config, backend=backend, branches=branches, device=device)
        self.follow_cubes(device)
        self.register_buffer("seeds", head_seeds(layer, device), persistent=False)

    def block_sizes(self, grid: Grid) -> tuple[int, int] | None:
        """The blocks in raster order whose means it takes; None where it takes none."""
        config = self.config
        chooses = self.branches != "linear" or config.linear_domain == "marginal"
        takes = chooses and config.order == "raster" and config.selector == "pooled"
        return (config.block_m, config.block_n) if takes else None

    def kept_blocks(self, q: Tensor, k: Tensor, inputs: Inputs) -> BlockMap | None:
        """What becomes of each key block, of q, k (B, H, L, head_dim); None where nothing is chosen."""
        config = self.config
        if self.branches == "linear" and config.linear_domain == "all":
            return None

        def classify(q: Tensor, k: Tensor) -> Tensor:
            scores = selector_scores(config, q, k, self.seeds, q.shape[3] ** -0.5)
            return block_map(block_scores(q, k, config) if scores is None else scores, config)

        return map_in_order(config, config.order, self.cubes_in(inputs, q), q, k, classify)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs | None = None) -> Tensor:  # type: ignore[override]
        """Attend: q, k, v (B, H, L, head_dim) -> o (B, H, L, head_dim) in q's dtype.

        Raises: ValueError where tokens are in cube order, and the grid is unknown or not one of L tokens.
        """
        means = None if inputs is None else inputs.block_means
        return super().forward(q, k, v, means, self.cubes_in(inputs, q), self.seeds)
