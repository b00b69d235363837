"""Radial Attention as a layer of a transformer."""

from __future__ import annotations

import torch
from torch import Tensor

from slagen.attention.block_maps import BlockMap
from slagen.attention.kept_pairs import GridLayer
from slagen.attention.protocol import Attend, Grid, Inputs
from slagen.attention.radial.config import RadialConfig
from slagen.attention.radial.functional import radial_attention
from slagen.attention.radial.mask import RadialMask, radial_mask
from slagen.attention.sla.config import Backend


class Radial(GridLayer):
    """`radial` in one layer. It has no parameters.

    Args:
        config: how the band narrows.
        backend: as in `radial_attention`.
        device: where it will run; None is the CPU.
    """

    def __init__(
        self, config: RadialConfig, backend: Backend = "auto", device: torch.device | str | None = None
    ) -> None:
        super().__init__(device)
        self.config, self.backend = config, backend

    def blocks_of(self, grid: Grid, device: torch.device) -> RadialMask:
        """The mask of a grid."""
        return radial_mask(self.config, grid, device)

    def kept_blocks(self, q: Tensor, k: Tensor, inputs: Inputs) -> BlockMap:
        """Which key blocks are attended to, of q, k (B, H, L, D): the same for all heads."""
        mask: RadialMask = self.blocks_in(inputs, q)
        place = torch.arange(q.shape[2], device=q.device)
        classes = mask.kept.to(torch.int8).expand(*q.shape[:2], -1, -1)
        return BlockMap(classes, place // self.config.block_m, place // self.config.block_n)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs) -> Tensor:
        """Attend: q, k, v (B, H, L, D) -> o (B, H, L, D). Raises ValueError where the grid is not one of L tokens."""
        mask: RadialMask = self.blocks_in(inputs, q)
        with torch.no_grad():
            self.pairs += mask.pairs * (q.shape[0] * q.shape[1])
        return radial_attention(q, k, v, self.config, mask, backend=self.backend)

    def parts(self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs) -> dict[str, Attend]:
        """What a forward pass consists of, as `Method.parts`: the mask is made once for a grid."""
        mask: RadialMask = self.blocks_in(inputs, q)
        return {"fused": lambda q, k, v: radial_attention(q, k, v, self.config, mask, backend=self.backend)}
