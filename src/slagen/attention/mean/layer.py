"""Attention with block means as a layer of a transformer, which counts the pairs that it attends to exactly."""

from __future__ import annotations

import torch
from torch import Tensor

from slagen.attention.block_maps import BlockMap, map_in_order
from slagen.attention.kept_pairs import PairCounter
from slagen.attention.mean.config import MeanConfig, SolConfig
from slagen.attention.mean.functional import attend_to, block_mean_attention
from slagen.attention.mean.selection import kept_blocks, kept_pairs
from slagen.attention.order import CubesOfPass
from slagen.attention.parts import ordered, selected
from slagen.attention.protocol import Attend, Inputs, Layer
from slagen.attention.ranking import head_seeds
from slagen.attention.sla.config import Backend
from slagen.attention.sla.functional import choose_backend


class BlockMeanAttention(PairCounter, CubesOfPass):
    """`mean` or `sol` in one layer. It has no parameters.

    Args:
        config: which blocks are attended exactly.
        layer: it stands in; None where nobody says.
        backend: as in `block_mean_attention`.
        device: where it will run; None is the CPU.
    """

    seeds: Tensor | None

    def __init__(
        self,
        config: MeanConfig | SolConfig,
        backend: Backend = "auto",
        device: torch.device | str | None = None,
        layer: Layer | None = None,
    ) -> None:
        super().__init__(device)
        self.config, self.backend = config, backend
        self.follow_cubes(device)
        self.register_buffer("seeds", None if layer is None else head_seeds(layer, device), persistent=False)

    def kept_blocks(self, q: Tensor, k: Tensor, inputs: Inputs) -> BlockMap:
        """Which key blocks are attended exactly, of q, k (B, H, L, D)."""

        def classify(q: Tensor, k: Tensor) -> Tensor:
            return kept_blocks(q, k, self.config, self.seeds).to(torch.int8)

        return map_in_order(self.config, self.config.order, self.cubes_in(inputs, q), q, k, classify)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs | None = None) -> Tensor:
        """Attend: q, k, v (B, H, L, D) -> o (B, H, L, D).

        Raises: ValueError where tokens are in cube order, and the grid is unknown or not one of L tokens.
        """

        def count(kept: Tensor) -> None:
            with torch.no_grad():
                self.pairs += kept_pairs(kept, self.config, q.shape[2])

        grid = self.cubes_in(inputs, q)
        return block_mean_attention(
            q, k, v, self.config, backend=self.backend, grid=grid, on_kept=count, seeds=self.seeds
        )

    def parts(self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs) -> dict[str, Attend]:
        """What a forward pass consists of, as `Method.parts`."""
        config, scale, backend = self.config, q.shape[3] ** -0.5, choose_backend(q, self.backend)

        def select(q: Tensor, k: Tensor) -> Tensor:
            return kept_blocks(q, k, config, self.seeds, scale)

        def attend(q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> Tensor:
            return attend_to(kept, q, k, v, config, scale, backend)

        parts, q, k, v = ordered(config.order, self.cubes_in(inputs, q), q, k, v)
        return {**parts, **selected(select, attend, q, k, v)}
