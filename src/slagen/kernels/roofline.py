"""How long the kernels of a call should take on one H200, from what they do and what it can do. Nothing is measured.

A kernel takes as long as the slowest of four: its products in the tensor cores, the instructions its warps issue, the
bytes from the second-level cache and those from memory; and each launch costs a little more.
"""

import math
from collections.abc import Iterable
from dataclasses import astuple, dataclass

from slagen.kernels.costs import Bounds, KernelCost
from slagen.kernels.launches import Launch

CARD, TARGET = "H200", "sm_90"
TENSOR_FLOPS = 790e12  # bfloat16, measured with a large matrix product
FP32_FLOPS = 67e12  # data sheet; PyTorch's float32 products do not use the tensor cores
MULTIPROCESSORS, SCHEDULERS = 132, 4
CLOCK = 1.755e9  # assumed: the data sheet's peak is at 1.83 GHz, long products run below that
L2_BYTES, DRAM_BYTES = 5.5e12, 4.3e12  # a second; the latter measured with a copy
LAUNCH_MS = 0.003


@dataclass(frozen=True)
class Call:
    """The sizes of an operator's call."""

    heads: int
    length: int
    head_dim: int
    blocks: int
    topk: int
    element_bytes: int


@dataclass(frozen=True)
class Work:
    """What all programs of a kernel do: rounds of main loops, floating-point operations, bytes read again from L2."""

    rounds: int = 0
    flops: float = 0.0
    again_bytes: float = 0.0


def _attend(call: Call, launch: Launch) -> Work:
    """K and V of every listed tile, and the state, come anew for every program."""
    tile_m, tile_n = launch.constants["TILE_M"], launch.constants["TILE_N"]
    rounds = launch.programs * call.topk * (launch.constants["BLOCK_N"] // tile_n)
    row = call.head_dim * call.element_bytes
    return Work(
        rounds,
        rounds * 4 * tile_m * tile_n * call.head_dim + launch.programs * 2 * tile_m * call.head_dim**2,
        rounds * 2 * tile_n * row + launch.programs * call.head_dim * row,
    )


def _key_states(call: Call, launch: Launch) -> Work:
    tile = launch.constants["TILE"]
    rounds = call.heads * call.blocks * (launch.constants["BLOCK"] // tile)
    return Work(rounds, rounds * 2 * tile * call.head_dim**2)


WORK = {"attend_kernel": _attend, "key_states_kernel": _key_states}  # others read and write their tensors once
PRODUCTS = ("aten.bmm", "aten.mm", "aten.addmm", "aten.baddbmm")


def estimate(call: Call, launches: list[tuple[Launch, KernelCost | None]]) -> dict[str, Bounds]:
    """Bounds of each kernel, in order.

    Args:
        launches: each with what its kernel costs on TARGET; None where that is not known.
    """
    found: dict[str, Bounds] = {}
    for launch, cost in launches:
        bounds, before = _bounds(call, launch, cost), found.get(launch.kernel)
        found[launch.kernel] = bounds if before is None else _sum(before, bounds)
    return found


def _sum(one: Bounds, other: Bounds) -> Bounds:
    return Bounds(*map(sum, zip(astuple(one), astuple(other), strict=True)))


def _bounds(call: Call, launch: Launch, cost: KernelCost | None) -> Bounds:
    once = _bytes(launch.read) + _bytes(launch.written)
    work = WORK[launch.kernel](call, launch) if launch.kernel in WORK else Work()
    peak, flops = TENSOR_FLOPS, work.flops
    if launch.kernel in PRODUCTS:
        left, output = launch.read[-2][0], launch.written[0][0]
        peak, flops = FP32_FLOPS, 2 * math.prod(output) * left[-1]
    instructions = 0.0
    if cost is not None and cost.row_instructions is not None:
        instructions = launch.programs * cost.row_instructions * cost.config["num_warps"]
    elif cost is not None:  # one round of the loop is among the instructions of each program
        rounds = max(0, work.rounds - launch.programs) * cost.round_instructions
        instructions = (launch.programs * cost.instructions + rounds) * cost.config["num_warps"]
    tensor = 1e3 * flops / peak
    issue = 1e3 * instructions / (SCHEDULERS * MULTIPROCESSORS * CLOCK)
    l2, dram = 1e3 * (once + work.again_bytes) / L2_BYTES, 1e3 * once / DRAM_BYTES
    return Bounds(1, tensor, issue, l2, dram, max(tensor, issue, l2, dram) + LAUNCH_MS)


def _bytes(tensors: Iterable[tuple[tuple[int, ...], int]]) -> int:
    return sum(math.prod(shape) * size for shape, size in tensors)
