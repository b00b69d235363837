"""The backward pass: dq by rows, the gradients of the states, dk and dv by columns. No atomics, so it is repeatable.

With u = phi(q) z / (phi(q) . z + e) and the folded state F = (H / z) W^T, O^l W^T = u F. Every gradient of the linear
branch follows from F, from d = rowsum(dO * O^l W^T), and from G = sum u^T dO / z:

    dphi(q) = z (dO F^T - d) / (phi(q) . z + e)      dH = G W      dz = -sum u d / z      dW = sum G^T H
    dphi(k) = v dH^T + dz                            dv = phi(k) dH

and delta, the sparse branch's rowsum(dO * O^s), is rowsum(dO * o) - d - dO . b, so O^s and O^l are not kept. What is:
q, k, v, o, lse, the lists, and in the domain "all" one state for each head. The states of single blocks, and their sums
over the marginal blocks of each row, are made again: at 480p they are 0.2 GB each in a layer.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from slagen.kernels.primitives import (
    COLUMNS_AT_ONCE,
    LOG2_E,
    feature_map_backward,
    feature_shift,
    feature_values,
    load_columns,
    load_rows,
    reciprocal,
    softmax_factor,
    store_rows,
    times_transposed,
)
from slagen.kernels.resources import Tiles, tiles
from slagen.kernels.states import fold, key_states, marginal_mask, marginal_states, precision, query_states


@triton.jit
def _dq_tiles(
    q, do, lse, delta, k_base, v_base, kv_ptr, begin, end, acc, k_l, k_d, v_l, v_d, length, scale_log2,
    BLOCK_N: tl.constexpr, TILE_N: tl.constexpr, HEAD_DIM: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add dS K of tiles `begin` to `end` of the listed blocks; MASKED where one may cross the end of the sequence."""
    PARTS: tl.constexpr = BLOCK_N // TILE_N
    for t in range(begin, end):
        start = tl.load(kv_ptr + t // PARTS).to(tl.int64) * BLOCK_N + (t % PARTS) * TILE_N
        k = load_rows(k_base, k_l, k_d, start, length, TILE_N, HEAD_DIM, MASKED)
        v = load_rows(v_base, v_l, v_d, start, length, TILE_N, HEAD_DIM, MASKED)
        qk = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
        if MASKED:
            qk = tl.where((tl.arange(0, TILE_N) < length - start)[None, :], qk, -float("inf"))
        p = tl.math.exp2(qk - lse[:, None])
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        ds = p * (dp - delta[:, None])
        acc = tl.dot(ds.to(k.dtype), k, acc, input_precision=PRECISION)
    return acc


@triton.jit
def dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    do_ptr,
    dq_ptr,
    lse_ptr,
    delta_ptr,
    dlinear_ptr,
    kv_ptr,
    state_ptr,
    z_ptr,
    bias_ptr,
    q_b,
    q_h,
    q_l,
    q_d,
    k_b,
    k_h,
    k_l,
    k_d,
    v_b,
    v_h,
    v_l,
    v_d,
    o_b,
    o_h,
    o_l,
    o_d,
    do_b,
    do_h,
    do_l,
    do_d,
    dq_b,
    dq_h,
    dq_l,
    dq_d,
    num_heads,
    length,
    num_rows,
    topk,
    scale,
    scale_log2,
    eps,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    SPARSE: tl.constexpr,
    LINEAR: tl.constexpr,
    MARGINAL: tl.constexpr,
    BIAS: tl.constexpr,
    FEATURE_MAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """TILE_M rows of dq of both branches, and of delta and d, which the other kernels read."""
    tile = tl.program_id(0).to(tl.int64)
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // num_heads, bh % num_heads
    start_m = tile * TILE_M
    row = bh * num_rows + start_m // BLOCK_M
    offs_m = tl.arange(0, TILE_M)
    inside = offs_m < length - start_m
    q = load_rows(q_ptr + b * q_b + h * q_h, q_l, q_d, start_m, length, TILE_M, HEAD_DIM, True)
    do_base = do_ptr + b * do_b + h * do_h
    do = load_rows(do_base, do_l, do_d, start_m, length, TILE_M, HEAD_DIM, True)
    delta = tl.zeros((TILE_M,), dtype=tl.float32)
    if SPARSE:
        o = load_rows(o_ptr + b * o_b + h * o_h, o_l, o_d, start_m, length, TILE_M, HEAD_DIM, True)
        delta += tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
        if BIAS:
            bias = tl.load(bias_ptr + tl.arange(0, HEAD_DIM)).to(tl.float32)
            delta -= tl.sum(do.to(tl.float32) * bias[None, :], 1)

    acc = tl.zeros((TILE_M, HEAD_DIM), dtype=tl.float32)
    if LINEAR:
        place = row if MARGINAL else bh
        z = tl.load(z_ptr + place * HEAD_DIM + tl.arange(0, HEAD_DIM))
        do_state = times_transposed(
            do_base, do_l, do_d, start_m, length, state_ptr + place * HEAD_DIM * HEAD_DIM,
            TILE_M, HEAD_DIM, CHUNK, PRECISION,
        )  # fmt: skip
        if not MARGINAL:
            do_state = do_state * z[None, :]  # now dO (H W^T)^T in both domains
        phi = feature_values(q, feature_shift(q, FEATURE_MAP), FEATURE_MAP)
        phi = phi * softmax_factor(phi, FEATURE_MAP)[:, None]
        inverse = reciprocal(tl.sum(phi * z[None, :], 1) + eps)
        d = tl.sum(phi * do_state, 1) * inverse  # = rowsum(dO * O^l W^T)
        tl.store(dlinear_ptr + bh * length + start_m + offs_m, d, mask=inside)
        delta -= d
        acc = feature_map_backward((do_state - d[:, None] * z[None, :]) * inverse[:, None], phi, FEATURE_MAP)

    if SPARSE:
        tl.store(delta_ptr + bh * length + start_m + offs_m, delta, mask=inside)
        lse = tl.load(lse_ptr + bh * length + start_m + offs_m, mask=inside, other=0.0)
        k_base, v_base = k_ptr + b * k_b + h * k_h, v_ptr + b * v_b + h * v_h
        kv_row = kv_ptr + row * topk
        whole, all_tiles = (topk - 1) * (BLOCK_N // TILE_N), topk * (BLOCK_N // TILE_N)
        acc = acc / scale
        acc = _dq_tiles(
            q, do, lse, delta, k_base, v_base, kv_row, 0, whole, acc, k_l, k_d, v_l, v_d, length, scale_log2,
            BLOCK_N, TILE_N, HEAD_DIM, False, PRECISION,
        )  # fmt: skip
        acc = _dq_tiles(
            q, do, lse, delta, k_base, v_base, kv_row, whole, all_tiles, acc, k_l, k_d, v_l, v_d, length, scale_log2,
            BLOCK_N, TILE_N, HEAD_DIM, True, PRECISION,
        )  # fmt: skip
        acc = acc * scale
    store_rows(dq_ptr + b * dq_b + h * dq_h, dq_l, dq_d, start_m, length, acc, TILE_M, HEAD_DIM)


@triton.jit
def dkv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    dk_ptr,
    dv_ptr,
    lse_ptr,
    delta_ptr,
    list_ptr,
    offset_ptr,
    dstate_ptr,
    dz_ptr,
    q_b,
    q_h,
    q_l,
    q_d,
    k_b,
    k_h,
    k_l,
    k_d,
    v_b,
    v_h,
    v_l,
    v_d,
    do_b,
    do_h,
    do_l,
    do_d,
    dk_b,
    dk_h,
    dk_l,
    dk_d,
    dv_b,
    dv_h,
    dv_l,
    dv_d,
    num_heads,
    length,
    num_columns,
    list_length,
    scale,
    scale_log2,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    SPARSE: tl.constexpr,
    LINEAR: tl.constexpr,
    MARGINAL: tl.constexpr,
    FEATURE_MAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """TILE_N rows of dk and dv: walk the query blocks that hold this key block critical, add the linear branch."""
    tile = tl.program_id(0).to(tl.int64)
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // num_heads, bh % num_heads
    start_n = tile * TILE_N
    column = start_n // BLOCK_N
    k_base, v_base = k_ptr + b * k_b + h * k_h, v_ptr + b * v_b + h * v_h
    k = load_rows(k_base, k_l, k_d, start_n, length, TILE_N, HEAD_DIM, True)
    v = load_rows(v_base, v_l, v_d, start_n, length, TILE_N, HEAD_DIM, True)
    dk = tl.zeros((TILE_N, HEAD_DIM), dtype=tl.float32)
    dv = tl.zeros((TILE_N, HEAD_DIM), dtype=tl.float32)

    if LINEAR:
        place = bh * num_columns + column if MARGINAL else bh
        offs_d = tl.arange(0, HEAD_DIM)
        dstate_base = dstate_ptr + place * HEAD_DIM * HEAD_DIM
        shift = feature_shift(k, FEATURE_MAP)
        factor = softmax_factor(feature_values(k, shift, FEATURE_MAP), FEATURE_MAP)
        for first in tl.static_range(0, HEAD_DIM, CHUNK):
            x = load_columns(k_base, k_l, k_d, start_n, first, length, TILE_N, CHUNK)
            phi = feature_values(x, shift, FEATURE_MAP) * factor[:, None]
            dstate = tl.load(dstate_base + (first + tl.arange(0, CHUNK))[:, None] * HEAD_DIM + offs_d[None, :])
            dv = tl.dot(phi.to(v.dtype), dstate, dv, input_precision=PRECISION)
        dphi = times_transposed(
            v_base, v_l, v_d, start_n, length, dstate_base, TILE_N, HEAD_DIM, CHUNK, PRECISION
        )  # fmt: skip
        dphi += tl.load(dz_ptr + place * HEAD_DIM + offs_d)[None, :]
        phi = feature_values(k, shift, FEATURE_MAP) * factor[:, None]
        dk = feature_map_backward(dphi, phi, FEATURE_MAP)

    if SPARSE:
        dk = dk / scale
        q_base, do_base = q_ptr + b * q_b + h * q_h, do_ptr + b * do_b + h * do_h
        PARTS: tl.constexpr = BLOCK_M // TILE_M
        offsets = offset_ptr + bh * (num_columns + 1) + column
        list_row = list_ptr + bh * list_length
        offs_m = tl.arange(0, TILE_M)
        for t in range(tl.load(offsets) * PARTS, tl.load(offsets + 1) * PARTS):
            start_m = tl.load(list_row + t // PARTS).to(tl.int64) * BLOCK_M + (t % PARTS) * TILE_M
            q = load_rows(q_base, q_l, q_d, start_m, length, TILE_M, HEAD_DIM, True)
            do = load_rows(do_base, do_l, do_d, start_m, length, TILE_M, HEAD_DIM, True)
            inside = offs_m < length - start_m
            lse = tl.load(lse_ptr + bh * length + start_m + offs_m, mask=inside, other=float("inf"))
            delta = tl.load(delta_ptr + bh * length + start_m + offs_m, mask=inside, other=0.0)
            kq = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale_log2
            p = tl.math.exp2(kq - lse[None, :])
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
            dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
            ds = p * (dp - delta[None, :])
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
        dk = dk * scale
    store_rows(dk_ptr + b * dk_b + h * dk_h, dk_l, dk_d, start_n, length, dk, TILE_N, HEAD_DIM)
    store_rows(dv_ptr + b * dv_b + h * dv_h, dv_l, dv_d, start_n, length, dv, TILE_N, HEAD_DIM)


def sla_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    o: Tensor,
    lse: Tensor,
    kv_indices: Tensor,
    classes: Tensor,
    q_indices: Tensor,
    q_offsets: Tensor,
    state: Tensor,
    z: Tensor,
    *,
    block_m: int,
    block_n: int,
    num_critical: int,
    num_negligible: int,
    marginal: bool,
    feature_map: str,
    eps: float,
    scale: float,
    sparse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `sla_forward`.

    Args:
        do: (B, H, L, D) in q's dtype, any strides.
        q, k, v, weight, bias and the options: as given to `sla_forward`; the other tensors as it returned them.
    Returns: dq, dk, dv (B, H, L, D) in q's dtype, dweight (D, D) and dbias (D,) float32, empty where there is none.
    Source: SLA, arXiv:2509.24006, with its two misprints mended; the form above is this file's own.
    """
    batch, num_heads, length, head_dim = q.shape
    heads, num_rows, num_columns = batch * num_heads, triton.cdiv(length, block_m), triton.cdiv(length, block_n)
    empty = q.new_empty(0)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    delta = torch.empty(heads, length, dtype=torch.float32, device=q.device) if sparse else empty
    dlinear = torch.empty(heads, length, dtype=torch.float32, device=q.device) if weight is not None else empty

    folded = folded_z = dstate = dz = empty
    if weight is not None and marginal:
        w = weight.to(q.dtype).contiguous()
        _, states, zs = key_states(k, v, block_n, feature_map, True, None, pool=False)
        folded, folded_z = marginal_states(states @ w.mT, zs, classes, num_critical + num_negligible)
    elif weight is not None:
        folded, folded_z, eps = fold(state, z, weight, q.dtype), z[:, None], eps / length

    options = dict(
        BLOCK_M=block_m, BLOCK_N=block_n, HEAD_DIM=head_dim, CHUNK=min(head_dim, COLUMNS_AT_ONCE), SPARSE=sparse,
        LINEAR=weight is not None, MARGINAL=marginal, FEATURE_MAP=feature_map, PRECISION=precision(q),
    )  # fmt: skip
    tile: Tiles = tiles("dq", q, block_m, block_n)
    dq_kernel[(triton.cdiv(length, tile.m), heads)](
        q, k, v, o, do, dq, lse, delta, dlinear, kv_indices, folded, folded_z, bias,
        *q.stride(), *k.stride(), *v.stride(), *o.stride(), *do.stride(), *dq.stride(),
        num_heads, length, num_rows, num_critical, scale, scale * LOG2_E, eps,
        TILE_M=tile.m, TILE_N=tile.n, BIAS=bias is not None, num_warps=tile.warps, num_stages=tile.stages, **options,
    )  # fmt: skip

    dweight, dbias = (q.new_empty(0, dtype=torch.float32) for _ in range(2))
    if weight is not None:
        dfolded, dz = query_states(q, do, folded_z, dlinear, block_m, feature_map, marginal, eps)
        if marginal:
            mask = marginal_mask(classes, num_critical + num_negligible).mT
            dfolded = torch.bmm(mask.to(q.dtype), dfolded.flatten(2)).unflatten(2, dfolded.shape[2:])
            dz = torch.bmm(mask, dz)
            dweight = torch.bmm(dfolded.flatten(1, 2).mT, states.flatten(1, 2)).sum(0, dtype=torch.float32)
            dstate = dfolded @ w
        else:
            dweight = (dfolded[:, 0].mT @ state).sum(0)
            dstate = (dfolded @ weight.float() / length).to(q.dtype)
            dz = dz / length
    if bias is not None:
        dbias = do.sum((0, 1, 2), dtype=torch.float32)

    tile = tiles("dkv", q, block_m, block_n)
    dkv_kernel[(triton.cdiv(length, tile.n), heads)](
        q, k, v, do, dk, dv, lse, delta, q_indices, q_offsets, dstate, dz,
        *q.stride(), *k.stride(), *v.stride(), *do.stride(), *dk.stride(), *dv.stride(),
        num_heads, length, num_columns, num_rows * num_critical, scale, scale * LOG2_E,
        TILE_M=tile.m, TILE_N=tile.n, num_warps=tile.warps, num_stages=tile.stages, **options,
    )  # fmt: skip
    return dq, dk, dv, dweight, dbias
