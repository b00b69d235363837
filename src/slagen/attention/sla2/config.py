"""SLA2Config: how SLA2 divides its work between the exact and the linear branch. No torch here."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Literal, get_args

from slagen.attention.cubes import Order, order_option
from slagen.attention.sla.config import SLAConfig, check_choice
from slagen.errors import UsageError
from slagen.io.forms import shown
from slagen.settings import option

Mixing = Literal["learned", "mass"]
LowBit = Literal["none", "int8"]

COARSE = 0.05  # of the largest output: in int8, numbers round to either side where sums differ in their last digit
MAX_MIXING_BLOCKS = 65536  # what a damaged file may ask for


@dataclass(frozen=True)
class SLA2Config:
    """How SLA2 divides its work.

    With N key blocks, every query block attends exactly to the `sla.num_critical(N)` that its router scores highest;
    the linear branch sums over all others. The head of `reference.py` says what the paper leaves open.

    Args:
        sparsity: fraction of key blocks that is not attended exactly, in [0, 1). At least one block always is.
        router_tau: temperature of the soft top-k, above 0; only training of the router uses it.
        smooth_keys: subtract the mean key before pooling and before the linear branch's feature map.
        mixing: what weighs the branches: "learned" logits, or "mass", their estimated shares of the softmax.
        mixing_blocks: learned logits along the query blocks, for each head; 1 is one for all query blocks.
        block_m, block_n: query rows and key columns in a block: 16, 32, 64 or 128.
        order: in which order tokens are divided into blocks; "cube" needs their grid.
        low_bit: "int8" rounds queries, keys, values and weights of the exact branch to 8 bits, block by block; the
            gradients are those without it.
    Raises: UsageError if a value is out of range.
    """

    sparsity: float = 0.95
    router_tau: float = option(
        0.1,
        "Temperature of the soft top-k in router training; a lower value is closer to the hard top-k used afterwards.",
        training=True,
    )
    smooth_keys: bool = option(True, "Subtract the mean key from all keys, in the router and in the linear branch.")
    mixing: Mixing = option(
        "learned", "Weight of the exact branch: learned, or mass (its estimated share of the softmax)."
    )
    mixing_blocks: int = option(
        1, "Number of learned mixing weights per head, spread over the query blocks; 1 means one weight for all blocks."
    )
    block_m: int = 128
    block_n: int = 64
    order: Order = order_option()
    low_bit: LowBit = option(
        "none",
        "Arithmetic of the exact attention: int8 (its gradients ignore the rounding), or none for full precision.",
        later=True,
    )

    def __post_init__(self) -> None:
        _ = self.sla  # which checks sparsity and block sizes
        check_choice("low_bit", self.low_bit, get_args(LowBit))
        check_choice("order", self.order, get_args(Order))
        tau = self.router_tau
        if not isinstance(tau, int | float) or isinstance(tau, bool) or not 0 < tau <= sys.float_info.max:
            raise UsageError(f"router_tau is {shown(tau)}, but must be a finite number above 0. Try --router-tau 0.1.")
        if not isinstance(self.smooth_keys, bool):
            raise UsageError(f"smooth_keys is {shown(self.smooth_keys)}, but must be true or false.")
        if self.mixing not in get_args(Mixing):
            choices = " or ".join(get_args(Mixing))
            raise UsageError(f"mixing is {shown(self.mixing)}, but must be {choices}. Try --mixing learned.")
        count = self.mixing_blocks
        if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= MAX_MIXING_BLOCKS:
            raise UsageError(
                f"mixing_blocks is {shown(count)}, but must be a whole number from 1 to {MAX_MIXING_BLOCKS}. "
                "Try --mixing-blocks 1."
            )

    @property
    def sla(self) -> SLAConfig:
        """SLA with the same blocks and counts, whose linear branch sums over the complement of the kept blocks."""
        return SLAConfig(sparsity=self.sparsity, linear_domain="marginal", block_m=self.block_m, block_n=self.block_n)
