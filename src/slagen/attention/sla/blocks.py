"""Queries, keys and values cut into blocks, and taken in groups of heads and runs of blocks that fit in the cache.

Short heads are worked on in groups of G, long ones alone, in runs of R query blocks. Cut into blocks, the queries of a
run are (G, R, block_m, D), and the keys and values of a group (G, N, block_n, D).
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

# The fastest power of two on a Xeon with 2 MiB of second-level cache per core, as CHUNK_BYTES in blockwise_sparse.py.
RUN_BYTES = 2 * 2**20  # the queries, or keys, that feature map, state and projection handle at a time


def in_a_run(size: int) -> int:
    """How many blocks, or heads, of a size in bytes make a run of about RUN_BYTES: at least one."""
    return max(1, RUN_BYTES // size)


def head_groups(q: Tensor) -> Iterator[tuple[slice, slice]]:
    """Split (B, H) into some batches, or some heads of one batch, with about RUN_BYTES of queries."""
    batch, num_heads, length, head_dim = q.shape
    width = in_a_run(4 * length * head_dim)
    if width >= num_heads:
        step = width // num_heads
        yield from ((slice(b, b + step), slice(None)) for b in range(0, batch, step))
    else:
        step = math.ceil(num_heads / math.ceil(num_heads / width))  # 8 heads, 6 at a time, are 4 and 4
        yield from ((slice(b, b + 1), slice(h, h + step)) for b in range(batch) for h in range(0, num_heads, step))


def query_runs(q: Tensor, block_m: int) -> Iterator[tuple[slice, slice]]:
    """Split the query blocks of a head into runs of about RUN_BYTES: slices of blocks, and of tokens."""
    step = in_a_run(4 * block_m * q.shape[3])
    for i in range(0, math.ceil(q.shape[2] / block_m), step):
        yield slice(i, i + step), slice(i * block_m, (i + step) * block_m)


def rows_of_run(x: Tensor, heads: tuple[slice, slice], run: slice) -> Tensor:
    """The rows of a run out of (B, H, M, ...), as (G, R, ...)."""
    return x[heads][:, :, run].flatten(0, 1)


def to_blocks(x: Tensor, block: int) -> Tensor:
    """Cut (b, h, L, D) into blocks (G, ceil(L / block), block, D), float32 or float64, zeros after the end."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    batch, num_heads, length, head_dim = x.shape
    if length % block == 0:
        return x.to(dtype).reshape(batch * num_heads, -1, block, head_dim).contiguous()
    blocks = x.new_empty(batch, num_heads, length + -length % block, head_dim, dtype=dtype)
    blocks[:, :, :length] = x
    blocks[:, :, length:] = 0
    return blocks.view(batch * num_heads, -1, block, head_dim)


def from_blocks(blocks: Tensor, out: Tensor) -> None:
    """Copy blocks back into a (b, h, L, D) view, rounding to its dtype."""
    out.copy_(blocks.view(*out.shape[:2], -1, out.shape[3])[:, :, : out.shape[2]])
