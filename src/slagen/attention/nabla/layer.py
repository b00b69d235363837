"""NABLA as a layer of a transformer, which counts the pairs that it attends to."""

from __future__ import annotations

import torch
from torch import Tensor

from slagen.attention.block_maps import BlockMap
from slagen.attention.block_sparse import block_sparse_attention
from slagen.attention.cubes import CUBE_TOKENS
from slagen.attention.kept_pairs import GridLayer, kept_pairs
from slagen.attention.nabla.config import Backend, NablaConfig
from slagen.attention.nabla.functional import nabla_attention
from slagen.attention.nabla.selection import Patches, kept_patches, patches_of
from slagen.attention.parts import selected
from slagen.attention.protocol import Attend, Grid, Inputs


class Nabla(GridLayer):
    """`nabla` in one layer. It has no parameters.

    Args:
        config: which patches are attended to.
        backend: as in `nabla_attention`.
        device: where it will run; None is the CPU.
    """

    def __init__(
        self, config: NablaConfig, backend: Backend = "auto", device: torch.device | str | None = None
    ) -> None:
        super().__init__(device)
        self.config, self.backend = config, backend

    def blocks_of(self, grid: Grid, device: torch.device) -> Patches:
        """The patches of a grid."""
        return patches_of(grid, self.config.reach, device)

    def kept_blocks(self, q: Tensor, k: Tensor, inputs: Inputs) -> BlockMap:
        """Which patches are attended to, of q, k (B, H, L, D)."""
        patches: Patches = self.blocks_in(inputs, q)
        kept, patch = kept_patches(q, k, self.config, patches, q.shape[3] ** -0.5), patches.order.slots // CUBE_TOKENS
        return BlockMap(kept.to(torch.int8), patch, patch)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs) -> Tensor:
        """Attend: q, k, v (B, H, L, D) -> o (B, H, L, D). Raises ValueError where the grid is not one of L tokens."""
        patches: Patches = self.blocks_in(inputs, q)
        with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
            kept = kept_patches(q, k, self.config, patches, q.shape[3] ** -0.5)
            self.pairs += kept_pairs(kept, patches.order.counts, patches.order.counts)
        return nabla_attention(q, k, v, self.config, patches, backend=self.backend, kept=kept)

    def parts(self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs) -> dict[str, Attend]:
        """What a forward pass consists of, as `Method.parts`."""
        patches, scale = self.blocks_in(inputs, q), q.shape[3] ** -0.5

        def select(q: Tensor, k: Tensor) -> Tensor:
            return kept_patches(q, k, self.config, patches, scale)

        def attend(q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> Tensor:
            return block_sparse_attention(q, k, v, kept, scale, patches.order)

        return selected(select, attend, q, k, v)
