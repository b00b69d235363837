"""The parts of a forward pass that methods have in common, each to be timed alone: see `Method.parts`."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from slagen.attention.cubes import Order
from slagen.attention.order import CubeOrder, cubes_of
from slagen.attention.protocol import Attend, Grid


def ordered(
    order: Order, grid: Grid | CubeOrder | None, q: Tensor, k: Tensor, v: Tensor
) -> tuple[dict[str, Attend], Tensor, Tensor, Tensor]:
    """Putting tokens in an order and back is a part, unless the order is raster; and q, k and v (B, H, L, D) in it.

    Args: grid: of the L tokens, or its cubes, which the order "cube" needs.
    """
    if order == "raster":
        return {}, q, k, v
    cubes = cubes_of(grid, q)
    q, k, v = (x.index_select(2, cubes.order) for x in (q, k, v))
    return {"order": lambda q, k, v: cubes.reordered(lambda q, k, v: q, q, k, v)}, q, k, v


def selected(
    select: Callable[[Tensor, Tensor], Tensor], attend: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    q: Tensor, k: Tensor, v: Tensor,
) -> dict[str, Attend]:  # fmt: skip
    """The block map, which `select` makes of q and k, and what attends to it.

    Args: q, k, v: (B, H, L, D), of which the block map is made that the second part takes.
    """
    kept = select(q, k)
    return {"block_map": lambda q, k, v: select(q, k), "fused": lambda q, k, v: attend(q, k, v, kept)}
