"""Sparse-linear attention block by block: what `reference.py` defines, in memory that grows with L, not L^2.

`blocks.py` cuts q, k and v into blocks, `blockwise_sparse.py` has the sparse branch and `blockwise_linear.py` the
linear one; here they become one operator for PyTorch, with its gradients.

The backward pass computes the scores of each chunk again, so only the inputs and the selection are kept for it.
Beside those and the outputs, memory holds the keys, values and states of a group of short heads or of one long head,
and one run or chunk of its queries, at a time.
"""

from typing import Any

import torch
from torch import Tensor

from slagen.attention.sla.block_map import MARGINAL, block_map, block_scores, critical_indices
from slagen.attention.sla.blocks import from_blocks, head_groups, query_runs, rows_of_run, to_blocks
from slagen.attention.sla.blockwise_linear import key_states, linear_backward, linear_rows, states_backward
from slagen.attention.sla.blockwise_sparse import sparse_backward, sparse_forward
from slagen.attention.sla.config import SLAConfig
from slagen.timing import part


def blockwise_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: SLAConfig,
    proj_weight: Tensor | None,
    proj_bias: Tensor | None,
    scale: float,
    sparse: bool,
    scores: Tensor | None = None,
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
    return _forward(q, k, v, weight, bias, *options, scale, sparse, scores)[0]


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
    scores: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """o, and for the backward pass what `select_blocks` gives, empty for None."""
    config = SLAConfig(sparsity, negligible, linear_domain, feature_map, block_m, block_n)  # type: ignore[arg-type]
    with part("block_map"):
        kv_indices, domain = select_blocks(q, k, config, sparse, linear=weight is not None, scores=scores)
    o, length = torch.empty_like(q), q.shape[2]
    for heads in head_groups(q):
        k_j, v_j = to_blocks(k[heads], config.block_n), to_blocks(v[heads], config.block_n)
        if weight is not None:
            with part("state"):
                z, means = key_states(k_j, v_j, config, length)
            if domain is None:  # project the one state, not every row
                with part("projection"):
                    means = means @ weight.mT
        for run, tokens in query_runs(q, config.block_m):
            q_i = to_blocks(q[heads][:, :, tokens], config.block_m)
            o_i = torch.empty_like(q_i)
            if kv_indices is None:
                o_i.zero_()
            else:
                with part("sparse"):
                    sparse_forward(q_i * scale, k_j, v_j, rows_of_run(kv_indices, heads, run), length, o_i)
            if weight is not None:
                domain_i = None if domain is None else rows_of_run(domain, heads, run)
                with part("linear"):
                    *_, o_linear = linear_rows(q_i, z, means, domain_i, config)
                if domain is not None:
                    with part("projection"):
                        o_linear = o_linear @ weight.mT
                o_i += o_linear.view(o_i.shape)
            if bias is not None:
                o_i += bias
            from_blocks(o_i, o[heads][:, :, tokens])
    nothing = torch.empty(0, device=q.device)
    return o, nothing.long() if kv_indices is None else kv_indices, nothing.bool() if domain is None else domain


@_forward.register_fake
def _(
    q,
    k,
    v,
    weight,
    bias,
    sparsity,
    negligible,
    linear_domain,
    feature_map,
    block_m,
    block_n,
    scale,
    sparse,
    scores=None,
):
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
            for run, tokens in query_runs(q, config.block_m):
                q_i = to_blocks(q[heads][:, :, tokens], config.block_m)
                do_i = to_blocks(do[heads][:, :, tokens], config.block_m)
                if sparse:
                    indices = rows_of_run(kv_indices, heads, run)
                    dq_i = sparse_backward(q_i * scale, k_j, v_j, indices, length, do_i, dk_j, dv_j).mul_(scale)
                else:
                    dq_i = torch.zeros_like(q_i)
                if weight is not None:
                    domain_i = rows_of_run(domain, heads, run) if bounded else None
                    dq_linear, o_linear = linear_backward(q_i, z, means, domain_i, config, do_i @ weight, dstates)
                    dq_i += dq_linear
                    dweight += do_i.flatten(0, 2).mT @ o_linear.flatten(0, 2)
                if bias is not None:
                    dbias += do_i.sum((0, 1, 2))
                from_blocks(dq_i, dq[heads][:, :, tokens])
            if weight is not None:
                states_backward(k_j, v_j, config, length, z, dstates, dk_j, dv_j)
            from_blocks(dk_j, dk[heads])
            from_blocks(dv_j, dv[heads])
    return dq, dk, dv, dweight, dbias


@_backward.register_fake
def _(do, q, k, v, weight, bias, *_):
    return (
        *(torch.empty_like(x) for x in (q, k, v)),
        *(q.new_empty(0) if x is None else torch.empty_like(x) for x in (weight, bias)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, weight, bias, *ctx.options, _scores = inputs
    ctx.save_for_backward(q, k, v, weight, bias, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _autograd(ctx: Any, do: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    *_, weight, bias, _, _ = saved = ctx.saved_tensors
    *grads, dweight, dbias = _backward(do, *saved, *ctx.options)
    return *grads, None if weight is None else dweight, None if bias is None else dbias, *(None,) * 9


_forward.register_autograd(_autograd, setup_context=_setup_context)


def select_blocks(
    q: Tensor, k: Tensor, config: SLAConfig, sparse: bool, linear: bool, scores: Tensor | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """What the branches need of the block map: kv_indices (B, H, M, topk), and marginal blocks (B, H, M, N) bool.

    scores: (B, H, M, N), by which blocks are ranked; None takes `block_scores`.
    """
    bounded = linear and config.linear_domain == "marginal"
    if not sparse and not bounded:
        return None, None
    scores = block_scores(q, k, config) if scores is None else scores
    kv_indices = critical_indices(scores, config) if sparse else None
    return kv_indices, block_map(scores, config) == MARGINAL if bounded else None
