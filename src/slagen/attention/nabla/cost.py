"""What NABLA costs in FLOPs, and at most what part of all pairs it attends to. No torch here."""

from __future__ import annotations

import math

from slagen.attention.cost import ModelShape
from slagen.attention.cubes import PATCH, cubes_along, num_cubes
from slagen.attention.nabla.config import NablaConfig
from slagen.attention.protocol import Grid


def keeps_all(config: NablaConfig, grid: Grid) -> bool:
    """Whether every patch attends to all patches, whatever the inputs."""
    counts = cubes_along(grid, PATCH)
    if config.reach is not None and all(far >= count - 1 for far, count in zip(config.reach, counts, strict=True)):
        return True
    return config.top_p == 1 or math.prod(counts) == 1


def tile_share(config: NablaConfig, grid: Grid) -> float:
    """The fraction of all query-key pairs that lie within the sliding tile."""
    if config.reach is None:
        return 0.0
    lengths, shares = (grid.num_frames, grid.height, grid.width), []
    for length, side, reach in zip(lengths, PATCH, config.reach, strict=True):
        ends = [min(first + side, length) for first in range(0, length, side)]
        pairs = sum(
            (end - i * side) * (ends[min(i + reach, len(ends) - 1)] - max(0, i - reach) * side)
            for i, end in enumerate(ends)
        )
        shares.append(pairs / length**2)
    return math.prod(shares)


def density_bound(config: NablaConfig, grid: Grid) -> float:
    """About the largest fraction of all query-key pairs: of an even map, whose rows keep up to a patch more than
    top_p, and with all of the sliding tile beside that."""
    lengths = (grid.num_frames, grid.height, grid.width)
    patch = math.prod(min(side, length) for side, length in zip(PATCH, lengths, strict=True))
    return min(1.0, config.top_p + patch / grid.num_tokens + tile_share(config, grid))


def nabla_flops(config: NablaConfig, shape: ModelShape, grid: Grid) -> int:
    """FLOPs of one forward pass of one sample at most: scores of the patches, and the patches kept."""
    flops = 2 * num_cubes(grid, PATCH) ** 2 + 4 * grid.num_tokens**2 * density_bound(config, grid)
    return round(flops * shape.head_dim) * shape.num_heads * shape.num_layers
