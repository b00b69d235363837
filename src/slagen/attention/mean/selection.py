"""Which key blocks `mean` and `sol` attend to exactly.

The score of a pair of blocks is the dot product of its mean query and mean key, as in `sla/block_map.py`, in float32
(float64 for float64 input). `mean` keeps the highest of each row as SLA does, or ranks by
another selector of `ranking.py`. `sol` keeps those above mean + tau sigma
of their row, and the blocks beside the query block. Neither depends on what is subtracted from all keys, or on a factor
on all scores; for `sol` the mean key is subtracted, so that float32 resolves differences of scores where keys have
much in common. No gradient passes through the selection.

Source of the threshold: Sol-Attn, arXiv:2607.24027; sigma is that of the row's scores themselves, over its N blocks.
"""

import torch
from torch import Tensor

from slagen.attention.kept_pairs import kept_pairs as pairs_of
from slagen.attention.mean.config import MeanConfig, SolConfig
from slagen.attention.ranking import selector_scores
from slagen.attention.sla.block_map import CRITICAL, block_map, block_means, block_scores, block_tokens


def kept_blocks(
    q: Tensor, k: Tensor, config: MeanConfig | SolConfig, seeds: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Mark the key blocks that are attended exactly: (B, H, L, D) twice -> (B, H, M, N) bool, at least one in a row.

    seeds, scale: as in `selector_scores`; a scale of None is D ** -0.5.
    """
    if isinstance(config, SolConfig):
        return _above_threshold(q, k, config)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    scores = selector_scores(config, q, k, seeds, scale)
    scores = block_scores(q, k, config.selection) if scores is None else scores
    return block_map(scores, config.selection) == CRITICAL


def _above_threshold(q: Tensor, k: Tensor, config: SolConfig) -> Tensor:
    means = block_means(k.detach(), config.block_n)
    scores = block_means(q.detach(), config.block_m) @ (means - means.mean(2, keepdim=True)).mT
    scores = scores - scores.mean(-1, keepdim=True)
    kept = scores > config.tau * scores.std(-1, correction=0, keepdim=True)
    return kept | _forced(config, q.shape[2], q.device)


def _forced(config: SolConfig, length: int, device: torch.device) -> Tensor:
    """(M, N) bool: the key blocks that each query block attends to whatever their score, as `SolConfig.forced` says."""
    rows, columns = config.num_blocks(length)
    first = torch.arange(rows, device=device) * config.block_m
    last = (first + config.block_m).clamp(max=length) - 1
    j = torch.arange(columns, device=device)
    return (j >= (first // config.block_n - 1)[:, None]) & (j <= (last // config.block_n + 1)[:, None])


def kept_pairs(kept: Tensor, config: MeanConfig | SolConfig, length: int) -> Tensor:
    """How many query-key pairs are attended exactly, and how many there are: (B, H, M, N) bool -> (2,) int64."""
    queries, keys = (block_tokens(length, block, kept.device) for block in (config.block_m, config.block_n))
    return pairs_of(kept, queries, keys)
