"""The means of the rejected key blocks, added to what the attend kernel made of the kept ones: one softmax in all."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from slagen.kernels.forward import attend
from slagen.kernels.primitives import LOG2_E, load_columns, load_rows, store_rows
from slagen.kernels.resources import tiles
from slagen.kernels.selection import column_lists, pool
from slagen.kernels.states import precision

MEANS = 64  # block means at a time; fewer where their rows are long, for the shared memory of every card


@triton.jit(do_not_specialize=["length", "num_rows", "num_columns"])
def block_means_kernel(
    q_ptr,
    o_ptr,
    lse_ptr,
    key_ptr,
    value_ptr,
    weight_ptr,
    kept_ptr,
    q_b,
    q_h,
    q_l,
    q_d,
    o_b,
    o_h,
    o_l,
    o_d,
    num_heads,
    length,
    num_rows,
    num_columns,
    scale_log2,
    BLOCK_M: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """TILE_M rows: go on with the online softmax over the means, from o and lse of the kept blocks, which it replaces.

    A row of that softmax has summed to 1 with maximum lse so far. weight_ptr has log2 of the tokens of each block.
    """
    tiles_m = tl.cdiv(length, TILE_M)
    bh = (tl.program_id(0) // tiles_m).to(tl.int64)
    start_m = (tl.program_id(0) % tiles_m).to(tl.int64) * TILE_M
    b, h = bh // num_heads, bh % num_heads
    offs_m = tl.arange(0, TILE_M)
    inside = offs_m < length - start_m
    q = load_columns(q_ptr + b * q_b + h * q_h, q_l, q_d, start_m, 0, length, TILE_M, HEAD_DIM)
    o_base = o_ptr + b * o_b + h * o_h
    acc = load_columns(o_base, o_l, o_d, start_m, 0, length, TILE_M, HEAD_DIM).to(tl.float32)
    lse_ptrs = lse_ptr + bh * length + start_m + offs_m
    m_i = tl.load(lse_ptrs, mask=inside, other=0.0)
    l_i = tl.full((TILE_M,), 1.0, dtype=tl.float32)
    kept_row = kept_ptr + (bh * num_rows + start_m // BLOCK_M) * num_columns
    key_base, value_base = key_ptr + bh * num_columns * HEAD_DIM, value_ptr + bh * num_columns * HEAD_DIM
    for start in range(0, num_columns, TILE_N):
        offs_n = start + tl.arange(0, TILE_N)
        kept = tl.load(kept_row + offs_n, mask=offs_n < num_columns, other=1)
        weight = tl.load(weight_ptr + offs_n, mask=offs_n < num_columns, other=0.0)
        key = load_rows(key_base, HEAD_DIM, 1, start, num_columns, TILE_N, HEAD_DIM, True)
        qk = tl.dot(q, tl.trans(key), input_precision=PRECISION) * scale_log2 + weight[None, :]
        qk = tl.where((kept == 0)[None, :], qk, -float("inf"))
        m_new = tl.maximum(m_i, tl.max(qk, 1))
        alpha = tl.math.exp2(m_i - m_new)
        p = tl.math.exp2(qk - m_new[:, None])
        l_i = l_i * alpha + tl.sum(p, 1)
        value = load_rows(value_base, HEAD_DIM, 1, start, num_columns, TILE_N, HEAD_DIM, True)
        acc = tl.dot(p.to(value.dtype), value, acc * alpha[:, None], input_precision=PRECISION)
        m_i = m_new
    store_rows(o_base, o_l, o_d, start_m, length, acc * (1.0 / l_i)[:, None], TILE_M, HEAD_DIM)
    tl.store(lse_ptrs, m_i + tl.log2(l_i), mask=inside)


def kept_columns(kept: Tensor) -> tuple[Tensor, Tensor]:
    """The kept blocks of each row, as the kernels of both directions read them.

    Args:
        kept: (B * H, M, N) bool, at least one a row.
    Returns:
        kv_indices: (B * H, M, most) int32, ascending; shorter rows go on with N, a block behind the last, all of whose
            keys these kernels mask.
        classes: (B * H, M, N) int8, 1 for kept blocks.
    """
    num_columns = kept.shape[2]
    counts = kept.sum(2)
    order = (~kept).to(torch.uint8).sort(dim=2, stable=True).indices[..., : int(counts.max())]
    unused = torch.arange(order.shape[2], device=kept.device) >= counts[..., None]
    return order.masked_fill(unused, num_columns).to(torch.int32), kept.to(torch.int8)


def block_means_forward(
    q: Tensor, k: Tensor, v: Tensor, kept: Tensor, *, block_m: int, block_n: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention to kept blocks and to the means of the others, as `attention/mean/reference.py` defines it.

    Args:
        q, k, v: (B, H, L, D), float16, bfloat16 or float32, any strides; D a power of two from 16 to 256.
        kept: (B * H, M, N) bool, at least one block a row.
        block_m, block_n: query rows and key columns of a block: 16, 32, 64 or 128.
        scale: factor on q @ k^T before softmax.
    Returns:
        o: (B, H, L, D) in q's dtype, laid out as q is.
        lse: (B * H, L) float32, log2 of the softmax denominator (base 2, scale included).
    """
    batch, num_heads, length, head_dim = q.shape
    num_rows, num_columns = kept.shape[1:]
    kv_indices, classes = kept_columns(kept)
    o, empty = torch.empty_like(q), q.new_empty(0)
    lse = torch.empty(batch * num_heads, length, dtype=torch.float32, device=q.device)
    attend(
        q, k, v, o, lse, kv_indices, empty, empty, None, block_m=block_m, block_n=block_n,
        num_critical=kv_indices.shape[2], linear=False, marginal=False, feature_map="softmax", eps=0.0, scale=scale,
        sparse=True,
    )  # fmt: skip
    key_means, value_means = (pool(x, block_n).to(q.dtype) for x in (k, v))
    tile, row_bytes = min(tiles("attend", q, block_m, block_n).m, 64), head_dim * q.element_size()
    block_means_kernel[(triton.cdiv(length, tile) * batch * num_heads,)](
        q, o, lse, key_means, value_means, block_tokens(length, block_n, q.device).log2(), classes,
        *q.stride(), *o.stride(), num_heads, length, num_rows, num_columns, scale * LOG2_E.value,
        BLOCK_M=block_m, TILE_M=tile, TILE_N=MEANS if row_bytes <= 256 else max(16, MEANS * 128 // row_bytes),
        HEAD_DIM=head_dim, PRECISION=precision(q), num_warps=4, num_stages=2,
    )  # fmt: skip
    return o, lse


def block_tokens(length: int, block_n: int, device: torch.device) -> Tensor:
    """How many tokens each block has, (N,) float32."""
    starts = torch.arange(0, length, block_n, device=device)
    return (length - starts).clamp(max=block_n).float()


def kept_lists_of_columns(kept: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """kv_indices, classes, q_indices and q_offsets of `sla_backward`."""
    kv_indices, classes = kept_columns(kept)
    return kv_indices, classes, *column_lists(classes, kv_indices.shape[2])
