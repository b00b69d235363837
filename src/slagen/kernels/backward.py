"""The backward pass: dq by rows, the gradients of the states, dk and dv by columns. No atomics, so it is repeatable.

With u = phi(q) z / (phi(q) . z + e) and the folded state F = (H / z) W^T, O^l W^T = u F. Every gradient of the linear
branch follows from F, from d = rowsum(dO * O^l W^T), and from G = sum u^T dO and g = -sum u d over the queries, where z
is that of each query's domain:

    dphi(q) = z (dO F^T - d) / (phi(q) . z + e)       dphi(k) = (v W^T G^T + g) / z
    dW = sum G^T H / z                                dv = phi(k) G W / z

and delta, the sparse branch's rowsum(dO * O^s), is rowsum(dO * o) - d - dO . b, so O^s and O^l are not kept. What is:
q, k, v, o, lse, the lists, and in the domain "all" one state for each head. The states of single blocks, and their sums
over the marginal blocks of each row, are made again: at 480p they are 0.2 GB each in a layer. Where z differs from row
to row, in "marginal", G / z is summed over the rows of each key block and multiplied by the z of that block, so that
what is kept is a weighted sum of dO again.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from slagen.kernels.primitives import (
    COLUMNS_AT_ONCE,
    LOG2_E,
    SMALLEST,
    feature_gradient,
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
from slagen.kernels.states import key_states, mix, precision, query_states, state_dtype


@triton.jit
def _dq_tiles(
    q, do, lse, delta, k_base, v_base, kv_ptr, num_tiles, acc, k_l, k_d, v_l, v_d, length, scale_log2,
    BLOCK_N: tl.constexpr, TILE_N: tl.constexpr, HEAD_DIM: tl.constexpr, SHORT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add dS K of the tiles of the listed blocks, which are walked as in the forward pass."""
    PARTS: tl.constexpr = BLOCK_N // TILE_N
    block = tl.load(kv_ptr)
    for t in range(num_tiles):
        first = block * BLOCK_N + (t % PARTS) * TILE_N
        block = tl.load(kv_ptr + tl.minimum(t + 1, num_tiles - 1) // PARTS)
        start = first if SHORT else tl.minimum(first, length - TILE_N)
        k = load_rows(k_base, k_l, k_d, start.to(tl.int64), length, TILE_N, HEAD_DIM, SHORT)
        v = load_rows(v_base, v_l, v_d, start.to(tl.int64), length, TILE_N, HEAD_DIM, SHORT)
        qk = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if first + TILE_N > length:
            columns = start + tl.arange(0, TILE_N)
            qk = tl.where(((columns >= first) & (columns < length))[None, :], qk, -float("inf"))
        p = tl.math.exp2(qk * scale_log2 - lse[:, None])
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        ds = p * (dp - delta[:, None])
        acc = tl.dot(ds.to(k.dtype), k, acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=["length", "num_rows", "topk"])
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
    SHORT: tl.constexpr,
    FEATURE_MAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """TILE_M rows of dq of both branches, and of delta and d, which the other kernels read."""
    tiles_m = tl.cdiv(length, TILE_M)
    bh = (tl.program_id(0) // tiles_m).to(tl.int64)
    start_m = (tl.program_id(0) % tiles_m).to(tl.int64) * TILE_M
    b, h = bh // num_heads, bh % num_heads
    row = bh * num_rows + start_m // BLOCK_M
    offs_m = tl.arange(0, TILE_M)
    inside = offs_m < length - start_m
    q = load_columns(q_ptr + b * q_b + h * q_h, q_l, q_d, start_m, 0, length, TILE_M, HEAD_DIM)
    do_base = do_ptr + b * do_b + h * do_h
    do = load_columns(do_base, do_l, do_d, start_m, 0, length, TILE_M, HEAD_DIM)
    delta = tl.zeros((TILE_M,), dtype=tl.float32)
    if SPARSE:
        o = load_columns(o_ptr + b * o_b + h * o_h, o_l, o_d, start_m, 0, length, TILE_M, HEAD_DIM)
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
        phi = feature_values(q, feature_shift(q, FEATURE_MAP), FEATURE_MAP)
        phi = phi * softmax_factor(phi, FEATURE_MAP)[:, None]
        factor = z[None, :] * reciprocal(tl.sum(phi * z[None, :], 1) + eps)[:, None]
        d = tl.sum(phi * factor * do_state, 1)  # = rowsum(dO * O^l W^T)
        tl.store(dlinear_ptr + bh * length + start_m + offs_m, d, mask=inside)
        delta -= d
        acc = feature_gradient(do_state - d[:, None], factor, phi, FEATURE_MAP)

    if SPARSE:
        tl.store(delta_ptr + bh * length + start_m + offs_m, delta, mask=inside)
        lse = tl.load(lse_ptr + bh * length + start_m + offs_m, mask=inside, other=0.0)
        k_base, v_base = k_ptr + b * k_b + h * k_h, v_ptr + b * v_b + h * v_h
        acc = _dq_tiles(
            q, do, lse, delta, k_base, v_base, kv_ptr + row * topk, topk * (BLOCK_N // TILE_N), acc / scale,
            k_l, k_d, v_l, v_d, length, scale_log2, BLOCK_N, TILE_N, HEAD_DIM, SHORT, PRECISION,
        )  # fmt: skip
        acc = acc * scale
    store_rows(dq_ptr + b * dq_b + h * dq_h, dq_l, dq_d, start_m, length, acc, TILE_M, HEAD_DIM)


@triton.jit(do_not_specialize=["length", "num_columns", "list_length"])
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
    z_ptr,
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
    tiles_n = tl.cdiv(length, TILE_N)
    bh = (tl.program_id(0) // tiles_n).to(tl.int64)
    start_n = (tl.program_id(0) % tiles_n).to(tl.int64) * TILE_N
    b, h = bh // num_heads, bh % num_heads
    column = start_n // BLOCK_N
    k_base, v_base = k_ptr + b * k_b + h * k_h, v_ptr + b * v_b + h * v_h
    k = load_columns(k_base, k_l, k_d, start_n, 0, length, TILE_N, HEAD_DIM)
    v = load_columns(v_base, v_l, v_d, start_n, 0, length, TILE_N, HEAD_DIM)
    dk = tl.zeros((TILE_N, HEAD_DIM), dtype=tl.float32)
    dv = tl.zeros((TILE_N, HEAD_DIM), dtype=tl.float32)

    if LINEAR:
        place = bh * num_columns + column if MARGINAL else bh
        offs_d = tl.arange(0, HEAD_DIM)
        dstate_base = dstate_ptr + place * HEAD_DIM * HEAD_DIM
        shift = feature_shift(k, FEATURE_MAP)
        factor = softmax_factor(feature_values(k, shift, FEATURE_MAP), FEATURE_MAP)
        for first in tl.static_range(0, HEAD_DIM, CHUNK):
            offs_c = first + tl.arange(0, CHUNK)
            x = load_columns(k_base, k_l, k_d, start_n, first, length, TILE_N, CHUNK)
            weights = feature_values(x, shift, FEATURE_MAP) * factor[:, None]
            weights *= reciprocal(tl.load(z_ptr + place * HEAD_DIM + offs_c))[None, :]
            dstate = tl.load(dstate_base + offs_c[:, None] * HEAD_DIM + offs_d[None, :])
            dv = tl.dot(weights.to(dstate.dtype), dstate, dv, input_precision=PRECISION)
        dphi = times_transposed(
            v_base, v_l, v_d, start_n, length, dstate_base, TILE_N, HEAD_DIM, CHUNK, PRECISION
        )  # fmt: skip
        dphi += tl.load(dz_ptr + place * HEAD_DIM + offs_d)[None, :]
        inverse = reciprocal(tl.load(z_ptr + place * HEAD_DIM + offs_d))
        phi = feature_values(k, shift, FEATURE_MAP) * factor[:, None]
        dk = feature_gradient(dphi, inverse[None, :], phi, FEATURE_MAP)

    if SPARSE:
        dk = dk / scale
        q_base, do_base = q_ptr + b * q_b + h * q_h, do_ptr + b * do_b + h * do_h
        PARTS: tl.constexpr = BLOCK_M // TILE_M
        offsets = offset_ptr + bh * (num_columns + 1) + column
        list_row = list_ptr + bh * list_length
        offs_m = tl.arange(0, TILE_M)
        begin, end = tl.load(offsets).to(tl.int64) * PARTS, tl.load(offsets + 1).to(tl.int64) * PARTS
        block = tl.load(list_row + begin // PARTS, mask=begin < end, other=0)
        for t in range(begin, end):
            start_m = block.to(tl.int64) * BLOCK_M + (t % PARTS) * TILE_M
            block = tl.load(list_row + tl.minimum(t + 1, end - 1) // PARTS)  # a round before the loads that need it
            q = load_rows(q_base, q_l, q_d, start_m, length, TILE_M, HEAD_DIM, True)
            do = load_rows(do_base, do_l, do_d, start_m, length, TILE_M, HEAD_DIM, True)
            inside = offs_m < length - start_m
            lse = tl.load(lse_ptr + bh * length + start_m + offs_m, mask=inside, other=float("inf"))
            delta = tl.load(delta_ptr + bh * length + start_m + offs_m, mask=inside, other=0.0)
            kq = tl.dot(k, tl.trans(q), input_precision=PRECISION)
            p = tl.math.exp2(kq * scale_log2 - lse[None, :])
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
            dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
            ds = p * (dp - delta[None, :])
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
        dk = dk * scale
    store_rows(dk_ptr + b * dk_b + h * dk_h, dk_l, dk_d, start_n, length, dk, TILE_N, HEAD_DIM)
    store_rows(dv_ptr + b * dv_b + h * dv_h, dv_l, dv_d, start_n, length, dv, TILE_N, HEAD_DIM)


def sla_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, weight: Tensor | None, bias: Tensor | None, o: Tensor, lse: Tensor,
    kv_indices: Tensor, classes: Tensor, q_indices: Tensor, q_offsets: Tensor, state: Tensor, z: Tensor, *,
    block_m: int, block_n: int, num_critical: int, num_negligible: int, marginal: bool, feature_map: str, eps: float,
    scale: float, sparse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of `sla_forward`.

    Args:
        do: (B, H, L, D) in q's dtype, any strides.
        q, k, v, weight, bias and the options: as given to `sla_forward`; the other tensors as it returned them.
    Returns: dq, dk, dv (B, H, L, D) in q's dtype, dweight (D, D) and dbias (D,) float32, empty where there is none.
    Source: SLA, arXiv:2509.24006, with its two misprints corrected; the form above is this file's own.
    """
    bias = None if bias is None else bias.contiguous()
    heads, length, head_dim = q.shape[0] * q.shape[1], q.shape[2], q.shape[3]
    num_rows, num_columns = triton.cdiv(length, block_m), triton.cdiv(length, block_n)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    delta, dlinear = (
        torch.empty((heads, length) if wanted else 0, dtype=torch.float32, device=q.device)
        for wanted in (sparse, weight is not None)
    )
    states, folded, folded_z, key_z, eps = _states(
        q, k, v, weight, state, z, classes, block_n, feature_map, marginal, eps
    )  # fmt: skip
    options = dict(
        BLOCK_M=block_m, BLOCK_N=block_n, HEAD_DIM=head_dim, CHUNK=min(head_dim, COLUMNS_AT_ONCE), SPARSE=sparse,
        LINEAR=weight is not None, MARGINAL=marginal, FEATURE_MAP=feature_map, PRECISION=precision(q),
    )  # fmt: skip
    tile: Tiles = tiles("dq", q, block_m, block_n)
    dq_kernel[(triton.cdiv(length, tile.m) * heads,)](
        q, k, v, o, do, dq, lse, delta, dlinear, kv_indices, folded, folded_z, bias,
        *q.stride(), *k.stride(), *v.stride(), *o.stride(), *do.stride(), *dq.stride(),
        q.shape[1], length, num_rows, num_critical, scale, scale * LOG2_E.value, eps,
        TILE_M=tile.m, TILE_N=tile.n, BIAS=bias is not None, SHORT=length < tile.n,
        num_warps=tile.warps, num_stages=tile.stages, **options,
    )  # fmt: skip
    dstate = dz = dweight = q.new_empty(0, dtype=torch.float32)
    if weight is not None:
        dfolded, dz = query_states(q, do, folded_z, dlinear, block_m, feature_map, marginal, eps)
        back = _marginal_gradients if marginal else _gradients_of_all
        dstate, dz, dweight = back(q, dfolded, dz, weight, states, key_z, classes)
    tile = tiles("dkv", q, block_m, block_n)
    dkv_kernel[(triton.cdiv(length, tile.n) * heads,)](
        q, k, v, do, dk, dv, lse, delta, q_indices, q_offsets, dstate, dz, key_z,
        *q.stride(), *k.stride(), *v.stride(), *do.stride(), *dk.stride(), *dv.stride(),
        q.shape[1], length, num_columns, num_rows * num_critical, scale, scale * LOG2_E.value,
        TILE_M=tile.m, TILE_N=tile.n, num_warps=tile.warps, num_stages=tile.stages, **options,
    )  # fmt: skip
    dbias = q.new_empty(0, dtype=torch.float32) if bias is None else do.sum((0, 1, 2), dtype=torch.float32)
    return dq, dk, dv, dweight, dbias


def _states(
    q: Tensor, k: Tensor, v: Tensor, weight: Tensor | None, state: Tensor, z: Tensor, classes: Tensor, block_n: int,
    feature_map: str, marginal: bool, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:  # fmt: skip
    """The keys' states, F and its z as `dq_kernel` takes them, the z of the keys, and eps in units of z; made again
    from k and v in the domain "marginal". Without a linear branch the tensors are empty."""
    if weight is None:
        empty = q.new_empty(0)
        return empty, empty, empty, empty, eps
    if marginal:
        _, states, zs = key_states(k, v, block_n, feature_map, True, None, pool=False)
        folded, folded_z = mix(states, zs, classes, None, q.dtype, precision(q))
        return states, folded @ weight.to(q.dtype).mT, folded_z, zs, eps
    return state, (state @ weight.float().mT).to(q.dtype), z[:, None], z, eps / q.shape[2]


def _marginal_gradients(
    q: Tensor, dfolded: Tensor, dz: Tensor, weight: Tensor, states: Tensor, zs: Tensor, classes: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the states and z of each key block, and of the weight, from those of each row's sums of them."""
    dfolded, dz = mix(dfolded, dz, classes.mT, zs, dfolded.dtype, precision(q))
    means = states * torch.where(zs >= SMALLEST.value, 1 / zs, 0.0)[..., None].to(states.dtype)
    dweight = torch.bmm(dfolded.flatten(1, 2).mT, means.flatten(1, 2)).sum(0, dtype=torch.float32)
    return dfolded @ weight.to(dfolded.dtype), dz, dweight


def _gradients_of_all(
    q: Tensor, dfolded: Tensor, dz: Tensor, weight: Tensor, state: Tensor, z: Tensor, classes: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As `_marginal_gradients` in the domain of all tokens, where z is their mean, so 1 / z of a key is up to L."""
    length = q.shape[2]
    return (dfolded @ weight.float() / length).to(state_dtype(q)), dz / length, (dfolded.mT @ state).sum(0)
