"""A clip's tokens in cubes of 64: how many there are, and whether a sequence is a grid's. No torch here."""

from __future__ import annotations

import math
from typing import Any, Literal

from slagen.attention.protocol import Grid
from slagen.settings import option

Order = Literal["raster", "cube"]

CUBE_TOKENS = 64
CUBE = (4, 4, 4)  # latent frames, rows and columns of a cube
PATCH = (1, 8, 8)  # and of a flat one, within a frame

Sides = tuple[int, int, int]


def order_option() -> Any:
    """The field `order` of a method's config: in which order tokens are divided into blocks."""
    help = "Order in which tokens are grouped into blocks: raster (row by row), or cube (in cubes of 4x4x4 tokens)."
    return option("raster", help, prompt_line=True, later=True)


def note_of_order(order: Order) -> str:
    """What a note on a clip adds for its order; empty for raster."""
    return "" if order == "raster" else ", tokens in cube order"


def cubes_along(grid: Grid, sides: Sides = CUBE) -> Sides:
    """How many cubes cover a grid along its frames, rows and columns."""
    lengths = (grid.num_frames, grid.height, grid.width)
    return tuple(-(-length // side) for length, side in zip(lengths, sides, strict=True))  # type: ignore[return-value]


def num_cubes(grid: Grid, sides: Sides = CUBE) -> int:
    """N, the cubes that cover a grid; those at its far ends hold fewer tokens where a side does not divide it."""
    return math.prod(cubes_along(grid, sides))


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
            f"the grid of the {num_tokens} tokens is unknown. Give the numbers of frames, rows and columns."
        )
    if grid.num_tokens != num_tokens or min(grid.num_frames, grid.height, grid.width) < 1:
        sizes = f"{grid.num_frames} x {grid.height} x {grid.width}"
        raise ValueError(
            f"a grid of {sizes} has {grid.num_tokens} tokens, but the sequence has {num_tokens}. Give the numbers of "
            "frames, rows and columns of this sequence."
        )
    return grid
