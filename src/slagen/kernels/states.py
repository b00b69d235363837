"""The (D, D) states of the linear branch, summed over blocks of keys, and the same sums over queries for the backward.

    keys      H = sum phi(k)^T v        z = sum phi(k)
    queries   G = sum u^T do            g = -sum u d           u = phi(q) z / (phi(q) . z + e)

One state for each block, or for each run of blocks where one sum over all tokens is wanted: those are then added in a
fixed order, so the result never depends on timing.
"""

import math

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
)
from slagen.kernels.resources import Tiles, tiles

PROGRAMS = 512  # runs of all heads together: enough to fill a card, few enough that adding them costs little


@triton.jit
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
    run_blocks,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    FEATURE_MAP: tl.constexpr,
    POOL: tl.constexpr,
    PROJECT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One run of key blocks: pooled keys where POOL, H (times W^T where PROJECT) and z, in one pass over K and V."""
    run = tl.program_id(0).to(tl.int64)
    bh = tl.program_id(1).to(tl.int64)
    k_base = k_ptr + (bh // num_heads) * k_b + (bh % num_heads) * k_h
    v_base = v_ptr + (bh // num_heads) * v_b + (bh % num_heads) * v_h
    offs_d = tl.arange(0, HEAD_DIM)
    acc = tl.zeros((HEAD_DIM, HEAD_DIM), dtype=tl.float32)
    z = tl.zeros((HEAD_DIM,), dtype=tl.float32)
    first = run * run_blocks
    last = tl.minimum(first + run_blocks, num_blocks)
    PARTS: tl.constexpr = BLOCK // TILE
    total = tl.zeros((HEAD_DIM,), dtype=tl.float32)
    for t in range(first * PARTS, last * PARTS):
        start = t * TILE
        k = load_rows(k_base, k_l, k_d, start, length, TILE, HEAD_DIM, True)
        v = load_rows(v_base, v_l, v_d, start, length, TILE, HEAD_DIM, True)
        phi = feature_values(k, feature_shift(k, FEATURE_MAP), FEATURE_MAP)
        phi = phi * softmax_factor(phi, FEATURE_MAP)[:, None]
        phi = tl.where((tl.arange(0, TILE) < length - start)[:, None], phi, 0.0)
        z += tl.sum(phi, 0)
        acc = tl.dot(tl.trans(phi.to(v.dtype)), v, acc, input_precision=PRECISION)
        if POOL:
            total += tl.sum(k.to(tl.float32), 0)
            block = t // PARTS
            complete = t % PARTS == PARTS - 1
            count = tl.minimum(length - block * BLOCK, BLOCK).to(tl.float32)
            tl.store(mean_ptr + (bh * num_blocks + block) * HEAD_DIM + offs_d, total / count, mask=complete)
            total = tl.where(complete, 0.0, total)
    if PROJECT:
        weight = load_square(weight_ptr, HEAD_DIM)
        acc = tl.dot(acc.to(weight.dtype), tl.trans(weight), input_precision=PRECISION)
    place = bh * tl.num_programs(0) + run
    store_square(state_ptr + place * HEAD_DIM * HEAD_DIM, acc, HEAD_DIM)
    tl.store(z_ptr + place * HEAD_DIM + offs_d, z)


@triton.jit
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
    run_blocks,
    eps,
    MARGINAL: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    FEATURE_MAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One run of query blocks: u^T dO and -u^T d, both divided by z: the gradients of the state H W^T and of z."""
    run = tl.program_id(0).to(tl.int64)
    bh = tl.program_id(1).to(tl.int64)
    q_base = q_ptr + (bh // num_heads) * q_b + (bh % num_heads) * q_h
    do_base = do_ptr + (bh // num_heads) * do_b + (bh % num_heads) * do_h
    offs_d = tl.arange(0, HEAD_DIM)
    place = bh * tl.num_programs(0) + run
    z = tl.load(z_ptr + (place if MARGINAL else bh) * HEAD_DIM + offs_d)
    acc = tl.zeros((HEAD_DIM, HEAD_DIM), dtype=tl.float32)
    g = tl.zeros((HEAD_DIM,), dtype=tl.float32)
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
        g -= tl.sum(u * dlinear[:, None], 0)
        acc = tl.dot(tl.trans(u.to(do.dtype)), do, acc, input_precision=PRECISION)
    inverse = reciprocal(z)
    store_square(state_ptr + place * HEAD_DIM * HEAD_DIM, acc * inverse[:, None], HEAD_DIM)
    tl.store(g_ptr + place * HEAD_DIM + offs_d, g * inverse)


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
        weight: (D, D) in k's dtype: multiply the states by its transpose; None does not.
        pool: also take the mean of each block of keys.
    Returns:
        means: (B * H, N, D) float32; empty where not wanted.
        states: (B * H, N, D, D) in k's dtype where marginal, otherwise (B * H, runs, D, D) float32.
        z: (B * H, N or runs, D) float32.
    """
    batch, num_heads, length, head_dim = k.shape
    heads, num_blocks = batch * num_heads, triton.cdiv(length, block)
    runs, run_blocks = _runs(num_blocks, heads, marginal)
    means = torch.empty((heads, num_blocks, head_dim) if pool else 0, dtype=torch.float32, device=k.device)
    dtype = k.dtype if marginal else torch.float32
    states = torch.empty(heads, runs, head_dim, head_dim, dtype=dtype, device=k.device)
    z = torch.empty(heads, runs, head_dim, dtype=torch.float32, device=k.device)
    tile: Tiles = tiles("states", k, block, block)
    project = weight is not None and head_dim <= 128  # two (D, D) operands must fit on chip
    key_states_kernel[(runs, heads)](
        k, v, means, states, z, weight, *k.stride(), *v.stride(), num_heads, length, num_blocks, run_blocks,
        BLOCK=block, TILE=tile.n, HEAD_DIM=head_dim, FEATURE_MAP=feature_map, POOL=pool, PROJECT=project,
        PRECISION=precision(k), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if weight is not None and not project:
        states = states @ weight.mT
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
        dstates: (B * H, M, D, D) in q's dtype where marginal, otherwise (B * H, 1, D, D) float32.
        dz: (B * H, M or 1, D) float32.
    """
    batch, num_heads, length, head_dim = q.shape
    heads, num_blocks = batch * num_heads, triton.cdiv(length, block)
    runs, run_blocks = _runs(num_blocks, heads, marginal)
    dtype = q.dtype if marginal else torch.float32
    dstates = torch.empty(heads, runs, head_dim, head_dim, dtype=dtype, device=q.device)
    dz = torch.empty(heads, runs, head_dim, dtype=torch.float32, device=q.device)
    tile: Tiles = tiles("states", q, block, block)
    query_states_kernel[(runs, heads)](
        q, do, z, dlinear, dstates, dz, *q.stride(), *do.stride(), num_heads, length, num_blocks, run_blocks, eps,
        MARGINAL=marginal, BLOCK=block, TILE=tile.m, HEAD_DIM=head_dim, FEATURE_MAP=feature_map,
        PRECISION=precision(q), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if marginal:
        return dstates, dz
    return dstates.sum(1, keepdim=True), dz.sum(1, keepdim=True)


def fold(state: Tensor, z: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Normalise the one state of every head and project it: (H / z) W^T, (B * H, D, D) in `dtype`."""
    normal = torch.where(z[..., None] > 0, state / z[..., None], 0.0)
    return (normal @ weight.float().mT).to(dtype)


def marginal_states(states: Tensor, zs: Tensor, classes: Tensor, others: int) -> tuple[Tensor, Tensor]:
    """Sum the states of each row's marginal blocks, as one matrix product, divided by a power of two near their number.

    The division keeps float16 in range and changes no digit; it cancels between H and z.

    Args:
        states, zs: (B * H, N, D, D) and (B * H, N, D).
        classes: (B * H, M, N) int8.
        others: how many blocks of a row are not marginal.
    Returns: (B * H, M, D, D) in states' dtype, and (B * H, M, D) float32.
    """
    mask = marginal_mask(classes, others)
    mixed = torch.bmm(mask.to(states.dtype), states.flatten(2)).unflatten(2, states.shape[2:])
    return mixed, torch.bmm(mask, zs)


def marginal_mask(classes: Tensor, others: int) -> Tensor:
    """2^-n where a block is marginal, 0 elsewhere, (B * H, M, N) float32; 2^n is at least their number in a row."""
    number = max(1, classes.shape[2] - others)
    return (classes == 0).float() * 2.0 ** -math.ceil(math.log2(number))


def precision(x: Tensor) -> str:
    """How tl.dot multiplies float32: exactly. Half precision has one way only."""
    return "ieee" if x.dtype == torch.float32 else "tf32"
