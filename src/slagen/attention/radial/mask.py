"""The mask of Radial Attention: which key blocks each query block keeps, from the grid alone.

A grid has T frames of s = H W tokens. A query at place r of frame i sees the key at place c of frame j if

    j = 0                         the first frame, which all frames see whole
    |r - c| <= reach(|i - j|)     as `RadialConfig.reach` says:

        reach(0) = s, reach(1) = s // 2, and from d = 2 on the longer of block_n and decay_factor w(d),
        w(d) = 2^bits(s) / 2^bits(d), where bits(x) is the length of x in binary;
        nothing of a frame where w(d) < block_n, unless d is a multiple of int(block_n / w(d)).

From tokens to blocks: a key of a block is dense if more than a third of the query block's tokens see it, and the block
is kept if more than 0.6 of those of its keys that any of them sees are dense. A query block always keeps the blocks in
which its own tokens lie.

Source: Radial Attention, arXiv:2506.19852; all numbers: github.com/mit-han-lab/radial-attention, commit a5c638b, with
its settings for Wan. There blocks are of 128 tokens, for which block_n stands here, and a frame is a whole number of
them. Here blocks go on over the ends of frames, and count the tokens that they have; where frames are whole blocks, the
mask is the source's.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from slagen.attention.kept_pairs import kept_pairs
from slagen.attention.protocol import Grid
from slagen.attention.radial.config import RadialConfig
from slagen.attention.sla.block_map import block_tokens


@dataclass(frozen=True, eq=False)
class RadialMask:
    """The mask of one grid, on one device.

    Args:
        kept: (M, N) bool, at least one block a row.
        pairs: (2,) int64, the query-key pairs that are attended to, and all.
        num_tokens: L.
    """

    kept: Tensor
    pairs: Tensor
    num_tokens: int

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.kept.device

    def of(self, q: Tensor) -> Tensor:
        """The mask of all batches and heads of q (B, H, L, D), (B, H, M, N)."""
        return self.kept.expand(*q.shape[:2], -1, -1)


@functools.lru_cache(maxsize=16)
def radial_mask(config: RadialConfig, grid: Grid, device: torch.device) -> RadialMask:
    """The mask of a grid. Made once for each: callers in compiled code get it from outside."""
    length, size = grid.num_tokens, grid.height * grid.width
    num_rows, num_columns = config.num_blocks(length)
    with torch.inference_mode(False):
        tokens = torch.arange(length, dtype=torch.int32)
        frame, place = tokens // size, tokens % size
        found = [config.reach(distance, size) for distance in range(grid.num_frames)]
        reach = torch.tensor([-1 if tokens is None else tokens for tokens in found], dtype=torch.int32)
        kept = torch.zeros(num_rows, num_columns, dtype=torch.bool)
        for m in range(num_rows):
            first, last = m * config.block_m, min((m + 1) * config.block_m, length) - 1
            seen = _tokens_that_see(first, last, size, frame, place, reach)
            kept[m] = _blocks(seen, last - first + 1, config.block_n, num_columns)
            kept[m, first // config.block_n : last // config.block_n + 1] = True
        counts = (block_tokens(length, block, kept.device) for block in (config.block_m, config.block_n))
        return RadialMask(kept.to(device), kept_pairs(kept[None, None], *counts).to(device), length)


def _tokens_that_see(first: int, last: int, size: int, frame: Tensor, place: Tensor, reach: Tensor) -> Tensor:
    """How many of the queries from `first` to `last` see each key: (L,) int32 of int32 frames, places, and reaches."""
    seen = torch.zeros_like(frame)
    for i in range(first // size, last // size + 1):
        start, end = max(first - i * size, 0), min(last + 1 - i * size, size)
        far = torch.where(frame == 0, size, reach[(frame - i).abs()])
        seen += ((place + far + 1).clamp(max=end) - (place - far).clamp(min=start)).clamp(min=0)
    return seen


def _blocks(seen: Tensor, num_queries: int, block_n: int, num_columns: int) -> Tensor:
    """Which key blocks are kept by a query block, of whose tokens so many see each key: (N,) bool."""
    padded = seen.new_zeros(num_columns * block_n)
    padded[: len(seen)] = seen
    keys = padded.view(num_columns, block_n)
    dense, any_seen = (keys * 3 > num_queries).sum(1), (keys > 0).sum(1)
    return dense * 5 > any_seen * 3
