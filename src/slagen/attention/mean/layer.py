"""Attention with block means as a layer of a transformer, which counts the pairs that it attends to exactly."""

from __future__ import annotations

import torch
from torch import Tensor

from slagen.attention.mean.config import MeanConfig, SolConfig
from slagen.attention.mean.functional import block_mean_attention
from slagen.attention.mean.selection import kept_pairs
from slagen.attention.order import CubesOfPass
from slagen.attention.protocol import Inputs
from slagen.attention.sla.config import Backend


class BlockMeanAttention(CubesOfPass):
    """`mean` or `sol` in one layer. It has no parameters.

    Args:
        config: which blocks are attended exactly.
        backend: as in `block_mean_attention`.
        device: where it will run; None is the CPU.
    """

    pairs: Tensor

    def __init__(
        self,
        config: MeanConfig | SolConfig,
        backend: Backend = "auto",
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.config, self.backend = config, backend
        self.follow_cubes(device)
        # Query-key pairs attended exactly, and all, since they were last asked for: whole numbers, for no cast of a
        # module's numbers may change them, and counted where they are, for to fetch them would wait for the device.
        self.register_buffer("pairs", torch.zeros(2, dtype=torch.int64, device=device), persistent=False)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs | None = None) -> Tensor:
        """Attend: q, k, v (B, H, L, D) -> o (B, H, L, D).

        Raises: ValueError where tokens are in cube order, and the grid is unknown or not one of L tokens.
        """

        def count(kept: Tensor) -> None:
            with torch.no_grad():
                self.pairs += kept_pairs(kept, self.config, q.shape[2])

        grid = self.cubes_in(inputs, q)
        return block_mean_attention(q, k, v, self.config, backend=self.backend, grid=grid, on_kept=count)

    def take_density(self) -> float | None:
        """The fraction of all query-key pairs attended exactly since the last call of this; None before any."""
        kept, total = self.pairs.tolist()
        self.pairs.zero_()
        return kept / total if total else None
