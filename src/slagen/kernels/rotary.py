"""What comes before the attention: RMSNorm over all heads, rotary embedding and block means of q and k, in one pass.

A program walks over one block of tokens of q or k, one or a few whole tokens at a time: loaded ahead, normed, turned,
stored and added to the sums that become the block's mean. All is float32 until the one rounding of the result.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Not yet timed on a card. Of Wan 1.3B a program holds one token, of 16 heads with the masked ones, in 4 warps.
TILE = 2048  # numbers that a program holds at least, where a token is smaller as several tokens
THREAD_COLUMNS = 16  # numbers of a thread: for 12 heads of 128 in bfloat16 at most 64 registers, and 80 with sums
WALK = 16  # steps of a program where no means are wanted: 4,096 programs at 480p, several waves on every card


@triton.jit
def norm_rotate_kernel(
    q_ptr,
    k_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_ptr,
    sin_ptr,
    q_out_ptr,
    k_out_ptr,
    q_mean_ptr,
    k_mean_ptr,
    q_b,
    q_l,
    q_d,
    k_b,
    k_l,
    k_d,
    cos_l,
    cos_d,
    sin_l,
    sin_d,
    num_heads,
    length,
    block_m,
    block_n,
    eps,
    MEANS: tl.constexpr,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """One block of q (even programs) or of k, ROWS tokens at a time. HEADS is num_heads up to a power of two."""
    i = tl.program_id(0).to(tl.int64) // 2
    b = tl.program_id(1).to(tl.int64)
    x_ptr, weight_ptr, out_ptr, mean_ptr = q_ptr, q_weight_ptr, q_out_ptr, q_mean_ptr
    x_b, x_l, x_d, block = q_b, q_l, q_d, block_m
    if tl.program_id(0) % 2 == 1:
        x_ptr, weight_ptr, out_ptr, mean_ptr = k_ptr, k_weight_ptr, k_out_ptr, k_mean_ptr
        x_b, x_l, x_d, block = k_b, k_l, k_d, block_n
    start = i * block
    end = tl.minimum(start + block, length)
    offs_h = tl.arange(0, HEADS)
    offs_d = tl.arange(0, HEAD_DIM)
    offs_p = 2 * tl.arange(0, HEAD_DIM // 2)[None, :]
    heads = (offs_h < num_heads)[:, None]
    width = num_heads * HEAD_DIM
    column = offs_h[:, None] * HEAD_DIM + offs_d[None, :]
    weight = tl.load(weight_ptr + column, mask=heads, other=0.0).to(tl.float32)
    sums = tl.zeros((HEADS, HEAD_DIM), dtype=tl.float32)
    for first in tl.range(start, end, ROWS, num_stages=3):
        row = first + tl.arange(0, ROWS)[:, None]
        rows = row < end
        inside = rows[:, :, None] & heads[None, :, :]
        ptrs = x_ptr + b * x_b + row[:, :, None] * x_l + column[None, :, :] * x_d
        x = tl.load(ptrs, mask=inside, other=0.0).to(tl.float32)
        cos = tl.load(cos_ptr + row * cos_l + offs_p * cos_d, mask=rows, other=0.0)[:, None, :]
        sin = tl.load(sin_ptr + row * sin_l + (offs_p + 1) * sin_d, mask=rows, other=0.0)[:, None, :]
        square = tl.sum(tl.reshape(x * x, (ROWS, HEADS * HEAD_DIM)), 1)
        x = x * tl.rsqrt(square / width + eps)[:, None, None] * weight[None, :, :]
        even, odd = tl.split(tl.reshape(x, (ROWS, HEADS, HEAD_DIM // 2, 2)))
        pairs = tl.join(even * cos - odd * sin, even * sin + odd * cos)
        turned = tl.reshape(pairs, (ROWS, HEADS, HEAD_DIM)).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + (b * length + row[:, :, None]) * width + column[None, :, :], turned, mask=inside)
        if MEANS:
            sums += tl.sum(tl.where(inside, turned.to(tl.float32), 0.0), 0)
    if MEANS and end > start:
        num_blocks = tl.cdiv(length, block)
        place = (b * num_heads + offs_h[:, None]) * num_blocks + i
        tl.store(mean_ptr + place * HEAD_DIM + offs_d[None, :], sums / (end - start).to(tl.float32), mask=heads)


def rows_and_warps(num_heads: int, head_dim: int) -> tuple[int, int]:
    """How many tokens a program holds at a time, and how many warps hold them."""
    columns = triton.next_power_of_2(num_heads) * head_dim
    rows = max(1, TILE // columns)
    return rows, min(16, rows * columns // (32 * THREAD_COLUMNS))


def norm_rotate(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    eps: float,
    blocks: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """RMSNorm of q and k over all heads, then the rotary embedding of every head, pairs interleaved.

    Args:
        q, k: (B, L, H * D) as the projections give them, of one dtype, any strides; D a power of two from 16.
        q_weight, k_weight: (H * D,), contiguous, any floating dtype.
        cos, sin: (L, D) float32, any strides; every angle stands twice, as diffusers has it.
        eps: what is added to the mean of squares.
        blocks: tokens in a block of q and of k, for the means of blocks; None for no means.
    Returns:
        q, k: (B, L, H, D) in their dtype, contiguous.
        q_means, k_means: (B * H, ceil(L / block), D) float32, of the rounded results, as `selection.pool` gives but for
            the order of the sum; empty where not wanted.
    """
    batch, length, width = q.shape
    head_dim = width // num_heads
    rows, warps = rows_and_warps(num_heads, head_dim)
    block_m, block_n = blocks or (WALK * rows, WALK * rows)
    counts = [triton.cdiv(length, block) for block in (block_m, block_n)]
    outs = [torch.empty(batch, length, num_heads, head_dim, dtype=q.dtype, device=q.device) for _ in counts]
    shapes = [(batch * num_heads, count, head_dim) if blocks else (0,) for count in counts]
    means = [torch.empty(shape, dtype=torch.float32, device=q.device) for shape in shapes]
    norm_rotate_kernel[(2 * max(counts), batch)](
        q, k, q_weight, k_weight, cos, sin, *outs, *means, *q.stride(), *k.stride(), *cos.stride(), *sin.stride(),
        num_heads, length, block_m, block_n, eps, MEANS=blocks is not None, ROWS=rows,
        HEADS=triton.next_power_of_2(num_heads), HEAD_DIM=head_dim, num_warps=warps,
    )  # fmt: skip
    return outs[0], outs[1], means[0], means[1]
