"""From q and k to the lists of critical blocks, without a round trip to the host.

Means of blocks in float32, their products by one batched matrix product, then the exact top-k of every row, which stays
in registers: a search over the bits of the score finds the last score that is kept, and of equal ones the lower index
wins, as in `attention/block_map.py`. Column lists for the backward pass come from the same classes, once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from slagen.kernels.primitives import load_rows

COLUMNS = 512  # scores of a row that are held at least: to 32,768 tokens in blocks of 64 one kernel serves
MAX_COLUMNS = 8192  # what the scan of a row needs of shared memory fits on every card up to here
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
    i = (tl.program_id(0) % num_blocks).to(tl.int64)
    bh = (tl.program_id(0) // num_blocks).to(tl.int64)
    base = x_ptr + (bh // num_heads) * x_b + (bh % num_heads) * x_h
    x = load_rows(base, x_l, x_d, i * BLOCK, length, BLOCK, HEAD_DIM, True).to(tl.float32)
    count = tl.minimum(length - i * BLOCK, BLOCK).to(tl.float32)
    tl.store(mean_ptr + (bh * num_blocks + i) * HEAD_DIM + tl.arange(0, HEAD_DIM), tl.sum(x, 0) / count)


@triton.jit
def _border(keys, wanted):
    """The key of rank `wanted` (from 1, the highest first), bit by bit from the sign down."""
    border = tl.where(tl.sum((keys >= 0).to(tl.int32), 0) >= wanted, 0, -2147483648)
    for bit in tl.static_range(31):
        candidate = border + (1 << (30 - bit))
        border = tl.where(tl.sum((keys >= candidate).to(tl.int32), 0) >= wanted, candidate, border)
    return border


@triton.jit
def _highest(keys, wanted):
    """Which keys are the `wanted` highest, of equal ones those of lower column, and how many such lie before each."""
    border = _border(keys, wanted)
    above, equal = (keys > border).to(tl.int32), (keys == border).to(tl.int32)
    # Both counts in one scan, 16 bits each. Keys past the end of the row are the least, and behind all others.
    before = tl.cumsum((above << 16) + equal, 0) - (above << 16) - equal
    above_before, equal_before = (before >> 16) & 0xFFFF, before & 0xFFFF
    vacant = wanted - tl.sum(above, 0)
    chosen = (above > 0) | ((equal > 0) & (equal_before < vacant))
    return chosen, above_before + tl.minimum(equal_before, vacant)


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
    """One row of scores, held in registers: the critical columns, ascending, and where CLASSES the class of each."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, COLUMNS)
    inside = columns < num_columns
    score = tl.load(score_ptr + row * num_columns + columns, mask=inside, other=-float("inf")) + 0.0  # -0 becomes 0
    score = tl.where(score == score, score, float("inf"))
    # As integers of the same order. What lies past the end ranks last: as -inf, behind the row's own.
    bits = score.to(tl.int32, bitcast=True)
    keys = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    critical, place = _highest(keys, num_critical)
    tl.store(kv_ptr + row * num_critical + place, columns, mask=critical)
    if CLASSES:
        kind = critical.to(tl.int32)
        if num_negligible > 0:
            seen, _ = _highest(keys, num_columns - num_negligible)
            kind -= tl.where(seen, 0, 1)
        tl.store(class_ptr + row * num_columns + columns, kind, mask=inside)


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
    tiles_n = tl.cdiv(num_columns, COLUMNS)
    bh = (tl.program_id(0) // tiles_n).to(tl.int64)
    offs_n = tl.program_id(0) % tiles_n * COLUMNS + tl.arange(0, COLUMNS)
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
    pool_kernel[(num_blocks * batch * num_heads,)](
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
    if num_columns > MAX_COLUMNS:
        raise ValueError(
            f"the sequence has {num_columns:,} key blocks, but the kernels support at most {MAX_COLUMNS:,}. "
            "Use larger blocks."
        )
    kv_indices = torch.empty(batch, num_rows, num_critical, dtype=torch.int32, device=scores.device)
    shape = scores.shape if classes else (0,)
    class_map = torch.empty(shape, dtype=torch.int8, device=scores.device)
    held = max(COLUMNS, triton.next_power_of_2(num_columns))
    select_kernel[(batch * num_rows,)](
        scores, kv_indices, class_map, num_columns, num_critical, num_negligible,
        CLASSES=classes, COLUMNS=held, num_warps=max(1, held // 1024),
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
    column_lists_kernel[(triton.cdiv(num_columns, LIST_COLUMNS) * batch,)](
        classes, q_offsets, q_indices, num_rows, num_columns, num_rows * num_critical,
        ROWS=LIST_ROWS, COLUMNS=LIST_COLUMNS, num_warps=4,
    )  # fmt: skip
    return q_indices, q_offsets
