"""What attention with block means costs in FLOPs, and what part of all pairs it attends to exactly. No torch here."""

from __future__ import annotations

import math

from slagen.attention.cost import ModelShape
from slagen.attention.mean.config import BlockMeanConfig, MeanConfig, SolConfig
from slagen.attention.selectors import score_flops


def expected_share(tau: float) -> float:
    """The part of a bell-shaped row of scores that is more than tau standard deviations above its mean."""
    return math.erfc(tau / math.sqrt(2)) / 2


def density(config: BlockMeanConfig, num_tokens: int) -> float:
    """The fraction of all pairs of blocks that is attended exactly; of `sol` an estimate, for bell-shaped scores."""
    rows, columns = config.num_blocks(num_tokens)
    if isinstance(config, MeanConfig):
        return config.num_kept(columns) / columns
    assert isinstance(config, SolConfig)
    forced = sum(len(config.forced(i, num_tokens)) for i in range(rows)) / (rows * columns)
    return forced + (1 - forced) * expected_share(config.tau)


def block_mean_flops(config: BlockMeanConfig, shape: ModelShape, num_tokens: int) -> int:
    """FLOPs of self-attention in one forward pass: scores of blocks, kept blocks, and 4 L N D for the block means."""
    rows, columns = config.num_blocks(num_tokens)
    if isinstance(config, MeanConfig):
        keys = float(min(num_tokens, config.num_kept(columns) * config.block_n))
    else:
        keys = density(config, num_tokens) * num_tokens
    scores = score_flops(getattr(config, "selector", "pooled"), rows, columns, 1)
    flops = scores + 4 * num_tokens * keys + 4 * num_tokens * columns
    return round(flops * shape.head_dim) * shape.num_heads * shape.num_layers
