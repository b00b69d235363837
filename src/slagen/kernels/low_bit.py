"""Attention to listed key blocks by products of int8: all that is multiplied is rounded block by block."""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from slagen.kernels.primitives import LOG2_E, load_columns, load_rows, store_rows
from slagen.kernels.resources import tiles

LEVELS = tl.constexpr(127.0)  # steps from 0 to the largest magnitude of what is rounded together


@triton.jit(do_not_specialize=["length", "num_rows", "topk"])
def low_bit_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    q_step_ptr,
    k_step_ptr,
    v_step_ptr,
    kv_ptr,
    o_b,
    o_h,
    o_l,
    o_d,
    num_heads,
    length,
    num_rows,
    num_columns,
    topk,
    scale_log2,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILE_M: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """TILE_M rows of o: walk the listed blocks, each a tile whose weights are rounded by the row's largest of them."""
    tiles_m = tl.cdiv(length, TILE_M)
    bh = (tl.program_id(0) // tiles_m).to(tl.int64)
    start_m = (tl.program_id(0) % tiles_m).to(tl.int64) * TILE_M
    b, h = bh // num_heads, bh % num_heads
    row = bh * num_rows + start_m // BLOCK_M
    q = load_columns(q_ptr + bh * length * HEAD_DIM, HEAD_DIM, 1, start_m, 0, length, TILE_M, HEAD_DIM)
    q_step = tl.load(q_step_ptr + row) * scale_log2
    k_base, v_base = k_ptr + bh * length * HEAD_DIM, v_ptr + bh * length * HEAD_DIM
    m_i = tl.full((TILE_M,), -float("inf"), dtype=tl.float32)
    l_i = tl.zeros((TILE_M,), dtype=tl.float32)
    acc = tl.zeros((TILE_M, HEAD_DIM), dtype=tl.float32)
    for t in range(topk):
        block = tl.load(kv_ptr + row * topk + t)
        start = block.to(tl.int64) * BLOCK_N
        k = load_rows(k_base, HEAD_DIM, 1, start, length, BLOCK_N, HEAD_DIM, True)
        qk = tl.dot(q, tl.trans(k), out_dtype=tl.int32).to(tl.float32)
        qk *= q_step * tl.load(k_step_ptr + bh * num_columns + block)
        qk = tl.where((tl.arange(0, BLOCK_N) < length - start)[None, :], qk, -float("inf"))
        m_block = tl.max(qk, 1)
        p = tl.math.exp2(qk - m_block[:, None])
        v = load_rows(v_base, HEAD_DIM, 1, start, length, BLOCK_N, HEAD_DIM, True)
        pv = tl.dot((p * LEVELS + 0.5).to(tl.int8), v, out_dtype=tl.int32).to(tl.float32)
        v_step = tl.load(v_step_ptr + bh * num_columns + block) / LEVELS
        m_new = tl.maximum(m_i, m_block)
        alpha, beta = tl.math.exp2(m_i - m_new), tl.math.exp2(m_block - m_new)
        l_i = l_i * alpha + tl.sum(p, 1) * beta
        acc = acc * alpha[:, None] + pv * (beta * v_step)[:, None]
        m_i = m_new
    store_rows(o_ptr + b * o_b + h * o_h, o_l, o_d, start_m, length, acc * (1.0 / l_i)[:, None], TILE_M, HEAD_DIM)


def rounded_to_int8(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Round each block of tokens to 127 steps of its largest magnitude.

    Args: x: (B, H, L, D), any floating dtype.
    Returns: (B, H, L, D) int8, contiguous, and the steps, (B, H, ceil(L / block)) float32.
    """
    length = x.shape[2]
    blocks = F.pad(x.float(), (0, 0, 0, -length % block)).unflatten(2, (-1, block))
    steps = blocks.abs().amax((3, 4)) / LEVELS.value
    steps = steps.masked_fill_(steps == 0, 1)
    numbers = (blocks / steps[..., None, None]).round_().to(torch.int8)
    return numbers.flatten(2, 3)[:, :, :length].contiguous(), steps


def low_bit_forward(
    q: Tensor, k: Tensor, v: Tensor, kv_indices: Tensor, *, block_m: int, block_n: int, scale: float
) -> Tensor:
    """Softmax attention to the listed blocks in int8, as `attention/sla2/reference.py` defines it.

    Args:
        q, k, v: (B, H, L, D), float16, bfloat16 or float32, any strides, k perhaps of another dtype; D a power of two
            from 32 to 256.
        kv_indices: (B * H, M, topk) int32, the key blocks of each query block.
        block_m, block_n: query rows and key columns of a block: 16, 32, 64 or 128, of keys at least 32.
        scale: factor on q @ k^T before softmax.
    Returns: o (B, H, L, D) float32.
    """
    batch, num_heads, length, head_dim = q.shape
    (q8, q_steps), (k8, k_steps), (v8, v_steps) = (
        rounded_to_int8(x, block) for x, block in ((q, block_m), (k, block_n), (v, block_n))
    )
    o = torch.empty(q.shape, dtype=torch.float32, device=q.device)
    tile = min(tiles("attend", q, block_m, block_n).m, 64)
    low_bit_kernel[(triton.cdiv(length, tile) * batch * num_heads,)](
        q8, k8, v8, o, q_steps, k_steps, v_steps, kv_indices, *o.stride(), num_heads, length, q_steps.shape[2],
        k_steps.shape[2], kv_indices.shape[2], scale * LOG2_E.value, BLOCK_M=block_m, BLOCK_N=block_n, TILE_M=tile,
        HEAD_DIM=head_dim, num_warps=8, num_stages=2,
    )  # fmt: skip
    return o
