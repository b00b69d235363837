"""What sparse-linear attention costs in FLOPs, and how many key blocks it keeps. No torch here."""

from __future__ import annotations

from typing import Any

from slagen.attention.cost import ModelShape
from slagen.attention.selectors import score_flops
from slagen.attention.sla.config import SLAConfig


def block_counts(config: SLAConfig, num_tokens: int) -> dict[str, int]:
    """Into how many blocks a sequence of `num_tokens` falls, and what becomes of the key blocks of each query block."""
    query_blocks, key_blocks = config.num_blocks(num_tokens)
    return {
        "query_blocks": query_blocks,
        "key_blocks": key_blocks,
        "critical": config.num_critical(key_blocks),
        "negligible": config.num_negligible(key_blocks),
        "marginal": config.num_marginal(key_blocks),
    }


def describe_blocks(config: SLAConfig, num_tokens: int) -> dict[str, Any]:
    """What a report says of the blocks: their counts, and the fractions of the key blocks."""
    counts = block_counts(config, num_tokens)
    fractions = {name: counts[name] / counts["key_blocks"] for name in ("critical", "negligible", "marginal")}
    return {**counts, "fractions": fractions}


def density(config: SLAConfig, num_tokens: int) -> float:
    """The fraction of the key blocks that is attended exactly."""
    key_blocks = config.num_blocks(num_tokens)[1]
    return config.num_critical(key_blocks) / key_blocks


def sla_attention_flops(
    shape: ModelShape, num_tokens: int, config: SLAConfig, *, sparse: bool = True, linear: bool = True
) -> int:
    """FLOPs of sparse-linear attention in one forward pass: block map, critical blocks, linear branch, projection."""
    query_blocks, key_blocks = config.num_blocks(num_tokens)
    dim = shape.head_dim
    chooses = sparse or config.linear_domain == "marginal"
    flops = score_flops(config.selector, query_blocks, key_blocks, dim) if chooses else 0
    if sparse:
        kept = min(num_tokens, config.num_critical(key_blocks) * config.block_n)
        flops += 4 * num_tokens * kept * dim
    if linear:
        flops += 4 * num_tokens * dim**2 + 2 * num_tokens * dim**2  # phi(K)^T V and phi(Q) H; proj_l
        if config.linear_domain == "marginal":
            flops += 2 * query_blocks * key_blocks * dim**2  # sums of the marginal blocks' states
    return flops * shape.num_heads * shape.num_layers
