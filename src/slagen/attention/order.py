"""Tokens in cube order: the permutation of a grid's tokens, and cubes of 64 rows with true counts.

The cubes of a grid, 4 x 4 x 4 tokens or the flat 1 x 8 x 8, are numbered by frames, rows and columns, and so are the
tokens in each. A side of the grid that is no multiple of the cube's leaves ragged cubes at its far end. Two layouts
hold them:

    sequence  L tokens, nothing added: whole cubes first, then ragged ones, those of one shape together. Code that cuts
              a sequence into blocks of fixed size takes it as it is: of whole cubes, blocks of 64 are cubes, and blocks
              of 16 and 32 are one and two frames of a cube; of ragged cubes, a block joins some that are alike.
    slots     N * 64 rows, cube by cube: the tokens of a cube, then padding, which is not attended to and counts in no
              mean. Each block is one cube: as FastVideo defines VSA.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slagen.attention.cubes import CUBE, CUBE_TOKENS, Order, Sides, check_tokens
from slagen.attention.protocol import Grid, Inputs, StepContext

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class CubeOrder:
    """The cubes of one grid, on one device.

    Args:
        order: (L,) int64, which token in raster order stands at each place of the sequence.
        inverse: (L,) int64, the place in the sequence of each token in raster order.
        slots: (L,) int64, the row of each token in raster order among N * 64.
        counts: (N,) int64, the tokens of each cube, from 1 to 64.
        ragged: whether any holds fewer than 64.
    """

    order: Tensor
    inverse: Tensor
    slots: Tensor
    counts: Tensor
    ragged: bool

    def means(self, x: Tensor) -> Tensor:
        """The mean over the tokens of each cube, (..., L, D) -> (..., N, D) float32, or float64. Differentiable."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        return to_slots(x, self.slots, len(self.counts)).sum(-2, dtype=dtype) / self.counts[:, None]

    def reordered(self, attend: Attend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend in cube order: q, k, v and the result (B, H, L, D) in raster order; `attend` gets the sequence."""
        q, k, v = (_rows(x, self.order) for x in (q, k, v))
        return _rows(attend(q, k, v), self.inverse)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x (B, H, L, D) in another order, with the same layout in memory; whole tokens where their heads lie
    together, as a model has them, which is many times faster."""
    if x.stride(1) < x.stride(2):
        return x.transpose(1, 2).index_select(1, index).transpose(1, 2)
    return x.index_select(2, index)


def to_slots(x: Tensor, slots: Tensor, num_cubes: int) -> Tensor:
    """(..., L, D) in raster order -> (..., N, 64, D), zeros for padding. Differentiable."""
    rows = x.new_zeros(*x.shape[:-2], num_cubes * CUBE_TOKENS, x.shape[-1])
    return rows.index_copy(-2, slots, x).unflatten(-2, (-1, CUBE_TOKENS))


def from_slots(cubes: Tensor, slots: Tensor) -> Tensor:
    """(..., N, 64, D) -> (..., L, D) in raster order, without the padding. Differentiable."""
    return cubes.flatten(-3, -2).index_select(-2, slots)


@functools.lru_cache(maxsize=16)
def cube_order(grid: Grid, device: torch.device, sides: Sides = CUBE) -> CubeOrder:
    """The cubes of a grid. Made once for each grid, device and kind: callers in compiled code get it from outside."""
    with torch.inference_mode(False):
        sizes = (grid.num_frames, grid.height, grid.width)
        places = torch.meshgrid(*(torch.arange(size, device=device) for size in sizes), indexing="ij")
        number, inside = torch.zeros_like(places[0]), torch.zeros_like(places[0])
        shape = torch.zeros_like(places[0])  # of the cube, as one number
        for place, size, side in zip(places, sizes, sides, strict=True):
            first = place // side * side
            extent = (size - first).clamp(max=side)
            number = number * -(-size // side) + place // side
            inside = inside * extent + place - first
            shape = shape * (side + 1) + extent
        number, inside, shape = (x.flatten() for x in (number, inside, shape))
        slots = number * CUBE_TOKENS + inside
        in_slots = slots.argsort()
        order = in_slots[shape[in_slots].argsort(descending=True, stable=True)]
        counts = number.bincount()
        return CubeOrder(order, order.argsort(), slots, counts, bool((counts < CUBE_TOKENS).any()))


def cubes_of(grid: Grid | CubeOrder | None, q: Tensor) -> CubeOrder:
    """The cubes of the tokens of q (B, H, L, D), on its device. Raises ValueError unless they are so many."""
    cubes = grid if isinstance(grid, CubeOrder) else cube_order(check_tokens(grid, q.shape[2]), q.device)
    if len(cubes.slots) != q.shape[2]:
        raise ValueError(
            f"the grid of cubes has {len(cubes.slots)} tokens, but q has {q.shape[2]}. Give the grid (latent frames, "
            "rows, columns) of the tokens of q."
        )
    return cubes


def in_order(order: Order, grid: Grid | CubeOrder | None, attend: Attend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend in an order: q, k, v and the result (B, H, L, D) are in raster order; `attend` gets them in that order.

    Raises: ValueError where the order is "cube", and the grid is unknown or not one of L tokens.
    """
    return attend(q, k, v) if order == "raster" else cubes_of(grid, q).reordered(attend, q, k, v)


class CubesOfPass(nn.Module):
    """A module that looks up the cubes of each pass outside compiled code, which then reads them as tensors and is not
    compiled again. Its config may have an `order`; without one, it always asks for the cubes.
    """

    config: Any
    _cubes: CubeOrder | None

    def follow_cubes(self, device: torch.device | str | None) -> None:
        """Call this in `__init__`, with the device that it is made on; None is torch's default."""
        self.register_buffer("_here", torch.empty(0, device=device), persistent=False)
        self._cubes = None

    def begin_pass(self, context: StepContext) -> None:
        """A forward pass begins."""
        if context.grid is not None and getattr(self.config, "order", "cube") == "cube":
            self._cubes = cube_order(context.grid, self._here.device)  # type: ignore[arg-type]

    def cubes_in(self, inputs: Inputs | None, q: Tensor) -> Grid | CubeOrder | None:
        """The cubes of this pass, or where they are not those of q (B, H, L, D) the grid of the inputs."""
        cubes = self._cubes
        if cubes is None or cubes.slots.device != q.device or len(cubes.slots) != q.shape[2]:
            return None if inputs is None else inputs.context.grid
        return cubes
