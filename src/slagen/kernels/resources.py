"""Which tile, warps and stages each kernel runs with, by what a card has, not by its name.

The table is read by the shared memory that one program may use (and so by compute capability: 99 KiB on sm_86, sm_89
and sm_120, 163 KiB on sm_80, 227 KiB on sm_90 and sm_100) and by the bytes of a row, D times the size of an element.
Entries of a kernel go from the fastest to the smallest; a card that can not run one takes the next.
"""

from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources as OutOfResources  # what a launch raises where a tile does not fit


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
HOPPER = 200 * KIB  # shared memory that tells sm_90 and sm_100 from the others

# For each kernel: bytes of a row at most, shared memory at least, tiles. Chosen by what ptxas reports, which
# `slagen doctor --kernels` shows: nothing spills, two programs on a multiprocessor of sm_90, eight warps where mma.sync
# needs the registers. Not yet timed on a card; scripts/gpu.py sweeps them.
TABLE: dict[str, list[tuple[int, int, Tiles]]] = {
    "attend": [
        (128, 0, Tiles(128, 64, 8, 3)),
        (128, HOPPER, Tiles(64, 64, 4, 3)),
        (128, 0, Tiles(64, 64, 8, 3)),
        (256, 160 * KIB, Tiles(128, 64, 8, 3)),
        (256, HOPPER, Tiles(64, 64, 4, 3)),
        (256, 0, Tiles(64, 64, 8, 3)),
        (256, 0, Tiles(64, 64, 8, 2)),
        (512, 0, Tiles(32, 32, 8, 1)),
        (1024, 0, Tiles(16, 16, 4, 1)),
    ],
    "states": [
        (128, 0, Tiles(64, 64, 8, 3)),
        (256, 0, Tiles(64, 64, 8, 3)),
        (256, 0, Tiles(64, 64, 8, 2)),
        (256, 0, Tiles(32, 32, 8, 2)),
        (512, 0, Tiles(16, 16, 16, 1)),
        (1024, 0, Tiles(16, 16, 16, 1)),
    ],
    "dq": [
        (128, HOPPER, Tiles(64, 64, 4, 3)),
        (128, 0, Tiles(64, 64, 8, 3)),
        (128, 0, Tiles(64, 64, 8, 2)),
        (256, HOPPER, Tiles(64, 64, 4, 2)),
        (256, 160 * KIB, Tiles(64, 64, 8, 2)),
        (256, 0, Tiles(64, 32, 8, 2)),
        (512, 0, Tiles(32, 32, 8, 1)),
        (1024, 0, Tiles(16, 16, 4, 1)),
    ],
    "dkv": [
        (128, 160 * KIB, Tiles(64, 64, 8, 3)),
        (128, 0, Tiles(64, 32, 8, 3)),
        (128, 0, Tiles(64, 32, 8, 2)),
        (256, HOPPER, Tiles(64, 64, 8, 3)),
        (256, 0, Tiles(64, 64, 8, 2)),
        (256, 0, Tiles(32, 64, 8, 2)),
        (512, 0, Tiles(32, 32, 8, 1)),
        (1024, 0, Tiles(16, 16, 4, 1)),
    ],
}
_demoted: dict[tuple[torch.device, int], int] = {}  # how far down the table a card was seen to need to go


def interpreting() -> bool:
    """Whether Triton runs in its interpreter, on CPU tensors."""
    return bool(triton.knobs.runtime.interpret)


def entries(kernel: str, row_bytes: int, shared_bytes: int) -> list[Tiles]:
    """The configurations of a kernel that should fit, the fastest first."""
    found = [tile for most, needed, tile in TABLE[kernel] if row_bytes <= most and shared_bytes >= needed]
    if not found:
        raise ValueError(f"{kernel}: no configuration for rows of {row_bytes} bytes")
    return found


def tiles(kernel: str, x: Tensor, block_m: int, block_n: int) -> Tiles:
    """The configuration for (B, H, L, D) tensors like x, no larger than a block."""
    row_bytes = x.shape[3] * x.element_size()
    steps_down = _demoted.get((x.device, row_bytes), 0)
    return choose(entries(kernel, row_bytes, shared_memory(x.device)), block_m, block_n, steps_down)


def choose(found: list[Tiles], block_m: int, block_n: int, steps_down: int = 0) -> Tiles:
    """The first that is no larger than a block, or the smallest cut down to it; or the one some steps further down."""
    fitting = [tile for tile in found if tile.m <= block_m and tile.n <= block_n] or found[-1:]
    return fitting[min(steps_down, len(fitting) - 1)].within(block_m, block_n)


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may use."""
    if device.type != "cuda":
        return 227 * KIB
    return triton.runtime.driver.active.utils.get_device_properties(device.index)["max_shared_mem"]


def demote(x: Tensor) -> bool:
    """Go down to the next smaller configurations for tensors like x; False where there are none."""
    row_bytes = x.shape[3] * x.element_size()
    step = _demoted.get((x.device, row_bytes), 0) + 1
    if all(step >= len(entries(kernel, row_bytes, shared_memory(x.device))) for kernel in TABLE):
        return False
    _demoted[x.device, row_bytes] = step
    return True
