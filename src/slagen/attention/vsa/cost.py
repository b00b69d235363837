"""What Video Sparse Attention costs in FLOPs. No torch here."""

from __future__ import annotations

from slagen.attention.cost import ModelShape
from slagen.attention.cubes import num_cubes
from slagen.attention.protocol import Grid
from slagen.attention.vsa.config import VSAConfig


def vsa_flops(config: VSAConfig, shape: ModelShape, grid: Grid) -> int:
    """FLOPs of one forward pass of one sample: scores of the cubes, the cubes kept, and with a gate the coarse branch
    and the gate's linear layer. Padding and the means count for nothing."""
    cubes, length, dim = num_cubes(grid), grid.num_tokens, shape.head_dim
    kept = config.num_kept(cubes) / cubes  # of the tokens, on average over the cubes
    flops = 2 * cubes**2 * dim + round(4 * length**2 * kept * dim)
    if config.gate:
        flops += 2 * cubes**2 * dim + 2 * length * dim + 2 * length * dim**2 * shape.num_heads
    return flops * shape.num_heads * shape.num_layers
