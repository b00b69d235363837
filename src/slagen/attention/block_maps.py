"""Which key blocks a layer attends to exactly, as a map over its tokens: for pictures and measurements."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slagen.attention.cubes import Order
from slagen.attention.order import CubeOrder, cubes_of
from slagen.attention.protocol import Grid


@dataclass(frozen=True, eq=False)
class BlockMap:
    """What becomes of each key block for each query block.

    Args:
        classes: (B, H, M, N) int8, CRITICAL, MARGINAL or NEGLIGIBLE of `sla/block_map.py`; of methods without the last,
            all that is not attended exactly is MARGINAL.
        query_blocks, key_blocks: (L,) int64, the block of each token, which are in raster order.
    """

    classes: Tensor
    query_blocks: Tensor
    key_blocks: Tensor


def map_in_order(
    config: Any, order: Order, grid: Grid | CubeOrder | None, q: Tensor, k: Tensor,
    classify: Callable[[Tensor, Tensor], Tensor],
) -> BlockMap:  # fmt: skip
    """The map of blocks of `config.block_m` queries and `config.block_n` keys that are cut from tokens in an order.

    Args:
        q, k: (B, H, L, D) in raster order; `classify` gets them in that order. grid: as for `in_order`.
    """
    place = torch.arange(q.shape[2], device=q.device)
    if order == "cube":
        cubes = cubes_of(grid, q)
        q, k, place = q.index_select(2, cubes.order), k.index_select(2, cubes.order), cubes.inverse
    return BlockMap(classify(q, k), place // config.block_m, place // config.block_n)
