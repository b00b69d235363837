"""A clip's tokens in cubes of 4 x 4 x 4: how many there are, and whether a sequence is a grid's. No torch here."""

from __future__ import annotations

import math
from typing import Literal

from slagen.attention.protocol import Grid

Order = Literal["raster", "cube"]

EDGE = 4  # latent frames, rows and columns of a cube
CUBE_TOKENS = EDGE**3


def num_cubes(grid: Grid) -> int:
    """N, the cubes that cover a grid; those at its far ends hold fewer tokens where a side is no multiple of 4."""
    return -(-grid.num_frames // EDGE) * -(-grid.height // EDGE) * -(-grid.width // EDGE)


def compact_grid(num_tokens: int) -> Grid:
    """Of all grids with so many tokens one that falls into the fewest cubes, for a sequence of no known arrangement."""

    def divisors(number: int) -> list[int]:
        small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
        return sorted({*small, *(number // n for n in small)})

    found = [Grid(t, h, num_tokens // t // h) for t in divisors(num_tokens) for h in divisors(num_tokens // t)]
    return min(found, key=lambda grid: (num_cubes(grid), max(grid.num_frames, grid.height, grid.width)))


def check_tokens(grid: Grid | None, num_tokens: int) -> Grid:
    """The grid of a sequence. Raises ValueError unless it holds as many tokens."""
    if grid is None:
        raise ValueError(
            f"the grid of the {num_tokens} tokens is unknown, so they cannot be divided into cubes. Give the numbers "
            "of "
            "frames, rows and columns."
        )
    if grid.num_tokens != num_tokens or min(grid.num_frames, grid.height, grid.width) < 1:
        sizes = f"{grid.num_frames} x {grid.height} x {grid.width}"
        raise ValueError(
            f"a grid of {sizes} has {grid.num_tokens} tokens, but the sequence has {num_tokens}. Give the numbers of "
            "frames, rows and columns of this sequence."
        )
    return grid
