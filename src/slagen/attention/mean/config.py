"""MeanConfig and SolConfig: which key blocks are attended exactly. No torch here."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import get_args

from slagen.attention.cubes import Order, order_option
from slagen.attention.selectors import Selector, selector_option
from slagen.attention.sla.config import BLOCK_SIZES, SLAConfig, check_choice, check_fraction
from slagen.errors import UsageError
from slagen.io.forms import shown
from slagen.settings import option

MAX_TAU = sys.float_info.max  # whole numbers beyond it are no floats


@dataclass(frozen=True, kw_only=True)
class BlockMeanConfig:
    """Into which blocks queries and keys are divided.

    Args:
        block_m, block_n: query rows and key columns in a block: 16, 32, 64 or 128.
        order: in which order tokens are divided into blocks; "cube" needs their grid.
    Raises: UsageError for another size or order.
    """

    block_m: int = 64
    block_n: int = 64
    order: Order = order_option()

    def __post_init__(self) -> None:
        check_choice("block_m", self.block_m, BLOCK_SIZES)
        check_choice("block_n", self.block_n, BLOCK_SIZES)
        check_choice("order", self.order, get_args(Order))

    def num_blocks(self, length: int) -> tuple[int, int]:
        """The numbers of query and key blocks (M, N) that cover `length` tokens; the last ones may be partial."""
        return math.ceil(length / self.block_m), math.ceil(length / self.block_n)


@dataclass(frozen=True, kw_only=True)
class MeanConfig(BlockMeanConfig):
    """Of every query block, the key blocks of highest score are attended exactly, as many as SLA would.

    Args:
        sparsity: fraction of key blocks that enter as their mean, in [0, 1). At least one block is attended exactly.
        selector: how key blocks are ranked, see `ranking.py`.
    Raises: UsageError if a value is out of range.
    """

    sparsity: float = 0.85
    selector: Selector = selector_option()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("selector", self.selector, get_args(Selector))
        check_fraction("sparsity", self.sparsity, "Try --sparsity 0.85.")

    @property
    def selection(self) -> SLAConfig:
        """The setting of SLA's block map that marks the same blocks."""
        return SLAConfig(sparsity=self.sparsity, block_m=self.block_m, block_n=self.block_n)

    def num_kept(self, num_key_blocks: int) -> int:
        """How many of the key blocks a query block attends to exactly: at least 1."""
        return self.selection.num_critical(num_key_blocks)


@dataclass(frozen=True, kw_only=True)
class SolConfig(BlockMeanConfig):
    """Of every query block, the key blocks whose score is far above the row's mean are attended exactly.

    Args:
        tau: how far, in standard deviations of the row's scores; any finite number. The blocks beside the query block
            are attended exactly whatever their score.
    Raises: UsageError if a value is out of range.
    """

    tau: float = option(
        1.0,
        "Attend exactly to key blocks whose score exceeds the mean score of their query block by more than this many "
        "standard deviations: 1 keeps about 16% of the blocks, 1.3 about 10%, 2 about 2%.",
        prompt_line=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.tau, int | float) or isinstance(self.tau, bool) or not abs(self.tau) <= MAX_TAU:
            raise UsageError(f"tau is {shown(self.tau)}, but must be a finite number. Try --tau 1.")

    def forced(self, i: int, length: int) -> range:
        """The key blocks that query block i always attends to exactly: those its tokens lie in, and one on each side.

        With blocks of one size these are the j with |i - j| <= 1.
        """
        first, last = i * self.block_m, min((i + 1) * self.block_m, length) - 1
        return range(max(0, first // self.block_n - 1), min(self.num_blocks(length)[1], last // self.block_n + 2))
