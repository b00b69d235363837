"""Which key blocks each query block attends to, leaves to the linear branch, or skips.

The score of a pair of blocks is the dot product of its mean query and mean key, in float32 (float64 for float64
input). The paper's softmax, its 1 / sqrt(D), and subtracting the mean key all keep the ranking of a row, and only the
ranking is used. Equal scores rank by block index, lower first, and a nan ranks with infinity, so every backend, and
every run, selects the same blocks. No gradient passes through the selection.
"""

import torch
from torch import Tensor

from slagen.attention.sla.config import SLAConfig

CRITICAL, MARGINAL, NEGLIGIBLE = 1, 0, -1


def block_scores(q: Tensor, k: Tensor, config: SLAConfig) -> Tensor:
    """Score each query block against each key block: (B, H, L, D) twice -> (B, H, M, N)."""
    return scores_of_means(block_means(q.detach(), config.block_m), block_means(k.detach(), config.block_n))


def scores_of_means(q_means: Tensor, k_means: Tensor) -> Tensor:
    """Their dot products, (..., M, D) and (..., N, D) -> (..., M, N); nan becomes infinity, with which it ranks."""
    return (q_means @ k_means.mT).nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)


def block_map(scores: Tensor, config: SLAConfig) -> Tensor:
    """Class every block: (B, H, M, N) scores -> int8 CRITICAL, MARGINAL or NEGLIGIBLE."""
    num_key_blocks = scores.shape[-1]
    critical = highest(scores, config.num_critical(num_key_blocks))
    # The end of one and the same order: of equal scores the higher index is dropped first.
    negligible = highest(-scores.flip(-1), config.num_negligible(num_key_blocks)).flip(-1)
    return critical.to(torch.int8) - negligible.to(torch.int8)


def critical_indices(scores: Tensor, config: SLAConfig) -> Tensor:
    """List the critical blocks of each row, ascending: (B, H, M, N) scores -> kv_indices (B, H, M, topk) int64."""
    return highest_indices(scores, config.num_critical(scores.shape[-1]))


def highest_indices(scores: Tensor, count: int) -> Tensor:
    """List the `count` highest scores of each row, in ascending order of index: (..., N) -> (..., count) int64."""
    kept = highest(scores, count)
    return kept.flatten().nonzero().remainder(scores.shape[-1]).view(*scores.shape[:-1], count)


def block_means(x: Tensor, block: int) -> Tensor:
    """Mean over the tokens of each block, (B, H, L, D) -> (B, H, ceil(L / block), D); the last by its true count."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    num_whole, rest = divmod(x.shape[2], block)
    means = x[:, :, : num_whole * block].unflatten(2, (num_whole, block)).mean(3, dtype=dtype)
    if not rest:
        return means
    return torch.cat([means, x[:, :, -rest:].mean(2, keepdim=True, dtype=dtype)], dim=2)


def block_tokens(length: int, block: int, device: torch.device) -> Tensor:
    """How many tokens each block has, (ceil(length / block),) int64: the last may be partial."""
    return (length - torch.arange(0, length, block, device=device)).clamp(max=block)


def highest(scores: Tensor, count: int) -> Tensor:
    """Mark the `count` highest scores of each row; of equal ones at the border, those of lower index."""
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    border = scores.topk(count, dim=-1).values[..., -1:]
    above, equal = scores > border, scores == border
    vacant = count - above.sum(-1, keepdim=True)
    return above | (equal & (equal.cumsum(-1) <= vacant))
