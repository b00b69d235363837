"""The forward pass: one pass over K and V, one over Q, the selection, and a kernel that attends and writes o once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from slagen.kernels.primitives import (
    COLUMNS_AT_ONCE,
    LOG2_E,
    feature_shift,
    feature_values,
    load_columns,
    load_rows,
    store_rows,
    weight_inverse,
)
from slagen.kernels.resources import Tiles, tiles
from slagen.kernels.selection import column_lists, pool, select
from slagen.kernels.states import combine, key_states, mix, precision, projects, state_dtype

HEADROOM = tl.constexpr(4096.0)  # the most that a row's weights of one tile sum to before its maximum is moved
LOWEST = tl.constexpr(-3e38)  # where maxima begin: finite, so that -inf of a masked score less this is no nan
STATES_BYTES = 2**28  # of the domain "marginal": one state for each key block of the heads that are worked on at once


@triton.jit
def _attend_tiles(
    q, k_base, v_base, kv_ptr, num_tiles, acc, m_i, l_i, k_l, k_d, v_l, v_d, length, scale_log2,
    BLOCK_N: tl.constexpr, TILE_N: tl.constexpr, HEAD_DIM: tl.constexpr, SHORT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attend to the tiles of the listed blocks.

    m_i trails the running maximum: it moves only when a row's weights of a tile would sum to more than HEADROOM, which
    float16 and the sums can hold. So nearly every round goes without rescaling what was summed before.
    """
    PARTS: tl.constexpr = BLOCK_N // TILE_N
    block = tl.load(kv_ptr)
    for t in range(num_tiles):
        first = block * BLOCK_N + (t % PARTS) * TILE_N
        block = tl.load(kv_ptr + tl.minimum(t + 1, num_tiles - 1) // PARTS)  # a round before the loads that need it
        # The tile that would cross the end starts earlier, so that no load has a mask; its scores have one.
        start = first if SHORT else tl.minimum(first, length - TILE_N)
        k = load_rows(k_base, k_l, k_d, start.to(tl.int64), length, TILE_N, HEAD_DIM, SHORT)
        qk = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if first + TILE_N > length:
            columns = start + tl.arange(0, TILE_N)
            qk = tl.where(((columns >= first) & (columns < length))[None, :], qk, -float("inf"))
        p = tl.math.exp2(qk * scale_log2 - m_i[:, None])
        sums = tl.sum(p, 1)
        if tl.max(sums, 0) > HEADROOM:
            m_new = tl.maximum(m_i, tl.max(qk, 1) * scale_log2)
            alpha = tl.math.exp2(m_i - m_new)
            m_i = m_new
            l_i *= alpha
            acc *= alpha[:, None]
            p = tl.math.exp2(qk * scale_log2 - m_i[:, None])
            sums = tl.sum(p, 1)
        l_i += sums
        v = load_rows(v_base, v_l, v_d, start.to(tl.int64), length, TILE_N, HEAD_DIM, SHORT)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, m_i, l_i


@triton.jit(do_not_specialize=["length", "num_rows", "topk"])
def attend_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    lse_ptr,
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
    num_heads,
    length,
    num_rows,
    topk,
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
    SAVE_LSE: tl.constexpr,
    SHORT: tl.constexpr,
    FEATURE_MAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """TILE_M rows of o: walk the critical blocks, add the linear branch and the bias, store once."""
    tiles_m = tl.cdiv(length, TILE_M)
    bh = (tl.program_id(0) // tiles_m).to(tl.int64)
    start_m = (tl.program_id(0) % tiles_m).to(tl.int64) * TILE_M
    b, h = bh // num_heads, bh % num_heads
    row = bh * num_rows + start_m // BLOCK_M
    q_base = q_ptr + b * q_b + h * q_h
    offs_m = tl.arange(0, TILE_M)
    q = load_columns(q_base, q_l, q_d, start_m, 0, length, TILE_M, HEAD_DIM)
    acc = tl.zeros((TILE_M, HEAD_DIM), dtype=tl.float32)

    if SPARSE:
        k_base, v_base = k_ptr + b * k_b + h * k_h, v_ptr + b * v_b + h * v_h
        kv_row = kv_ptr + row * topk
        m_i = tl.full((TILE_M,), LOWEST, dtype=tl.float32)
        l_i = tl.zeros((TILE_M,), dtype=tl.float32)
        acc, m_i, l_i = _attend_tiles(
            q, k_base, v_base, kv_row, topk * (BLOCK_N // TILE_N), acc, m_i, l_i, k_l, k_d, v_l, v_d, length,
            scale_log2, BLOCK_N, TILE_N, HEAD_DIM, SHORT, PRECISION,
        )  # fmt: skip
        acc = acc * (1.0 / l_i)[:, None]
        if SAVE_LSE:
            tl.store(lse_ptr + bh * length + start_m + offs_m, m_i + tl.log2(l_i), mask=offs_m < length - start_m)

    if LINEAR:
        place = row if MARGINAL else bh
        offs_d = tl.arange(0, HEAD_DIM)
        z_base, state_base = z_ptr + place * HEAD_DIM, state_ptr + place * HEAD_DIM * HEAD_DIM
        shift = feature_shift(q, FEATURE_MAP)
        inverse = weight_inverse(
            q_base, q_l, q_d, start_m, length, shift, z_base, eps, TILE_M, HEAD_DIM, CHUNK, FEATURE_MAP
        )  # fmt: skip
        # The weights phi z / (phi . z + eps) of the features lie in [0, 1] and H / z is a mean of values for each, so
        # float16 holds both, however long the sequence is and whatever its outliers.
        for first in tl.static_range(0, HEAD_DIM, CHUNK):
            offs_c = first + tl.arange(0, CHUNK)
            z = tl.load(z_base + offs_c)
            x = load_columns(q_base, q_l, q_d, start_m, first, length, TILE_M, CHUNK)
            u = feature_values(x, shift, FEATURE_MAP) * z[None, :] * inverse[:, None]
            state = tl.load(state_base + offs_c[:, None] * HEAD_DIM + offs_d[None, :])
            acc = tl.dot(u.to(q.dtype), state, acc, input_precision=PRECISION)
    if BIAS:
        acc += tl.load(bias_ptr + tl.arange(0, HEAD_DIM)).to(tl.float32)[None, :]
    store_rows(o_ptr + b * o_b + h * o_h, o_l, o_d, start_m, length, acc, TILE_M, HEAD_DIM)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    kv_indices: Tensor,
    folded: Tensor,
    z: Tensor,
    bias: Tensor | None,
    *,
    block_m: int,
    block_n: int,
    num_critical: int,
    linear: bool,
    marginal: bool,
    feature_map: str,
    eps: float,
    scale: float,
    sparse: bool,
) -> None:
    """Write o, and lse where it is not empty: the last of the launches of `sla_forward`, whose arguments these are.

    Args:
        kv_indices: (B * H, M, num_critical) int32, ascending in each row.
        folded, z: the normalised and projected states and their denominators, (B * H, D, D) in q's dtype and (B * H, D)
            float32; where marginal (B * H, M, D, D) and (B * H, M, D).
        linear: add the linear branch.
        eps: added to the denominator, in units of z.
    """
    from slagen.timing import part  # not above: Triton's hash of a kernel counts the lines before it

    batch, num_heads, length, head_dim = q.shape
    tile: Tiles = tiles("attend", q, block_m, block_n)
    bias = None if bias is None else bias.contiguous()
    with part("fused"):
        attend_kernel[(triton.cdiv(length, tile.m) * batch * num_heads,)](
            q, k, v, o, lse, kv_indices, folded, z, bias, *q.stride(), *k.stride(), *v.stride(), *o.stride(),
            num_heads, length, triton.cdiv(length, block_m), num_critical, scale * LOG2_E.value, eps,
            BLOCK_M=block_m, BLOCK_N=block_n, TILE_M=tile.m, TILE_N=tile.n, HEAD_DIM=head_dim, SPARSE=sparse,
            CHUNK=min(head_dim, COLUMNS_AT_ONCE), LINEAR=linear, MARGINAL=marginal, BIAS=bias is not None,
            SAVE_LSE=lse.numel() > 0, SHORT=length < tile.n, FEATURE_MAP=feature_map, PRECISION=precision(q),
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip


def sla_forward(
    q: Tensor, k: Tensor, v: Tensor, weight: Tensor | None, bias: Tensor | None, *, block_m: int, block_n: int,
    num_critical: int, num_negligible: int, marginal: bool, feature_map: str, eps: float, scale: float, sparse: bool,
    save: bool, out: Tensor | None = None, block_means: tuple[Tensor, Tensor] | None = None,
    scores: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Sparse-linear attention, as `attention/sla/reference.py` defines it.

    Args:
        q, k, v: (B, H, L, D), float16, bfloat16 or float32, any strides; D a power of two from 16 to 256.
        weight: (D, D), or None for no linear branch. bias: (D,), or None.
        block_m, block_n: query rows and key columns of a block: 16, 32, 64 or 128.
        num_critical, num_negligible: key blocks of each row that are attended exactly, at least 1, and not at all.
        marginal: bound the linear branch to the marginal blocks; otherwise it sees every token.
        eps: added to the denominator of the linear branch.
        scale: factor on q @ k^T before softmax.
        sparse: False leaves the sparse branch out.
        save: also return what `sla_backward` needs.
        out: where o is written; None makes it. Where marginal and not `save`, heads are taken in groups whose states
            fit in STATES_BYTES.
        block_means: of the blocks of q and of k, (B * H, M, D) and (B * H, N, D) float32; None takes them here.
        scores: (B * H, M, N) float32, by which key blocks are ranked; None takes the products of those means.
    Returns:
        o: (B, H, L, D) in q's dtype, laid out as q is.
        lse: (B * H, L) float32, log2 of the softmax denominator (base 2, scale included).
        kv_indices, classes, q_indices, q_offsets: as `select` and `column_lists` give them.
        state, z: of the domain of all tokens, H / z and z / L, (B * H, D, D) and (B * H, D) float32.
        What is not needed is empty; everything but o is where not `save`.
    Source: SLA, arXiv:2509.24006; online softmax from FlashAttention-2, arXiv:2307.08691.
    """
    bounded, heads = weight is not None and marginal, q.shape[0] * q.shape[1]
    o = torch.empty_like(q) if out is None else out
    lse, kv_indices, classes, q_indices, q_offsets, state, z = nothing = _nothing(q)
    if bounded and not save and heads > (group := _heads_at_once(q, block_n)):
        for part, own in _head_groups(q, group):
            sla_forward(
                q[part], k[part], v[part], weight, bias, block_m=block_m, block_n=block_n, num_critical=num_critical,
                num_negligible=num_negligible, marginal=marginal, feature_map=feature_map, eps=eps, scale=scale,
                sparse=sparse, save=save, out=o[part],
                block_means=None if block_means is None else (block_means[0][own], block_means[1][own]),
                scores=None if scores is None else scores[own],
            )  # fmt: skip
        return o, *nothing
    pooling = block_means is None and scores is None and (sparse or bounded)
    k_means, states, zs = _key_states(k, v, weight, block_n, feature_map, marginal, pooling)
    if sparse or bounded:
        scored = (q, k_means, block_m, block_means) if scores is None else scores
        kv_indices, classes = _chosen(scored, num_critical, num_negligible, bounded or (save and sparse))
    if sparse and save:
        q_indices, q_offsets = column_lists(classes, num_critical)
        lse = torch.empty(heads, q.shape[2], dtype=torch.float32, device=q.device)
    folded, folded_z, eps, state, z = _fold(q, weight, states, zs, classes, marginal, eps, save)
    attend(
        q, k, v, o, lse, kv_indices, folded, folded_z, bias, block_m=block_m, block_n=block_n,
        num_critical=num_critical, linear=weight is not None, marginal=marginal, feature_map=feature_map,
        eps=eps, scale=scale, sparse=sparse,
    )  # fmt: skip
    if not save:
        return o, *nothing
    return o, lse, kv_indices if sparse else nothing[1], classes, q_indices, q_offsets, state, z


def _chosen(
    scored: Tensor | tuple[Tensor, Tensor, int, tuple[Tensor, Tensor] | None], num_critical: int, num_negligible: int,
    classes: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """kv_indices and classes, as `select` gives them.

    scored: the scores, or what `_scores` makes them of.
    """
    from slagen.timing import part

    with part("block_map"):
        scores = _scores(*scored) if isinstance(scored, tuple) else scored
        return select(scores, num_critical, num_negligible, classes=classes)


def _scores(q: Tensor, k_means: Tensor, block_m: int, block_means: tuple[Tensor, Tensor] | None) -> Tensor:
    """The products of the means of the blocks of q and of k, (B * H, M, N) float32."""
    q_means, k_means = (pool(q, block_m), k_means) if block_means is None else block_means
    return torch.bmm(q_means, k_means.mT)


def _nothing(q: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Empty lse, kv_indices, classes, q_indices, q_offsets, state and z of `sla_forward`, no two of them the same."""
    lse, state, z = (q.new_empty(0, dtype=torch.float32) for _ in range(3))
    kv_indices, q_indices, q_offsets = (q.new_empty(0, dtype=torch.int32) for _ in range(3))
    return lse, kv_indices, q.new_empty(0, dtype=torch.int8), q_indices, q_offsets, state, z


def _heads_at_once(q: Tensor, block_n: int) -> int:
    """How many heads' states of single key blocks fit in STATES_BYTES; at least one."""
    length, head_dim = q.shape[2:]
    return max(1, STATES_BYTES // (triton.cdiv(length, block_n) * head_dim**2 * state_dtype(q).itemsize))


def _head_groups(q: Tensor, size: int) -> list[tuple[tuple[slice, slice], slice]]:
    """Groups of at most `size` heads of one batch: their slices of (B, H), and of B * H."""
    batch, num_heads = q.shape[:2]
    return [
        ((slice(b, b + 1), slice(h, h + size)), slice(b * num_heads + h, b * num_heads + min(h + size, num_heads)))
        for b in range(batch) for h in range(0, num_heads, size)
    ]  # fmt: skip


def _key_states(
    k: Tensor, v: Tensor, weight: Tensor | None, block_n: int, feature_map: str, marginal: bool, pooling: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The means of the blocks of k where `pooling`, and the linear branch's states and z, as `key_states` gives them.

    What is not needed is empty.
    """
    from slagen.timing import part

    if weight is None:
        with part("block_map"):
            return pool(k, block_n) if pooling else k.new_empty(0), k.new_empty(0), k.new_empty(0)
    with part("state"):
        projection = weight.to(state_dtype(k)).contiguous() if marginal and projects(k) else None
        return key_states(k, v, block_n, feature_map, marginal, projection, pool=pooling)


def _fold(
    q: Tensor,
    weight: Tensor | None,
    states: Tensor,
    zs: Tensor,
    classes: Tensor,
    marginal: bool,
    eps: float,
    save: bool,
) -> tuple[Tensor, Tensor, float, Tensor, Tensor]:
    """The linear branch's normalised and projected states, their z and eps in its units, as `attend` takes them; and
    state and z as `sla_forward` returns them."""
    from slagen.timing import part

    state, z = (q.new_empty(0, dtype=torch.float32) for _ in range(2))
    if weight is None:
        return q.new_empty(0), q.new_empty(0), eps, state, z
    if marginal:
        with part("state"):
            folded, folded_z = mix(states, zs, classes, None, q.dtype, precision(q))
        if not projects(q):
            with part("projection"):
                folded = folded @ weight.to(q.dtype).mT
        return folded, folded_z, eps, state, z
    with part("projection"):
        folded, z, state = combine(states, zs, weight.contiguous(), q.shape[2], q.dtype, save)
    return folded, z, eps / q.shape[2], state, z
