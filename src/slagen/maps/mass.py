"""How the softmax mass of dense attention lies over blocks of keys, a few query rows at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from slagen.attention.block_maps import BlockMap
from slagen.attention.sla.block_map import CRITICAL

ROWS = 256  # query rows at a time: their scores are the largest tensor


def block_mass(q: Tensor, k: Tensor, query_blocks: Tensor, key_blocks: Tensor) -> Tensor:
    """The mean share of its row's softmax that each query block gives to each key block.

    Args:
        q, k: (L, D) of one head, any floating dtype, computed in float32.
        query_blocks, key_blocks: (L,), as in `BlockMap`.
    Returns: (M, N) float32; each row sums to 1.
    """
    q, k = q.float(), k.float()
    rows, columns = int(query_blocks.max()) + 1, int(key_blocks.max()) + 1
    mass = q.new_zeros(rows, columns)
    for first in range(0, len(q), ROWS):
        part = slice(first, first + ROWS)
        mass.index_add_(0, query_blocks[part], _row_mass(q[part], k, key_blocks, columns))
    return mass / query_blocks.bincount(minlength=rows)[:, None]


def _row_mass(q: Tensor, k: Tensor, key_blocks: Tensor, columns: int) -> Tensor:
    weights = torch.softmax(q @ k.mT * q.shape[1] ** -0.5, -1)
    return q.new_zeros(len(q), columns).index_add_(1, key_blocks, weights)


def query_weights(q: Tensor, k: Tensor, token: int) -> Tensor:
    """The softmax of one query over all keys: (L, D) twice -> (L,) float32."""
    return torch.softmax(k.float() @ q[token].float() * q.shape[1] ** -0.5, 0)


def summarise(mass: Tensor, found: BlockMap, head: int) -> dict[str, float]:
    """What the kept blocks hold, over all query tokens.

    Returns: `density`, the fraction of query-key pairs that is attended exactly; `kept_mass`, the share of the softmax
        on these; `best_mass`, what as many blocks of each row would hold if they were those of most mass.
    """
    kept = found.classes[0, head] == CRITICAL
    queries = found.query_blocks.bincount(minlength=kept.shape[0]).double()
    keys = found.key_blocks.bincount(minlength=kept.shape[1]).double()
    total = queries.sum()
    ranked = mass.double().sort(-1, descending=True).values
    counted = torch.arange(kept.shape[1], device=kept.device) < kept.sum(-1, keepdim=True)
    return {
        "density": float((kept * keys).sum(-1) @ queries / (total * keys.sum())),
        "kept_mass": float((mass.double() * kept).sum(-1) @ queries / total),
        "best_mass": float((ranked * counted).sum(-1) @ queries / total),
    }


def best_curve(mass: Tensor, query_blocks: Tensor) -> Tensor:
    """The mass that the n key blocks of most mass of each row hold, over all tokens: (N + 1,) float64, n from 0."""
    queries = query_blocks.bincount(minlength=mass.shape[0]).double()
    held = mass.double().sort(-1, descending=True).values.cumsum(-1)
    return torch.cat([held.new_zeros(1), queries @ held / queries.sum()])
