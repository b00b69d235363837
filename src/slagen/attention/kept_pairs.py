"""A layer that counts the query-key pairs that it attends to exactly, and what it looks up of a clip's grid."""

from __future__ import annotations

import torch
from torch import Tensor, nn


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


def kept_pairs(kept: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    """How many query-key pairs are attended exactly, and how many there are, (2,) int64.

    Args:
        kept: (B, H, M, N) bool. queries, keys: (M,) and (N,) int64, the tokens of each block.
    """
    exact = (kept.sum((0, 1)) * queries[:, None] * keys).sum()
    return torch.stack([exact, kept.shape[0] * kept.shape[1] * queries.sum() * keys.sum()])
