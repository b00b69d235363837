"""Attention to the kept key blocks only, whichever they are: as it is defined, and block by block.

Blocks are runs of a sequence, of which the last may be partial, or cubes and other tiles of a clip's grid
(`order.py`), of which any may. `reference` makes a dense mask of the kept blocks, in O(L^2) memory. The operator
gathers them by the sparse branch of SLA (`sla/blockwise_sparse.py`), in memory that grows with L, and with a bool for
each pair of blocks; it is one node for PyTorch, with its gradients. G, R and blocks are as in `sla/blocks.py`.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from slagen.attention.cubes import CUBE_TOKENS
from slagen.attention.order import CubeOrder, from_slots, to_slots
from slagen.attention.sla.blocks import from_blocks, head_groups, in_a_run, rows_of_run, to_blocks
from slagen.attention.sla.blockwise_sparse import kept_lists, sparse_backward, sparse_forward


def reference_attention(q: Tensor, k: Tensor, v: Tensor, kept: Tensor, scale: float) -> Tensor:
    """Softmax attention of each token to the keys it keeps; differentiable by autograd.

    Args:
        q, k, v: (B, H, L, D), any floating dtype, computed in float32 or, for float64, in float64.
        kept: bool, broadcast to (B, H, L, L), at least one key a row.
        scale: factor on q @ k^T before softmax.
    Returns: o (B, H, L, D) in q's dtype.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    s = (q.to(dtype) @ k.to(dtype).mT * scale).masked_fill(~kept, -torch.inf)
    return (s.softmax(-1) @ v.to(dtype)).to(q.dtype)


def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, kept: Tensor, scale: float, blocks: tuple[int, int] | CubeOrder
) -> Tensor:
    """Attend block by block. Differentiable once, in q, k and v.

    Args:
        q, k, v: (B, H, L, D), float16, bfloat16, float32 or float64, any strides, tokens in raster order.
        kept: (B, H, M, N) bool, any strides, the key blocks of each query block, at least one a row.
        scale: factor on q @ k^T before softmax.
        blocks: query rows and key columns in a block of the sequence; or the tiles that are its blocks.
    Returns: o (B, H, L, D) in q's dtype.
    """
    if isinstance(blocks, CubeOrder):
        filled = blocks.counts if blocks.ragged else None
        return _forward(q, k, v, kept, blocks.slots, filled, CUBE_TOKENS, CUBE_TOKENS, scale)
    return _forward(q, k, v, kept, None, None, *blocks, scale)


def _cut(x: Tensor, slots: Tensor | None, block: int, num_blocks: int) -> Tensor:
    """The blocks of some heads, (b, h, L, D) -> (G, N, block, D), float32 or float64, zeros for padding."""
    if slots is None:
        return to_blocks(x, block)
    return to_slots(x.to(torch.promote_types(x.dtype, torch.float32)), slots, num_blocks).flatten(0, 1)


def _join(blocks: Tensor, slots: Tensor | None, out: Tensor) -> None:
    """Copy blocks (G, N, block, D) back into a (b, h, L, D) view, rounding to its dtype."""
    if slots is None:
        from_blocks(blocks, out)
    else:
        out.copy_(from_slots(blocks, slots).view(out.shape))


def _runs(blocks: Tensor) -> Iterator[slice]:
    """Split the blocks of queries (G, M, block, D) into runs of about RUN_BYTES."""
    step = in_a_run(4 * blocks[0, 0].numel())
    return (slice(i, i + step) for i in range(0, blocks.shape[1], step))


def _length(q: Tensor, slots: Tensor | None, keys: Tensor) -> int:
    """The rows of the key blocks (G, N, block, D) that are no padding at their end."""
    return q.shape[2] if slots is None else keys.shape[1] * keys.shape[2]


@torch.library.custom_op("slagen::block_sparse_forward", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kept: Tensor,
    slots: Tensor | None,
    filled: Tensor | None,
    block_m: int,
    block_n: int,
    scale: float,
) -> Tensor:
    o, (num_rows, num_columns) = torch.empty_like(q), kept.shape[2:]
    with torch.autocast(q.device.type, enabled=False):
        for heads in head_groups(q):
            q_i = _cut(q[heads], slots, block_m, num_rows)
            k_j, v_j = (_cut(x[heads], slots, block_n, num_columns) for x in (k, v))
            o_i = torch.empty_like(q_i)  # q_i may be q itself
            for run in _runs(q_i):
                lists, counts = kept_lists(rows_of_run(kept, heads, run))
                q_r = q_i[:, run] * scale
                o_r, length = torch.empty_like(q_r), _length(q, slots, k_j)
                sparse_forward(q_r, k_j, v_j, lists, length, o_r, counts=counts, filled=filled)
                o_i[:, run] = o_r
            _join(o_i, slots, o[heads])
    return o


@_forward.register_fake
def _(q, k, v, kept, slots, filled, block_m, block_n, scale):
    return torch.empty_like(q)


@torch.library.custom_op("slagen::block_sparse_backward", mutates_args=())
def _backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kept: Tensor,
    slots: Tensor | None,
    filled: Tensor | None,
    block_m: int,
    block_n: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv."""
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    num_rows, num_columns = kept.shape[2:]
    with torch.autocast(q.device.type, enabled=False):
        for heads in head_groups(q):
            q_i, do_i = (_cut(x[heads], slots, block_m, num_rows) for x in (q, do))
            k_j, v_j = (_cut(x[heads], slots, block_n, num_columns) for x in (k, v))
            dq_i, dk_j, dv_j = torch.empty_like(q_i), torch.zeros_like(k_j), torch.zeros_like(v_j)
            for run in _runs(q_i):
                lists, counts = kept_lists(rows_of_run(kept, heads, run))
                q_r, do_r, length = q_i[:, run] * scale, do_i[:, run].contiguous(), _length(q, slots, k_j)
                dq_r = sparse_backward(q_r, k_j, v_j, lists, length, do_r, dk_j, dv_j, counts=counts, filled=filled)
                dq_i[:, run] = dq_r.mul_(scale)
            for x, of_blocks in ((dq, dq_i), (dk, dk_j), (dv, dv_j)):
                _join(of_blocks, slots, x[heads])
    return dq, dk, dv


@_backward.register_fake
def _(do, q, k, v, *_):
    return tuple(torch.empty_like(x) for x in (q, k, v))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, kept, slots, filled, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, kept, slots, filled)


def _autograd(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward(do, *ctx.saved_tensors, *ctx.options), *(None,) * 6


_forward.register_autograd(_autograd, setup_context=_setup_context)
