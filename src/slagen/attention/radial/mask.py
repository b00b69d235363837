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
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
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
        found = [config.reach(distance, size) for distance in range(grid.num_frames)]
        reach = [-1 if tokens is None else tokens for tokens in found]
        kept = torch.zeros(num_rows, num_columns, dtype=torch.bool)
        for m in range(num_rows):
            first, last = m * config.block_m, min((m + 1) * config.block_m, length) - 1
            dense, seen = _dense_and_seen(first, last, size, reach)
            kept[m] = _per_block(dense, config.block_n) * 5 > _per_block(seen, config.block_n) * 3
            kept[m, first // config.block_n : last // config.block_n + 1] = True
        counts = (block_tokens(length, block, kept.device) for block in (config.block_m, config.block_n))
        return RadialMask(kept.to(device), kept_pairs(kept[None, None], *counts).to(device), length)


def _dense_and_seen(first: int, last: int, size: int, reach: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Which keys more than a third of the queries from `first` to `last` see, and which any of them sees: (L,) bool.

    What they see of a frame depends only on how far each of their frames reaches there, and many frames share that.
    Args: reach: by the distance of frames; -1 is nothing.
    """
    frames = range(first // size, last // size + 1)
    far = [tuple(size if j == 0 else reach[abs(i - j)] for i in frames) for j in range(len(reach))]
    kinds = list(dict.fromkeys(far))
    sides = torch.tensor(kinds, dtype=torch.int32)[..., None]  # (kinds, frames, 1)
    start = torch.tensor([max(first - i * size, 0) for i in frames], dtype=torch.int32)[:, None]
    end = torch.tensor([min(last + 1 - i * size, size) for i in frames], dtype=torch.int32)[:, None]
    place = torch.arange(size, dtype=torch.int32)
    counts = ((place + sides + 1).minimum(end) - (place - sides).maximum(start)).clamp(min=0).sum(1, dtype=torch.int32)
    which = torch.tensor([kinds.index(each) for each in far])
    dense, seen = (mask.index_select(0, which).flatten() for mask in (counts * 3 > last - first + 1, counts > 0))
    return dense, seen


def _per_block(keys: Tensor, block_n: int) -> Tensor:
    """How many keys of each block are marked, (N,) int32, of (L,) bool."""
    return F.pad(keys, (0, -len(keys) % block_n)).view(-1, block_n).sum(1, dtype=torch.int32)
