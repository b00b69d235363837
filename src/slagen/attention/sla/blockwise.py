"""Sparse-linear attention block by block: what `reference.py` defines, in memory that grows with L, not L^2.

The sparse branch copies the critical key blocks of a few query blocks side by side, and attends to them with dense
matrix products that stay in the cache. The linear branch reads one state per block of keys: for each feature d the mean
of the values with weights phi(k_j)_d, and the log of the sum of those weights. Means are mixed over the domain of each
query block, and over the features:

    z_nd = sum_j phi(k_j)_d        H_nd = sum_j phi(k_j)_d v_j / z_nd        over the keys j of block n
    z_d  = sum_n z_nd              H_d  = sum_n (z_nd / z_d) H_nd            over the blocks n of the domain
    u_id = phi(q_i)_d z_d / (phi(q_i) . z + e)        O^l_i = sum_d u_id H_d

Every quotient lies in [0, 1] and is the exponential of a difference of logs, so features far apart neither overflow
nor vanish from both sides of a fraction. The gradients are products of the same quotients.

In the domain "all" one state serves every query, so W is multiplied into it once. In "marginal" mixing is one matrix
product, of the 0/1 domain (M, N) with the means (N, D * D) times z_nd / Z_d, where Z_d sums over all blocks, and
z_d / Z_d is divided out again: D N / (2 block_m block_n topk) of the sparse branch's operations, a third for D = 128,
blocks of 64 and one block in 20, whatever L is. Where z_d / Z_d is hardly a number of the dtype for some query block
and feature, the run of that block takes every z_nd / z_d by itself, and one matrix product for each feature.

The backward pass computes the scores of each chunk again, so only the inputs and the selection are kept for it.
Beside those and the outputs, memory holds the keys, values and states of a group of short heads or of one long head,
and one run or chunk of its queries, at a time.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from slagen.attention.sla.block_map import MARGINAL, block_map, block_scores, critical_indices
from slagen.attention.sla.config import FeatureMap, SLAConfig
from slagen.attention.sla.reference import EPSILON

# The fastest powers of two on a Xeon with 2 MiB of second-level cache per core, for D = 128 and blocks of 64, and for
# D = 64 and blocks of 16; a factor of 4 either way costs 5 to 25 %.
CHUNK_BYTES = 2**20  # per thread: gathered keys, scores and weights of the query blocks attended at a time
RUN_BYTES = 2 * 2**20  # the queries, or keys, that feature map, state and projection handle at a time


def blockwise_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: SLAConfig,
    proj_weight: Tensor | None,
    proj_bias: Tensor | None,
    scale: float,
    sparse: bool,
) -> Tensor:
    """Attend block by block; arguments and result as in `reference_attention`. Differentiable once."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    weight = None if proj_weight is None else proj_weight.to(dtype)
    bias = None if proj_bias is None else proj_bias.to(dtype)
    options = (
        config.sparsity,
        config.negligible,
        config.linear_domain,
        config.feature_map,
        config.block_m,
        config.block_n,
    )
    return _forward(q, k, v, weight, bias, *options, scale, sparse)[0]


Unmix = Callable[[Tensor, Tensor], None]  # see `_mix`


@torch.library.custom_op("slagen::blockwise_forward", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    sparsity: float,
    negligible: float,
    linear_domain: str,
    feature_map: str,
    block_m: int,
    block_n: int,
    scale: float,
    sparse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """o, and for the backward pass what `_select` gives, empty for None."""
    config = SLAConfig(sparsity, negligible, linear_domain, feature_map, block_m, block_n)  # type: ignore[arg-type]
    kv_indices, domain = _select(q, k, config, sparse, linear=weight is not None)
    o, length = torch.empty_like(q), q.shape[2]
    for heads in head_groups(q):
        k_j, v_j = to_blocks(k[heads], config.block_n), to_blocks(v[heads], config.block_n)
        if weight is not None:
            z, means = key_states(k_j, v_j, config, length)
            if domain is None:  # project the one state, not every row
                means = means @ weight.mT
        for run, tokens in _query_runs(q, config):
            q_i = to_blocks(q[heads][:, :, tokens], config.block_m)
            o_i = torch.empty_like(q_i)
            if kv_indices is None:
                o_i.zero_()
            else:
                _sparse_forward(q_i * scale, k_j, v_j, _rows(kv_indices, heads, run), length, o_i)
            if weight is not None:
                domain_i = None if domain is None else _rows(domain, heads, run)
                *_, o_linear = _linear_rows(q_i, z, means, domain_i, config)
                o_i += o_linear.view(o_i.shape) if domain is None else o_linear @ weight.mT
            if bias is not None:
                o_i += bias
            _from_blocks(o_i, o[heads][:, :, tokens])
    nothing = torch.empty(0, device=q.device)
    return o, nothing.long() if kv_indices is None else kv_indices, nothing.bool() if domain is None else domain


@_forward.register_fake
def _(q, k, v, weight, bias, sparsity, negligible, linear_domain, feature_map, block_m, block_n, scale, sparse):
    config = SLAConfig(sparsity, negligible, linear_domain, feature_map, block_m, block_n)
    num_rows, num_columns = config.num_blocks(q.shape[2])
    lists, bounded = (*q.shape[:2], num_rows, config.num_critical(num_columns)), (*q.shape[:2], num_rows, num_columns)
    return (
        torch.empty_like(q),
        q.new_empty(lists if sparse else 0, dtype=torch.int64),
        q.new_empty(bounded if weight is not None and linear_domain == "marginal" else 0, dtype=torch.bool),
    )


@torch.library.custom_op("slagen::blockwise_backward", mutates_args=())
def _backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    kv_indices: Tensor,
    domain: Tensor,
    sparsity: float,
    negligible: float,
    linear_domain: str,
    feature_map: str,
    block_m: int,
    block_n: int,
    scale: float,
    sparse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, dweight and dbias, the last two empty where there is none."""
    config = SLAConfig(sparsity, negligible, linear_domain, feature_map, block_m, block_n)  # type: ignore[arg-type]
    bounded, length = weight is not None and linear_domain == "marginal", q.shape[2]
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    dweight, dbias = (q.new_empty(0) if x is None else torch.zeros_like(x) for x in (weight, bias))
    with torch.autocast(q.device.type, enabled=False):
        for heads in head_groups(q):
            k_j, v_j = to_blocks(k[heads], config.block_n), to_blocks(v[heads], config.block_n)
            dk_j, dv_j = torch.zeros_like(k_j), torch.zeros_like(v_j)
            if weight is not None:
                z, means = key_states(k_j, v_j, config, length)
                dstates = means.new_zeros(*means.shape[:3], means.shape[3] + 1)
            for run, tokens in _query_runs(q, config):
                q_i = to_blocks(q[heads][:, :, tokens], config.block_m)
                do_i = to_blocks(do[heads][:, :, tokens], config.block_m)
                if sparse:
                    indices = _rows(kv_indices, heads, run)
                    dq_i = _sparse_backward(q_i * scale, k_j, v_j, indices, length, do_i, dk_j, dv_j).mul_(scale)
                else:
                    dq_i = torch.zeros_like(q_i)
                if weight is not None:
                    domain_i = _rows(domain, heads, run) if bounded else None
                    dq_i += _linear_backward(q_i, z, means, domain_i, weight, config, do_i, dstates, dweight)
                if bias is not None:
                    dbias += do_i.sum((0, 1, 2))
                _from_blocks(dq_i, dq[heads][:, :, tokens])
            if weight is not None:
                _states_backward(k_j, v_j, config, length, z, dstates, dk_j, dv_j)
            _from_blocks(dk_j, dk[heads])
            _from_blocks(dv_j, dv[heads])
    return dq, dk, dv, dweight, dbias


@_backward.register_fake
def _(do, q, k, v, weight, bias, *_):
    return (
        *(torch.empty_like(x) for x in (q, k, v)),
        *(q.new_empty(0) if x is None else torch.empty_like(x) for x in (weight, bias)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, weight, bias, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, weight, bias, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _autograd(ctx: Any, do: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    *_, weight, bias, _, _ = saved = ctx.saved_tensors
    *grads, dweight, dbias = _backward(do, *saved, *ctx.options)
    return *grads, None if weight is None else dweight, None if bias is None else dbias, *(None,) * 8


_forward.register_autograd(_autograd, setup_context=_setup_context)


def _select(q: Tensor, k: Tensor, config: SLAConfig, sparse: bool, linear: bool) -> tuple[Tensor | None, Tensor | None]:
    """What the branches need of the block map: kv_indices (B, H, M, topk), and marginal blocks (B, H, M, N) bool."""
    bounded = linear and config.linear_domain == "marginal"
    if not sparse and not bounded:
        return None, None
    scores = block_scores(q, k, config)
    kv_indices = critical_indices(scores, config) if sparse else None
    return kv_indices, block_map(scores, config) == MARGINAL if bounded else None


# Short heads are worked on in groups of G, long ones alone, in runs of R query blocks. Cut into blocks, the queries of
# a run are (G, R, block_m, D), and the keys and values of a group (G, N, block_n, D).


def head_groups(q: Tensor) -> Iterator[tuple[slice, slice]]:
    """Split (B, H) into some batches, or some heads of one batch, with about RUN_BYTES of queries."""
    batch, num_heads, length, head_dim = q.shape
    width = max(1, RUN_BYTES // (4 * length * head_dim))
    if width >= num_heads:
        step = width // num_heads
        yield from ((slice(b, b + step), slice(None)) for b in range(0, batch, step))
    else:
        step = math.ceil(num_heads / math.ceil(num_heads / width))  # 8 heads, 6 at a time, are 4 and 4
        yield from ((slice(b, b + 1), slice(h, h + step)) for b in range(batch) for h in range(0, num_heads, step))


def _query_runs(q: Tensor, config: SLAConfig) -> Iterator[tuple[slice, slice]]:
    """Split the query blocks of a head into runs of about RUN_BYTES: slices of blocks, and of tokens."""
    step = max(1, RUN_BYTES // (4 * config.block_m * q.shape[3]))
    for i in range(0, config.num_blocks(q.shape[2])[0], step):
        yield slice(i, i + step), slice(i * config.block_m, (i + step) * config.block_m)


def _rows(x: Tensor, heads: tuple[slice, slice], run: slice) -> Tensor:
    """The rows of a run out of (B, H, M, ...), as (G, R, ...)."""
    return x[heads][:, :, run].flatten(0, 1)


def to_blocks(x: Tensor, block: int) -> Tensor:
    """Cut (b, h, L, D) into blocks (G, ceil(L / block), block, D), float32 or float64, zeros after the end."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    batch, num_heads, length, head_dim = x.shape
    if length % block == 0:
        return x.to(dtype).reshape(batch * num_heads, -1, block, head_dim).contiguous()
    blocks = x.new_empty(batch, num_heads, length + -length % block, head_dim, dtype=dtype)
    blocks[:, :, :length] = x
    blocks[:, :, length:] = 0
    return blocks.view(batch * num_heads, -1, block, head_dim)


def _from_blocks(blocks: Tensor, out: Tensor) -> None:
    """Copy blocks back into a (b, h, L, D) view, rounding to its dtype."""
    out.copy_(blocks.view(*out.shape[:2], -1, out.shape[3])[:, :, : out.shape[2]])


def _critical_chunks(q: Tensor, k: Tensor, kv_indices: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Split the G * R query blocks into cache-sized chunks of C.

    Yields their slice, their C * topk critical blocks among the G * N key blocks, and which of them, (C, 1, 1), end
    with the last block of a head. Critical blocks ascend, so no other position can hold that block.
    """
    num_heads, num_key_blocks, block_n, head_dim = k.shape
    topk = kv_indices.shape[2]
    offsets = torch.arange(0, num_heads * num_key_blocks, num_key_blocks, device=k.device)
    flat = (kv_indices + offsets[:, None, None]).flatten()
    ends = (kv_indices[..., -1] == num_key_blocks - 1).view(-1, 1, 1)

    size = k.element_size() * topk * block_n * (head_dim + 2 * q.shape[2])  # gathered keys or values, scores, weights
    chunk = max(1, CHUNK_BYTES // size) * torch.get_num_threads()
    for i in range(0, len(ends), chunk):
        yield slice(i, i + chunk), flat[i * topk : (i + chunk) * topk], ends[i : i + chunk]


def _critical_weights(q: Tensor, k: Tensor, ends: Tensor, padding: int) -> Tensor:
    """Softmax of scaled queries (C, block_m, D) over gathered keys (C, topk * block_n, D)."""
    s = torch.bmm(q, k.mT)
    if padding:
        s[..., -padding:].masked_fill_(ends, -torch.inf)
    return torch.softmax(s, -1)


def _sparse_forward(q: Tensor, k: Tensor, v: Tensor, kv_indices: Tensor, length: int, out: Tensor) -> None:
    """Write O^s into `out` (G, R, block_m, D); q comes scaled."""
    q_flat, k_flat, v_flat, out_flat = (x.flatten(0, 1) for x in (q, k, v, out))
    gathered = (-1, kv_indices.shape[2] * k.shape[2], k.shape[3])
    padding = k.shape[1] * k.shape[2] - length
    for rows, blocks, ends in _critical_chunks(q, k, kv_indices):
        p = _critical_weights(q_flat[rows], k_flat.index_select(0, blocks).view(gathered), ends, padding)
        torch.bmm(p, v_flat.index_select(0, blocks).view(gathered), out=out_flat[rows])


def _sparse_backward(
    q: Tensor, k: Tensor, v: Tensor, kv_indices: Tensor, length: int, do: Tensor, dk: Tensor, dv: Tensor
) -> Tensor:
    """Add to dk and dv, and return dq; q comes scaled, and dq is the gradient of that."""
    dq = torch.empty_like(q)
    q_flat, k_flat, v_flat, do_flat, dq_flat, dk_flat, dv_flat = (x.flatten(0, 1) for x in (q, k, v, do, dq, dk, dv))
    gathered, block = (-1, kv_indices.shape[2] * k.shape[2], k.shape[3]), (-1, k.shape[2], k.shape[3])
    padding = k.shape[1] * k.shape[2] - length
    for rows, blocks, ends in _critical_chunks(q, k, kv_indices):
        q_c, do_c = q_flat[rows], do_flat[rows]
        k_c = k_flat.index_select(0, blocks).view(gathered)
        p = _critical_weights(q_c, k_c, ends, padding)
        dv_flat.index_add_(0, blocks, torch.bmm(p.mT, do_c).view(block))
        dp = torch.bmm(do_c, v_flat.index_select(0, blocks).view(gathered).mT)
        ds = dp.sub_((p * dp).sum(-1, keepdim=True)).mul_(p)
        torch.bmm(ds, k_c, out=dq_flat[rows])
        dk_flat.index_add_(0, blocks, torch.bmm(ds.mT, q_c).view(block))
    return dq


# The states are the logs of z (G, N, D) and the means H (G, N, D, D), one for each key block, or with N = 1 for the
# domain "all". The log of 0 is -inf.


def _join(x: Tensor, config: SLAConfig) -> Tensor:
    """Make one block of all, (G, 1, rows, D), for the domain "all", where every block meets the same state."""
    return x.flatten(1, 2).unsqueeze(1) if config.linear_domain == "all" else x


def _key_runs(k: Tensor, config: SLAConfig, length: int) -> Iterator[tuple[slice, Tensor]]:
    """Split the key blocks into runs of about RUN_BYTES: slices of blocks, and log phi(K), -inf after the end."""
    step = max(1, RUN_BYTES // (4 * k[:, 0].numel()))
    for j in range(0, k.shape[1], step):
        logs = _feature_logs(k[:, j : j + step], config.feature_map)
        logs.flatten(1, 2)[:, max(0, length - j * k.shape[2]) :] = -torch.inf
        yield slice(j, j + step), _join(logs, config)


def key_states(k: Tensor, v: Tensor, config: SLAConfig, length: int) -> tuple[Tensor, Tensor]:
    """Log z and H of each key block, or of all."""
    parts = []
    for run, logs in _key_runs(k, config, length):
        weights, z = _normalise(logs, 2)
        parts.append((z, weights.mT @ _join(v[:, run], config)))
    if len(parts) == 1:
        return parts[0]
    z, means = (torch.cat(x, 1) for x in zip(*parts, strict=True))
    if config.linear_domain == "all":
        shares, z = _normalise(z, 1, keepdim=True)
        means = (shares[..., None] * means).sum(1, keepdim=True)
    return z, means


def _normalise(logs: Tensor, dim: int, eps: float = 0.0, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    """Exponentials divided by eps and their sum over a dimension, 0 where that is 0; and the log of their sum."""
    shift = logs.amax(dim, keepdim=True)
    shift = shift.masked_fill(shift == -torch.inf, 0)
    weights = (logs - shift).exp_()
    total = weights.sum(dim, keepdim=True)
    divisor = total + eps * torch.exp(-shift) if eps else total
    z = shift + total.log()
    return weights.div_(divisor.masked_fill(divisor == 0, 1)), z if keepdim else z.squeeze(dim)


def _mix(z: Tensor, means: Tensor, domain: Tensor) -> tuple[Tensor, Tensor, Tensor, Unmix]:
    """Mix the states over the domain (G, R, N) of each query block; see the head of this file.

    Returns: log z_d, (G, R, D); H_d times a total, (G, R, D, D); the total, (G, R, D): z_d / Z_d, or 1 where that is 0
    and from `_mix_each`; and a function that adds the gradients of the query blocks' states, divided by the total, to
    those of the key blocks' states, both as `_states_backward` takes them.
    """
    shares, log_sum = _normalise(z, 1, keepdim=True)
    mask = domain.to(z.dtype)
    total = mask @ shares
    if ((total < torch.finfo(z.dtype).tiny ** 0.5) & (mask @ (z > -torch.inf).to(z.dtype) > 0)).any():
        return _mix_each(z, means, domain)
    shares = shares[..., None]
    sums = (mask @ (shares * means).flatten(2)).unflatten(2, means.shape[2:])

    def unmix(dsums: Tensor, dstates: Tensor) -> None:
        dstates.addcmul_((mask.mT @ dsums.flatten(2)).unflatten(2, dsums.shape[2:]), shares)

    return log_sum + total.log(), sums, total.masked_fill(total == 0, 1), unmix


def _mix_each(z: Tensor, means: Tensor, domain: Tensor) -> tuple[Tensor, Tensor, Tensor, Unmix]:
    """As `_mix`, by z_nd / z_d of each query block, key block and feature: slower by that many exponentials."""
    shares, z = _normalise(z[:, None].masked_fill(~domain[..., None], -torch.inf), 2)
    shares = shares.permute(0, 3, 1, 2).contiguous()  # (G, D, R, N)

    def unmix(dsums: Tensor, dstates: Tensor) -> None:
        dstates.add_((shares.mT @ dsums.transpose(1, 2)).transpose(1, 2))

    return z, (shares @ means.transpose(1, 2)).transpose(1, 2), torch.ones_like(z), unmix


def _states_backward(
    k: Tensor, v: Tensor, config: SLAConfig, length: int, z: Tensor, dstates: Tensor, dk: Tensor, dv: Tensor
) -> None:
    """Add to dk and dv; the gradients of the states are those of sums, not of means: they come mixed."""
    z = z.masked_fill(z == -torch.inf, 0)
    for run, logs in _key_runs(k, config, length):
        where = slice(None) if config.linear_domain == "all" else run
        dsums, dtotal = dstates[:, where, :, :-1], dstates[:, where, None, :, -1]
        weights = (logs - z[:, where, None]).exp_()
        dlogs = (_join(v[:, run], config) @ dsums.mT).add_(dtotal).mul_(weights)
        dk[:, run] += _feature_logs_backward(dlogs.view(dk[:, run].shape), k[:, run], config.feature_map)
        dv[:, run] += (weights @ dsums).view(dv[:, run].shape)


def _linear_rows(
    q: Tensor, z: Tensor, means: Tensor, domain: Tensor | None, config: SLAConfig
) -> tuple[Tensor, Tensor, Tensor | None, Unmix | None, Tensor]:
    """u over the total, then H times the total, the total and the function of `_mix`, or H, None and None; and O^l."""
    total = unmix = None
    if domain is not None:
        z, means, total, unmix = _mix(z, means, domain)
    if config.feature_map == "softmax" and EPSILON[config.linear_domain] == 0:
        logs = q - q.amax(-1, keepdim=True)  # the denominator of phi cancels
    else:
        logs = _feature_logs(q, config.feature_map)
    weights, _ = _normalise(_join(logs, config) + z[:, :, None], 3, EPSILON[config.linear_domain])
    if total is not None:
        weights.div_(total[:, :, None])
    return weights, means, total, unmix, weights @ means


def _linear_backward(
    q: Tensor,
    z: Tensor,
    means: Tensor,
    domain: Tensor | None,
    weight: Tensor,
    config: SLAConfig,
    do: Tensor,
    dstates: Tensor,
    dweight: Tensor,
) -> Tensor:
    """Add to dstates and dweight, and return dq."""
    weights, sums, total, unmix, o_linear = _linear_rows(q, z, means, domain, config)
    do = _join(do, config)
    dweight += do.flatten(0, 2).mT @ o_linear.flatten(0, 2)
    do = do @ weight
    delta = (do * o_linear).sum(-1, keepdim=True)
    dstate = weights.mT @ torch.cat([do, -delta], -1)
    if unmix is None:
        dstates += dstate
    else:
        unmix(dstate, dstates)
    dlogs = do @ sums.mT
    dlogs = dlogs.sub_(delta) if total is None else dlogs.addcmul_(delta, total[:, :, None], value=-1)
    return _feature_logs_backward(dlogs.mul_(weights).view(q.shape), q, config.feature_map)


def _feature_logs(x: Tensor, name: FeatureMap) -> Tensor:
    """Log phi(x)."""
    if name == "softmax":
        return x.log_softmax(-1)
    return torch.where(x < 0, x, x.clamp(min=0).log1p()) if name == "elu" else x.relu().log()


def _feature_logs_backward(dlogs: Tensor, x: Tensor, name: FeatureMap) -> Tensor:
    """Gradient of x, given that of log phi(x)."""
    if name == "softmax":
        return dlogs - x.softmax(-1) * dlogs.sum(-1, keepdim=True)
    if name == "elu":
        return dlogs / (x.clamp(min=0) + 1)
    return dlogs / x.masked_fill(x <= 0, 1)  # where x <= 0, dlogs is 0
