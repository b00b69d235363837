"""What Radial Attention costs in FLOPs, and what part of all pairs it attends to: both exact."""

from __future__ import annotations

from slagen.attention.cost import ModelShape, dense_attention_flops
from slagen.attention.protocol import Grid
from slagen.attention.radial.config import RadialConfig


def density(config: RadialConfig, grid: Grid) -> float:
    """The fraction of all query-key pairs that is attended to."""
    import torch

    from slagen.attention.radial.mask import radial_mask

    kept, total = radial_mask(config, grid, torch.device("cpu")).pairs.tolist()
    return float(kept / total)


def radial_flops(config: RadialConfig, shape: ModelShape, grid: Grid) -> int:
    """FLOPs of one forward pass of one sample: the pairs attended to. The mask is made once, and counts for nothing."""
    return round(dense_attention_flops(shape, grid.num_tokens) * density(config, grid))
