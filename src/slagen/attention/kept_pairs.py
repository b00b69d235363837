"""Layers that count the query-key pairs that they attend to exactly, and those whose blocks depend on the grid."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from slagen.attention.cubes import check_tokens
from slagen.attention.protocol import Grid, Inputs, StepContext


class PairCounter(nn.Module):
    """A module that counts pairs for the report.

    Args:
        device: where it will run; None is the CPU.
    """

    pairs: Tensor

    def __init__(self, device: torch.device | str | None = None) -> None:
        super().__init__()
        # Query-key pairs attended exactly, and all, since they were last asked for: whole numbers, for no cast of a
        # module's numbers may change them, and counted where they are, for to fetch them would wait for the device.
        self.register_buffer("pairs", torch.zeros(2, dtype=torch.int64, device=device), persistent=False)

    def take_density(self) -> float | None:
        """The fraction of all query-key pairs attended exactly since the last call of this; None before any."""
        kept, total = self.pairs.tolist()
        self.pairs.zero_()
        return kept / total if total else None


class GridLayer(PairCounter):
    """A layer that looks up blocks of the grid of each pass outside compiled code, which then reads them as tensors and
    is not compiled again.
    """

    _found: Any = None

    def blocks_of(self, grid: Grid, device: torch.device) -> Any:
        """Its blocks of a grid, with `num_tokens` and `device`; made once for each."""
        raise NotImplementedError

    def begin_pass(self, context: StepContext) -> None:
        """A forward pass begins."""
        if context.grid is not None:
            self._found = self.blocks_of(context.grid, self.pairs.device)

    def blocks_in(self, inputs: Inputs, q: Tensor) -> Any:
        """Those of this pass, or where they are not of q (B, H, L, D) those of the grid of the inputs.

        Raises: ValueError where that is unknown or not one of L tokens.
        """
        found = self._found
        if found is None or found.device != q.device or found.num_tokens != q.shape[2]:
            return self.blocks_of(check_tokens(inputs.context.grid, q.shape[2]), q.device)
        return found


def kept_pairs(kept: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    """How many query-key pairs are attended exactly, and how many there are, (2,) int64.

    Args:
        kept: (B, H, M, N) bool. queries, keys: (M,) and (N,) int64, the tokens of each block.
    """
    exact = (kept.sum((0, 1)) * queries[:, None] * keys).sum()
    return torch.stack([exact, kept.shape[0] * kept.shape[1] * queries.sum() * keys.sum()])
