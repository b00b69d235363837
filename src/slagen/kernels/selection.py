"""From q and k to the lists of critical blocks, without a round trip to the host.

Means of blocks in float32, their products by one batched matrix product, then the exact top-k of every row: a search
over the bits of the score finds the last score that is kept, and of equal ones the lower index wins, as in
`attention/block_map.py`. Column lists for the backward pass come from the same classes, once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from slagen.kernels.primitives import load_rows

COLUMNS = 1024  # scores of a row that one step of the selection holds
LIST_ROWS, LIST_COLUMNS = 64, 32  # tile of classes that becomes column lists


@triton.jit
def pool_kernel(
    x_ptr,
    mean_ptr,
    x_b,
    x_h,
    x_l,
    x_d,
    num_heads,
    length,
    num_blocks,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Mean of each block of rows, the last by its true count."""
    i = tl.program_id(0).to(tl.int64)
    bh = tl.program_id(1).to(tl.int64)
    base = x_ptr + (bh // num_heads) * x_b + (bh % num_heads) * x_h
    x = load_rows(base, x_l, x_d, i * BLOCK, length, BLOCK, HEAD_DIM, True).to(tl.float32)
    count = tl.minimum(length - i * BLOCK, BLOCK).to(tl.float32)
    tl.store(mean_ptr + (bh * num_blocks + i) * HEAD_DIM + tl.arange(0, HEAD_DIM), tl.sum(x, 0) / count)


@triton.jit
def _load_keys(row_ptr, start, num_columns, COLUMNS: tl.constexpr):
    """Scores as integers of the same order; nan as infinity, -0 as 0, and what lies past the end below all."""
    offs = start + tl.arange(0, COLUMNS)
    score = tl.load(row_ptr + offs, mask=offs < num_columns, other=0.0) + 0.0
    score = tl.where(score == score, score, float("inf"))
    bits = score.to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(offs < num_columns, key, -2147483648)


@triton.jit
def _count_from(row_ptr, num_columns, key, COLUMNS: tl.constexpr):
    """How many keys of the row are at least `key`."""
    count = 0
    for start in range(0, num_columns, COLUMNS):
        count += tl.sum((_load_keys(row_ptr, start, num_columns, COLUMNS) >= key).to(tl.int32), 0)
    return count


@triton.jit
def _border(row_ptr, num_columns, wanted, COLUMNS: tl.constexpr):
    """The key of rank `wanted` (from 1, the highest first), and how many keys lie above it."""
    key = tl.where(_count_from(row_ptr, num_columns, 0, COLUMNS) >= wanted, 0, -2147483648)
    for bit in range(31):
        candidate = key + (1 << (30 - bit))
        key = tl.where(_count_from(row_ptr, num_columns, candidate, COLUMNS) >= wanted, candidate, key)
    # Scores are finite or infinite, so no key is the highest integer, and key + 1 does not wrap round.
    return key, _count_from(row_ptr, num_columns, key + 1, COLUMNS)


@triton.jit
def select_kernel(
    score_ptr,
    kv_ptr,
    class_ptr,
    num_columns,
    num_critical,
    num_negligible,
    CLASSES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One row of scores: the critical columns, ascending, and where CLASSES the class of every column."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = score_ptr + row * num_columns
    top, above_top = _border(row_ptr, num_columns, num_critical, COLUMNS)
    kept = num_columns - num_negligible
    if CLASSES:
        low, above_low = _border(row_ptr, num_columns, kept, COLUMNS)
    equal_top, equal_low, listed = 0, 0, 0
    for start in range(0, num_columns, COLUMNS):
        offs = start + tl.arange(0, COLUMNS)
        inside = offs < num_columns
        key = _load_keys(row_ptr, start, num_columns, COLUMNS)
        equal = (inside & (key == top)).to(tl.int32)
        rank = equal_top + tl.cumsum(equal, 0)
        critical = inside & ((key > top) | ((equal > 0) & (rank <= num_critical - above_top)))
        equal_top += tl.sum(equal, 0)
        chosen = critical.to(tl.int32)
        place = listed + tl.cumsum(chosen, 0) - chosen
        tl.store(kv_ptr + row * num_critical + place, offs, mask=critical)
        listed += tl.sum(chosen, 0)
        if CLASSES:
            equal = (inside & (key == low)).to(tl.int32)
            rank = equal_low + tl.cumsum(equal, 0)
            seen = (key > low) | ((equal > 0) & (rank <= kept - above_low))
            equal_low += tl.sum(equal, 0)
            tl.store(class_ptr + row * num_columns + offs, chosen + tl.where(seen, 0, -1), mask=inside)


@triton.jit
def column_lists_kernel(
    class_ptr,
    offset_ptr,
    list_ptr,
    num_rows,
    num_columns,
    list_length,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The critical rows of each column, ascending, one column after the other."""
    bh = tl.program_id(1).to(tl.int64)
    offs_n = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = offs_n < num_columns
    place = tl.load(offset_ptr + bh * (num_columns + 1) + offs_n, mask=inside, other=0)
    for start in range(0, num_rows, ROWS):
        offs_m = start + tl.arange(0, ROWS)
        both = (offs_m < num_rows)[:, None] & inside[None, :]
        ptrs = class_ptr + (bh * num_rows + offs_m[:, None]) * num_columns + offs_n[None, :]
        critical = (tl.load(ptrs, mask=both, other=0) == 1).to(tl.int32)
        where = place[None, :] + tl.cumsum(critical, 0) - critical
        rows = tl.broadcast_to(offs_m[:, None], (ROWS, COLUMNS))
        tl.store(list_ptr + bh * list_length + where, rows, mask=critical > 0)
        place += tl.sum(critical, 0)


def pool(x: Tensor, block: int) -> Tensor:
    """Mean of each block of tokens: (B, H, L, D), any strides -> (B * H, ceil(L / block), D) float32."""
    batch, num_heads, length, head_dim = x.shape
    num_blocks = triton.cdiv(length, block)
    means = torch.empty(batch * num_heads, num_blocks, head_dim, dtype=torch.float32, device=x.device)
    pool_kernel[(num_blocks, batch * num_heads)](
        x, means, *x.stride(), num_heads, length, num_blocks, BLOCK=block, HEAD_DIM=head_dim, num_warps=4
    )
    return means


def select(scores: Tensor, num_critical: int, num_negligible: int, classes: bool) -> tuple[Tensor, Tensor]:
    """Choose the blocks of each row.

    Args:
        scores: (B * H, M, N) float32, contiguous.
        num_critical, num_negligible: how many of the N are kept, from 1, and how many are dropped.
        classes: whether the classes are wanted.
    Returns:
        kv_indices: (B * H, M, num_critical) int32, ascending.
        classes: (B * H, M, N) int8, 1 critical, 0 marginal, -1 negligible; empty where not wanted.
    """
    batch, num_rows, num_columns = scores.shape
    kv_indices = torch.empty(batch, num_rows, num_critical, dtype=torch.int32, device=scores.device)
    shape = scores.shape if classes else (0,)
    class_map = torch.empty(shape, dtype=torch.int8, device=scores.device)
    select_kernel[(batch * num_rows,)](
        scores, kv_indices, class_map, num_columns, num_critical, num_negligible,
        CLASSES=classes, COLUMNS=COLUMNS, num_warps=1,
    )  # fmt: skip
    return kv_indices, class_map


def column_lists(classes: Tensor, num_critical: int) -> tuple[Tensor, Tensor]:
    """Turn the classes round: which query blocks hold each key block critical.

    Args:
        classes: (B * H, M, N) int8, with `num_critical` ones in each row.
    Returns:
        q_indices: (B * H, M * num_critical) int32, the query blocks of key block 0, ascending, then those of 1, ...
        q_offsets: (B * H, N + 1) int32, where each key block's list begins.
    """
    batch, num_rows, num_columns = classes.shape
    q_offsets = torch.zeros(batch, num_columns + 1, dtype=torch.int32, device=classes.device)
    torch.cumsum((classes == 1).sum(1, dtype=torch.int32), 1, dtype=torch.int32, out=q_offsets[:, 1:])
    q_indices = torch.empty(batch, num_rows * num_critical, dtype=torch.int32, device=classes.device)
    column_lists_kernel[(triton.cdiv(num_columns, LIST_COLUMNS), batch)](
        classes, q_offsets, q_indices, num_rows, num_columns, num_rows * num_critical,
        ROWS=LIST_ROWS, COLUMNS=LIST_COLUMNS, num_warps=4,
    )  # fmt: skip
    return q_indices, q_offsets
