"""Which tile, warps and stages each kernel runs with, by what a card has, not by its name.

The table is read by the shared memory that one program may use (and so by compute capability: 99 KiB on sm_86, sm_89
and sm_120, 163 KiB on sm_80, 227 KiB on sm_90 and sm_100), by the bytes of a row, D times the size of an element, and
by whether products are summed in tensor memory, which only sm_100 has.
Entries of a kernel go from the fastest to the smallest; a card that can not run one takes the next. What was found out
about them lies in one `Choices`, which `using` replaces for a while.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor


@dataclass(frozen=True)
class Tiles:
    """Query rows and key columns that a program holds at a time, warps, and stages of the software pipeline."""

    m: int
    n: int
    warps: int
    stages: int

    def within(self, block_m: int, block_n: int) -> "Tiles":
        """The same, no larger than a block."""
        return replace(self, m=min(self.m, block_m), n=min(self.n, block_n))


KIB = 1024
HOPPER = 200 * KIB  # shared memory by which sm_90 and sm_100 differ from the others

TENSOR_MEMORY = "tensor memory"
Entry = tuple[int, int, Tiles] | tuple[int, int, Tiles, str]
Table = dict[str, list[Entry]]

# For each kernel: bytes of a row at most, shared memory at least, tiles, and TENSOR_MEMORY where only with it. Chosen
# by what ptxas reports, which `slagen doctor --kernels` shows. Up to 256 bytes a row nothing spills, and attend has
# loads in flight during the maths and, with 64 rows, two programs on a multiprocessor of sm_90; mma.sync needs the
# registers of eight warps. Above (float32 of 128, any of 256) some spill, and few cards hold the states of 256 at all.
# Not yet timed on a card; scripts/gpu.py sweeps them.
TABLE: Table = {
    "attend": [
        (128, 0, Tiles(128, 64, 8, 3)),
        (128, HOPPER, Tiles(64, 64, 4, 3)),
        (128, 0, Tiles(64, 64, 8, 3)),
        (256, HOPPER, Tiles(128, 32, 8, 4), TENSOR_MEMORY),
        (256, HOPPER, Tiles(64, 32, 4, 4), TENSOR_MEMORY),
        (256, 160 * KIB, Tiles(128, 64, 8, 3)),
        (256, HOPPER, Tiles(64, 64, 4, 3)),
        (256, 0, Tiles(64, 64, 8, 3)),
        (256, 0, Tiles(64, 64, 8, 2)),
        (512, 0, Tiles(32, 32, 8, 1)),
        (1024, 0, Tiles(16, 16, 4, 1)),
    ],
    "states": [
        (128, 0, Tiles(64, 64, 8, 3)),
        (256, 160 * KIB, Tiles(64, 64, 8, 3)),
        (256, 0, Tiles(32, 32, 8, 3)),
        (256, 0, Tiles(32, 32, 8, 2)),
        (512, 0, Tiles(16, 16, 16, 1)),
        (1024, 0, Tiles(16, 16, 16, 1)),
    ],
    "dq": [
        (128, HOPPER, Tiles(64, 64, 4, 3)),
        (128, 0, Tiles(64, 32, 8, 3)),
        (128, 0, Tiles(64, 32, 8, 2)),
        (256, HOPPER, Tiles(64, 64, 4, 2)),
        (256, 160 * KIB, Tiles(64, 64, 8, 3)),
        (256, 0, Tiles(64, 32, 8, 3)),
        (256, 0, Tiles(64, 32, 8, 2)),
        (512, 0, Tiles(32, 32, 8, 1)),
        (1024, 0, Tiles(16, 16, 4, 1)),
    ],
    "dkv": [
        (128, 160 * KIB, Tiles(64, 64, 8, 3)),
        (128, 0, Tiles(64, 32, 8, 3)),
        (128, 0, Tiles(64, 32, 8, 2)),
        (256, HOPPER, Tiles(64, 64, 8, 3)),
        (256, 0, Tiles(64, 32, 8, 3)),
        (256, 0, Tiles(64, 32, 8, 2)),
        (512, 0, Tiles(32, 32, 8, 1)),
        (1024, 0, Tiles(16, 16, 4, 1)),
    ],
}
SQUARE = ("states",)  # kernels that run once over blocks of keys and once over blocks of queries


class Choices:
    """Which tiles of a table run for each kind of tensor, which of them were verified, and which gave way.

    Args:
        table: for each kernel, entries as in TABLE.
    """

    def __init__(self, table: Table = TABLE) -> None:
        self.table = table
        self.verified: dict[Any, tuple[Tiles, ...]] = {}  # kind of call -> tiles that attention/fused.py found right
        self.latest: str | None = None  # the kernel that asked last: its launch is what fails next
        self._steps: dict[tuple[str, torch.device, int], int] = {}  # how far down its entries a kernel had to go
        self._tiles: dict[Any, Tiles] = {}
        self._running: dict[Any, tuple[Tiles, ...]] = {}

    def tiles(self, kernel: str, x: Tensor, block_m: int, block_n: int) -> Tiles:
        """The tiles of a kernel for (B, H, L, D) tensors like x, no larger than a block. Call it before the launch."""
        self.latest = kernel
        key = kernel, x.device, _row_bytes(x), block_m, block_n
        if key not in self._tiles:
            found = entries(kernel, key[2], shared_memory(x.device), tensor_memory(x.device), self.table)
            self._tiles[key] = choose(found, block_m, block_n, self._steps.get(key[:3], 0))
        return self._tiles[key]

    def running(self, x: Tensor, block_m: int, block_n: int) -> tuple[Tiles, ...]:
        """The tiles of every kernel for tensors like x, in the table's order."""
        key = x.device, _row_bytes(x), block_m, block_n
        if key not in self._running:
            self._running[key] = tuple(tile for kernel in self.table for tile in self._of(kernel, x, block_m, block_n))
        return self._running[key]

    def demote(self, x: Tensor, block_m: int, block_n: int, kernel: str | None = None) -> bool:
        """Go down to the next smaller tiles for tensors like x, of one kernel or of all; False where there are none."""
        before = self.running(x, block_m, block_n)
        for name in self.table if kernel is None else [kernel]:
            place, tiles = (name, x.device, _row_bytes(x)), self._of(name, x, block_m, block_n)
            steps = self._steps.get(place, 0)
            self._steps[place] = steps + 1
            self._tiles.clear()
            if self._of(name, x, block_m, block_n) == tiles:  # no smaller one, but blocks of another size may have
                self._steps[place] = steps
        self._tiles.clear()
        self._running.clear()
        return self.running(x, block_m, block_n) != before

    def _of(self, kernel: str, x: Tensor, block_m: int, block_n: int) -> tuple[Tiles, ...]:
        blocks = [(block_n, block_n), (block_m, block_m)] if kernel in SQUARE else [(block_m, block_n)]
        return tuple(self.tiles(kernel, x, *sizes) for sizes in blocks)

    def with_tile(self, kernel: str, tile: Tiles) -> "Choices":
        """The same but for one kernel, which has this one tile; nothing of it is verified."""
        other = Choices({**self.table, kernel: [(1 << 30, 0, tile)]})
        other._steps = {place: steps for place, steps in self._steps.items() if place[0] != kernel}
        return other


_in_use = [Choices()]


def current() -> Choices:
    """The choices in use."""
    return _in_use[-1]


@contextmanager
def using(choices: Choices) -> Iterator[Choices]:
    """Run with other choices for the length of the block, in every thread.

    Autograd runs a backward on CUDA in threads of its own, which would not see a ContextVar of their caller.
    """
    _in_use.append(choices)
    try:
        yield choices
    finally:
        del _in_use[max(i for i, entered in enumerate(_in_use) if entered is choices)]


def interpreting() -> bool:
    """Whether Triton runs in its interpreter, on CPU tensors."""
    return bool(triton.knobs.runtime.interpret)


def entries(
    kernel: str, row_bytes: int, shared_bytes: int, tensor_memory: bool = False, table: Table = TABLE
) -> list[Tiles]:
    """The configurations of a kernel that should fit, the fastest first."""
    found = [
        tile
        for most, needed, tile, *only in table[kernel]
        if row_bytes <= most and shared_bytes >= needed and (tensor_memory or not only)
    ]
    if not found:
        raise ValueError(f"the kernel {kernel} has no configuration for rows of {row_bytes} bytes")
    return found


def tiles(kernel: str, x: Tensor, block_m: int, block_n: int) -> Tiles:
    """The configuration in use for (B, H, L, D) tensors like x, no larger than a block."""
    return current().tiles(kernel, x, block_m, block_n)


def choose(found: list[Tiles], block_m: int, block_n: int, steps_down: int = 0) -> Tiles:
    """The first that is no larger than a block, or the smallest cut down to it; or the one some steps further down."""
    fitting = [tile for tile in found if tile.m <= block_m and tile.n <= block_n] or found[-1:]
    return fitting[min(steps_down, len(fitting) - 1)].within(block_m, block_n)


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may use."""
    if device.type != "cuda":
        return 227 * KIB
    return triton.runtime.driver.active.utils.get_device_properties(device.index)["max_shared_mem"]


def tensor_memory(device: torch.device) -> bool:
    """Whether a card sums its products in tensor memory."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 10


def _row_bytes(x: Tensor) -> int:
    return x.shape[3] * x.element_size()
