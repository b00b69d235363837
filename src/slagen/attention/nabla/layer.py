"""NABLA as a layer of a transformer, which counts the pairs that it attends to."""

from __future__ import annotations

import torch
from torch import Tensor

from slagen.attention.cubes import check_tokens
from slagen.attention.kept_pairs import PairCounter, kept_pairs
from slagen.attention.nabla.config import Backend, NablaConfig
from slagen.attention.nabla.functional import nabla_attention
from slagen.attention.nabla.selection import Patches, kept_patches, patches_of
from slagen.attention.protocol import Inputs, StepContext


class Nabla(PairCounter):
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
        self._patches: Patches | None = None

    def begin_pass(self, context: StepContext) -> None:
        """Look the patches up outside compiled code, which then reads them as tensors and is not compiled again."""
        if context.grid is not None:
            self._patches = patches_of(context.grid, self.config.reach, self.pairs.device)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs) -> Tensor:
        """Attend: q, k, v (B, H, L, D) -> o (B, H, L, D). Raises ValueError where the grid is not one of L tokens."""
        patches = self._patches
        if patches is None or patches.rows.device != q.device or len(patches.rows) != q.shape[2]:
            patches = patches_of(check_tokens(inputs.context.grid, q.shape[2]), self.config.reach, q.device)
        with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
            kept = kept_patches(q, k, self.config, patches, q.shape[3] ** -0.5)
            self.pairs += kept_pairs(kept, patches.order.counts, patches.order.counts)
        return nabla_attention(q, k, v, self.config, patches, backend=self.backend, kept=kept)
