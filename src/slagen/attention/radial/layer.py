"""Radial Attention as a layer of a transformer."""

from __future__ import annotations

import torch
from torch import Tensor

from slagen.attention.cubes import check_tokens
from slagen.attention.kept_pairs import PairCounter
from slagen.attention.protocol import Inputs, StepContext
from slagen.attention.radial.config import RadialConfig
from slagen.attention.radial.functional import radial_attention
from slagen.attention.radial.mask import RadialMask, radial_mask
from slagen.attention.sla.config import Backend


class Radial(PairCounter):
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
        self._mask: RadialMask | None = None

    def begin_pass(self, context: StepContext) -> None:
        """Look the mask up outside compiled code, which then reads it as a tensor and is not compiled again."""
        if context.grid is not None:
            self._mask = radial_mask(self.config, context.grid, self.pairs.device)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs) -> Tensor:
        """Attend: q, k, v (B, H, L, D) -> o (B, H, L, D). Raises ValueError where the grid is not one of L tokens."""
        mask = self._mask
        if mask is None or mask.kept.device != q.device or mask.num_tokens != q.shape[2]:
            mask = radial_mask(self.config, check_tokens(inputs.context.grid, q.shape[2]), q.device)
        with torch.no_grad():
            self.pairs += mask.pairs * (q.shape[0] * q.shape[1])
        return radial_attention(q, k, v, self.config, mask, backend=self.backend)
