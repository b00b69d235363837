"""The (D, D) states of the linear branch, summed over blocks of keys, and the same sums over queries for the backward.

    keys      H = sum phi(k)^T v        z = sum phi(k)
    queries   G = sum u^T do            g = -sum u d           u = phi(q) z / (phi(q) . z + e)

One state for each block, or for each run of blocks where one sum over all tokens is wanted: those are then added in a
fixed order, so the result never depends on timing.

An outlier channel makes phi of all others as small as float16's least number, and 1 / z as large as its inverse. So
sums are held in float32, or in bfloat16 for bfloat16 input, which has the same range; products with phi of float16
input run in TF32; and what leaves for another kernel is normalised first: H / z is a mean of values, u^T do a weighted
sum.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from slagen.kernels.primitives import (
    feature_shift,
    feature_values,
    load_rows,
    load_square,
    reciprocal,
    softmax_factor,
    store_square,
    wide,
)
from slagen.kernels.resources import Tiles, tiles

PROGRAMS = 512  # runs of all heads together: enough to fill a card, few enough that adding them costs little
# Rows and blocks of the 0/1 domain that states are multiplied with at a time, and warps.
MIX_TILE = (64, 32, 4)
MIX_TILE_SMALL = (16, 16, 8)  # for float32, which tensor cores do not multiply, and for heads of 256
COMBINED = 16  # rows of a state that one program adds up


@triton.jit(do_not_specialize=["length", "num_blocks", "runs", "run_blocks"])
def key_states_kernel(
    k_ptr,
    v_ptr,
    mean_ptr,
    state_ptr,
    z_ptr,
    weight_ptr,
    k_b,
    k_h,
    k_l,
    k_d,
    v_b,
    v_h,
    v_l,
    v_d,
    num_heads,
    length,
    num_blocks,
    runs,
    run_blocks,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    FEATURE_MAP: tl.constexpr,
    POOL: tl.constexpr,
    PROJECT: tl.constexpr,
    SHORT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One run of key blocks: pooled keys where POOL, H (times W^T where PROJECT) and z, in one pass over K and V."""
    run = tl.program_id(0).to(tl.int64) % runs
    bh = tl.program_id(0).to(tl.int64) // runs
    k_base = k_ptr + (bh // num_heads) * k_b + (bh % num_heads) * k_h
    v_base = v_ptr + (bh // num_heads) * v_b + (bh % num_heads) * v_h
    offs_d = tl.arange(0, HEAD_DIM)
    # H^T, so that the first operand, v^T, lies in shared memory as it was loaded.
    acc = tl.zeros((HEAD_DIM, HEAD_DIM), dtype=tl.float32)
    z = tl.zeros((16, HEAD_DIM), dtype=tl.float32)
    total = tl.zeros((HEAD_DIM,), dtype=tl.float32)
    first = run * run_blocks
    last = tl.minimum(first + run_blocks, num_blocks)
    PARTS: tl.constexpr = BLOCK // TILE
    for t in range(first * PARTS, last * PARTS):
        begin = t * TILE
        # The tile that would cross the end starts earlier, so that no load has a mask; what it repeats is set to 0.
        start = begin if SHORT else tl.minimum(begin, length - TILE)
        k = load_rows(k_base, k_l, k_d, start, length, TILE, HEAD_DIM, SHORT)
        v = load_rows(v_base, v_l, v_d, start, length, TILE, HEAD_DIM, SHORT)
        x = k.to(tl.float32)
        phi = feature_values(x, feature_shift(x, FEATURE_MAP), FEATURE_MAP)
        phi = phi * softmax_factor(phi, FEATURE_MAP)[:, None]
        if begin + TILE > length:
            rows = start + tl.arange(0, TILE)
            inside = ((rows >= begin) & (rows < length))[:, None]
            phi = tl.where(inside, phi, 0.0)
            x = tl.where(inside, x, 0.0)
        z += tl.sum(tl.reshape(phi, (TILE // 16, 16, HEAD_DIM)), 0)  # within a thread; across them once, at the end
        acc = tl.dot(tl.trans(wide(v)), phi.to(wide(v).dtype), acc, input_precision=PRECISION)
        if POOL:
            total += tl.sum(x, 0)
            block = t // PARTS
            complete = t % PARTS == PARTS - 1
            share = 1.0 / tl.minimum(length - block * BLOCK, BLOCK).to(tl.float32)
            tl.store(mean_ptr + (bh * num_blocks + block) * HEAD_DIM + offs_d, total * share, mask=complete)
            total = tl.where(complete, 0.0, total)
    acc = tl.trans(acc)
    if PROJECT:
        weight = load_square(weight_ptr, HEAD_DIM)
        acc = tl.dot(acc.to(weight.dtype), tl.trans(weight), input_precision=PRECISION)
    place = bh * runs + run
    store_square(state_ptr + place * HEAD_DIM * HEAD_DIM, acc, HEAD_DIM)
    tl.store(z_ptr + place * HEAD_DIM + offs_d, tl.sum(z, 0))


@triton.jit(do_not_specialize=["length", "num_blocks", "runs", "run_blocks"])
def query_states_kernel(
    q_ptr,
    do_ptr,
    z_ptr,
    dlinear_ptr,
    state_ptr,
    g_ptr,
    q_b,
    q_h,
    q_l,
    q_d,
    do_b,
    do_h,
    do_l,
    do_d,
    num_heads,
    length,
    num_blocks,
    runs,
    run_blocks,
    eps,
    MARGINAL: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    FEATURE_MAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One run of query blocks: u^T dO and -u^T d; where MARGINAL divided by z, the gradients of H W^T and of z."""
    run = tl.program_id(0).to(tl.int64) % runs
    bh = tl.program_id(0).to(tl.int64) // runs
    q_base = q_ptr + (bh // num_heads) * q_b + (bh % num_heads) * q_h
    do_base = do_ptr + (bh // num_heads) * do_b + (bh % num_heads) * do_h
    offs_d = tl.arange(0, HEAD_DIM)
    place = bh * runs + run
    z = tl.load(z_ptr + (place if MARGINAL else bh) * HEAD_DIM + offs_d)
    acc = tl.zeros((HEAD_DIM, HEAD_DIM), dtype=tl.float32)  # transposed, as in `key_states_kernel`
    g = tl.zeros((16, HEAD_DIM), dtype=tl.float32)
    first = run * run_blocks
    last = tl.minimum(first + run_blocks, num_blocks)
    PARTS: tl.constexpr = BLOCK // TILE
    offs_m = tl.arange(0, TILE)
    for t in range(first * PARTS, last * PARTS):
        start = t * TILE
        q = load_rows(q_base, q_l, q_d, start, length, TILE, HEAD_DIM, True)
        do = load_rows(do_base, do_l, do_d, start, length, TILE, HEAD_DIM, True)  # 0 past the end
        dlinear = tl.load(dlinear_ptr + bh * length + start + offs_m, mask=offs_m < length - start, other=0.0)
        values = feature_values(q, feature_shift(q, FEATURE_MAP), FEATURE_MAP)
        values = values * softmax_factor(values, FEATURE_MAP)[:, None]
        u = values * z[None, :]
        u = u * reciprocal(tl.sum(u, 1) + eps)[:, None]
        g -= tl.sum(tl.reshape(u * dlinear[:, None], (TILE // 16, 16, HEAD_DIM)), 0)
        acc = tl.dot(tl.trans(wide(do)), u.to(wide(do).dtype), acc, input_precision=PRECISION)
    acc = tl.trans(acc)
    total = tl.sum(g, 0)
    if MARGINAL:
        inverse = reciprocal(z)
        acc = acc * inverse[:, None]
        total = total * inverse
    store_square(state_ptr + place * HEAD_DIM * HEAD_DIM, acc, HEAD_DIM)
    tl.store(g_ptr + place * HEAD_DIM + offs_d, total)


@triton.jit(do_not_specialize=["runs", "length"])
def combine_kernel(
    state_ptr,
    z_ptr,
    weight_ptr,
    mean_ptr,
    total_ptr,
    folded_ptr,
    runs,
    length,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SAVE: tl.constexpr,
):
    """ROWS rows of one head's state: the sum over its runs divided by z, and the product of that with W^T."""
    rows = tl.program_id(0) % (HEAD_DIM // ROWS) * ROWS + tl.arange(0, ROWS)
    bh = (tl.program_id(0) // (HEAD_DIM // ROWS)).to(tl.int64)
    offs_d = tl.arange(0, HEAD_DIM)
    acc = tl.zeros((ROWS, HEAD_DIM), dtype=tl.float32)
    z = tl.zeros((ROWS,), dtype=tl.float32)
    for run in range(runs):
        place = bh * runs + run
        acc += tl.load(state_ptr + (place * HEAD_DIM + rows[:, None]) * HEAD_DIM + offs_d[None, :])
        z += tl.load(z_ptr + place * HEAD_DIM + rows)
    mean = acc * reciprocal(z)[:, None]
    tl.store(total_ptr + bh * HEAD_DIM + rows, z / length)
    if SAVE:
        tl.store(mean_ptr + (bh * HEAD_DIM + rows[:, None]) * HEAD_DIM + offs_d[None, :], mean)
    for first in range(0, HEAD_DIM, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        weight = tl.load(weight_ptr + columns[:, None] * HEAD_DIM + offs_d[None, :]).to(tl.float32)
        folded = tl.dot(mean, tl.trans(weight), input_precision="ieee")
        ptrs = folded_ptr + (bh * HEAD_DIM + rows[:, None]) * HEAD_DIM + columns[None, :]
        tl.store(ptrs, folded.to(folded_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["num_rows", "num_blocks"])
def mix_kernel(
    class_ptr,
    state_ptr,
    z_ptr,
    scale_ptr,
    mixed_ptr,
    total_ptr,
    num_rows,
    num_blocks,
    row_stride,
    block_stride,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    NORMALISE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One channel of the states of ROWS rows: the sum of the states of each row's marginal blocks, as one product.

    NORMALISE divides the sum by that of z; otherwise both are multiplied by the row's `scale`.
    """
    tiles_m = tl.cdiv(num_rows, ROWS)
    pid = tl.program_id(0)
    channel = pid // tiles_m % HEAD_DIM
    bh = (pid // tiles_m // HEAD_DIM).to(tl.int64)
    offs_m = (pid % tiles_m * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    offs_d = tl.arange(0, HEAD_DIM)
    base = bh * num_rows * num_blocks
    acc = tl.zeros((HEAD_DIM, ROWS), dtype=tl.float32)  # transposed, as in `key_states_kernel`
    total = tl.zeros((ROWS,), dtype=tl.float32)
    for start in range(0, num_blocks, BLOCKS):
        offs_n = (start + tl.arange(0, BLOCKS)).to(tl.int64)
        inside = offs_n < num_blocks
        ptrs = class_ptr + base + offs_m[:, None] * row_stride + offs_n[None, :] * block_stride
        marginal = tl.load(ptrs, mask=(offs_m < num_rows)[:, None] & inside[None, :], other=1) == 0
        place = bh * num_blocks + offs_n
        ptrs = state_ptr + (place[:, None] * HEAD_DIM + channel) * HEAD_DIM + offs_d[None, :]
        state = tl.load(ptrs, mask=inside[:, None], other=0.0)
        acc = tl.dot(tl.trans(state), tl.trans(marginal.to(state.dtype)), acc, input_precision=PRECISION)
        z = tl.load(z_ptr + place * HEAD_DIM + channel, mask=inside, other=0.0)
        total += tl.sum(tl.where(marginal, z[None, :], 0.0), 1)
    place = (bh * num_rows + offs_m) * HEAD_DIM + channel
    inside = offs_m < num_rows
    if NORMALISE:
        factor = reciprocal(total)
    else:
        factor = tl.load(scale_ptr + place, mask=inside, other=0.0)
        total = total * factor
    ptrs = mixed_ptr + place[:, None] * HEAD_DIM + offs_d[None, :]
    tl.store(ptrs, (tl.trans(acc) * factor[:, None]).to(mixed_ptr.dtype.element_ty), mask=inside[:, None])
    tl.store(total_ptr + place, total, mask=inside)


def _runs(num_blocks: int, num_heads: int, marginal: bool) -> tuple[int, int]:
    """How many runs of how many blocks."""
    length = 1 if marginal else max(1, triton.cdiv(num_blocks * num_heads, PROGRAMS))
    return triton.cdiv(num_blocks, length), length


def key_states(
    k: Tensor, v: Tensor, block: int, feature_map: str, marginal: bool, weight: Tensor | None, pool: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum the keys' part of the linear branch.

    Args:
        k, v: (B, H, L, D), any strides.
        marginal: a state for each block; otherwise for each run of blocks, to be added up.
        weight: (D, D), contiguous, in `state_dtype(k)`: multiply the states by its transpose; None does not.
        pool: also take the mean of each block of keys.
    Returns:
        means: (B * H, N, D) float32; empty where not wanted.
        states: (B * H, N, D, D) in `state_dtype(k)` where marginal, otherwise (B * H, runs, D, D) float32.
        z: (B * H, N or runs, D) float32.
    """
    batch, num_heads, length, head_dim = k.shape
    heads, num_blocks = batch * num_heads, triton.cdiv(length, block)
    runs, run_blocks = _runs(num_blocks, heads, marginal)
    means = torch.empty((heads, num_blocks, head_dim) if pool else 0, dtype=torch.float32, device=k.device)
    dtype = state_dtype(k) if marginal else torch.float32
    states = torch.empty(heads, runs, head_dim, head_dim, dtype=dtype, device=k.device)
    z = torch.empty(heads, runs, head_dim, dtype=torch.float32, device=k.device)
    tile: Tiles = tiles("states", k, block, block)
    key_states_kernel[(runs * heads,)](
        k, v, means, states, z, weight, *k.stride(), *v.stride(), num_heads, length, num_blocks, runs, run_blocks,
        BLOCK=block, TILE=tile.n, HEAD_DIM=head_dim, FEATURE_MAP=feature_map, POOL=pool, PROJECT=weight is not None,
        SHORT=length < tile.n, PRECISION=precision(k), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return means, states, z


def query_states(
    q: Tensor, do: Tensor, z: Tensor, dlinear: Tensor, block: int, feature_map: str, marginal: bool, eps: float
) -> tuple[Tensor, Tensor]:
    """Sum the queries' part of the gradients of the states.

    Args:
        q, do: (B, H, L, D), any strides.
        z: (B * H, M, D) float32 where marginal, otherwise (B * H, 1, D).
        dlinear: (B * H, L) float32, rowsum(dO * O^l W^T).
    Returns:
        dstates: where marginal u^T dO / z, (B * H, M, D, D) in `state_dtype(q)`; otherwise u^T dO, (B * H, D, D) in
            float32.
        dz: -u^T d, likewise, (B * H, M, D) or (B * H, D) float32.
    """
    batch, num_heads, length, head_dim = q.shape
    heads, num_blocks = batch * num_heads, triton.cdiv(length, block)
    runs, run_blocks = _runs(num_blocks, heads, marginal)
    dtype = state_dtype(q) if marginal else torch.float32
    dstates = torch.empty(heads, runs, head_dim, head_dim, dtype=dtype, device=q.device)
    dz = torch.empty(heads, runs, head_dim, dtype=torch.float32, device=q.device)
    tile: Tiles = tiles("states", q, block, block)
    query_states_kernel[(runs * heads,)](
        q, do, z, dlinear, dstates, dz, *q.stride(), *do.stride(), num_heads, length, num_blocks, runs, run_blocks, eps,
        MARGINAL=marginal, BLOCK=block, TILE=tile.m, HEAD_DIM=head_dim, FEATURE_MAP=feature_map,
        PRECISION=precision(q), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return (dstates, dz) if marginal else (dstates.sum(1), dz.sum(1))


def combine(
    states: Tensor, zs: Tensor, weight: Tensor, length: int, dtype: torch.dtype, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Add up the runs of every head, normalise the sum and project it, in one launch.

    Args:
        states, zs: (B * H, runs, D, D) and (B * H, runs, D) float32, as `key_states` returns them.
        weight: (D, D), contiguous: W. length: L. save: also return the state before the projection.
    Returns: (H / z) W^T, (B * H, D, D) in `dtype`; z / L, (B * H, D) float32; H / z, (B * H, D, D) float32, or empty.
    """
    heads, runs, head_dim, _ = states.shape
    folded = torch.empty(heads, head_dim, head_dim, dtype=dtype, device=states.device)
    z = torch.empty(heads, head_dim, dtype=torch.float32, device=states.device)
    mean = torch.empty((heads, head_dim, head_dim) if save else 0, dtype=torch.float32, device=states.device)
    combine_kernel[(heads * (head_dim // COMBINED),)](
        states, zs, weight, mean, z, folded, runs, length,
        HEAD_DIM=head_dim, ROWS=COMBINED, COLUMNS=min(head_dim, 32), SAVE=save, num_warps=4,
    )  # fmt: skip
    return folded, z, mean


def mix(
    states: Tensor, zs: Tensor, classes: Tensor, scale: Tensor | None, dtype: torch.dtype, precision: str
) -> tuple[Tensor, Tensor]:
    """Sum the states of each row's marginal blocks.

    Args:
        states, zs: (B * H, N, D, D) and (B * H, N, D) float32.
        classes: (B * H, M, N) int8, any strides: the backward pass gives the transpose.
        scale: (B * H, M, D) float32, what the sums are multiplied by; None divides them by that of zs.
        precision: as `precision` gives it.
    Returns: (B * H, M, D, D) in `dtype`; the sums of zs, times `scale` if given, (B * H, M, D) float32.
    """
    heads, num_rows, num_blocks = classes.shape
    head_dim = states.shape[-1]
    mixed = torch.empty(heads, num_rows, head_dim, head_dim, dtype=dtype, device=states.device)
    total = torch.empty(heads, num_rows, head_dim, dtype=torch.float32, device=states.device)
    rows, blocks, warps = MIX_TILE if precision == "tf32" and head_dim <= 128 else MIX_TILE_SMALL
    mix_kernel[(triton.cdiv(num_rows, rows) * head_dim * heads,)](
        classes, states, zs, scale, mixed, total, num_rows, num_blocks, classes.stride(1), classes.stride(2),
        HEAD_DIM=head_dim, ROWS=rows, BLOCKS=blocks, NORMALISE=scale is None,
        PRECISION=precision, num_warps=warps, num_stages=3,
    )  # fmt: skip
    return mixed, total


def projects(x: Tensor) -> bool:
    """Whether `key_states` can multiply the states of single blocks by W^T: two (D, D) operands must fit on chip."""
    return state_dtype(x) == torch.bfloat16 and x.shape[-1] <= 128


def state_dtype(x: Tensor) -> torch.dtype:
    """In what the states of single blocks are kept: what has float32's range."""
    return torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32


def precision(x: Tensor) -> str:
    """How tl.dot multiplies float32: exactly for float32 input; half precision's own sums are in TF32."""
    return "ieee" if x.dtype == torch.float32 else "tf32"
