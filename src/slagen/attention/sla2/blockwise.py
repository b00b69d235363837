"""The two branches of SLA2 block by block, as one operator for PyTorch with its gradients.

Its pieces are those of SLA: `blockwise_sparse.py`, `blockwise_linear.py` and `blocks.py`. What bounds the memory there
bounds it here.
"""

from typing import Any

import torch
from torch import Tensor

from slagen.attention.sla.blocks import from_blocks, head_groups, query_runs, rows_of_run, to_blocks
from slagen.attention.sla.blockwise_linear import key_states, linear_backward, linear_rows, states_backward
from slagen.attention.sla.blockwise_sparse import kept_lists, sparse_backward, sparse_forward
from slagen.attention.sla.config import SLAConfig


def blockwise_branches(
    q: Tensor, k: Tensor, v: Tensor, log_kept: Tensor | None, rest: Tensor, config: SLAConfig, scale: float,
    int8: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Attend exactly to the kept blocks, and linearly to the rest. Differentiable once.

    Args:
        q, k, v: (B, H, L, D), any floating dtype; k may have another than q and v.
        log_kept: (B, H, M, N), log of the degree to which each block is kept; None keeps those that are not the rest.
        rest: (B, H, M, N), the log of the degree to which each block enters the linear branch; with log_kept None bool,
            False at least once in a row.
        config: its block sizes count.
        int8: round in the sparse branch as in 8-bit arithmetic; gradients are those without.
    Returns: o_sparse and o_linear, (B, H, L, D), and the log of the sparse branch's denominator, (B, H, L); float32, or
        float64 for float64.
    """
    return _forward(q, k, v, log_kept, rest, config.block_m, config.block_n, scale, int8)


_BLOCK = (-2, -1)  # the rows and channels of a block


def rounded(x: Tensor, together: tuple[int, ...] = (-1,)) -> Tensor:
    """x in 127 steps from 0 to its largest magnitude along some dimensions: the numbers that int8 stands for."""
    step = x.abs().amax(together, keepdim=True) / 127
    step.masked_fill_(step == 0, 1)
    return (x / step).round_().mul_(step)


def _config(block_m: int, block_n: int) -> SLAConfig:
    return SLAConfig(linear_domain="marginal", block_m=block_m, block_n=block_n)


@torch.library.custom_op("slagen::sla2_forward", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_kept: Tensor | None,
    rest: Tensor,
    block_m: int,
    block_n: int,
    scale: float,
    int8: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    config, length = _config(block_m, block_n), q.shape[2]
    o_sparse, o_linear, lse = _outputs(q)
    for heads in head_groups(q):
        k_j, v_j = to_blocks(k[heads], block_n), to_blocks(v[heads], block_n)
        z, means = key_states(k_j, v_j, config, length)
        k_s, v_s = (rounded(k_j, _BLOCK), rounded(v_j, _BLOCK)) if int8 else (k_j, v_j)
        for run, tokens in query_runs(q, block_m):
            q_i = to_blocks(q[heads][:, :, tokens], block_m)
            q_s = rounded(q_i, _BLOCK) if int8 else q_i
            o_i, lse_i = torch.empty_like(q_i), torch.empty_like(q_i[..., 0])
            rest_i, indices, counts, bias = _kept(log_kept, rest, heads, run)
            sparse_forward(
                q_s * scale, k_s, v_s, indices, length, o_i, lse=lse_i, bias=bias, counts=counts,
                rounded=rounded if int8 else None,
            )  # fmt: skip
            from_blocks(o_i, o_sparse[heads][:, :, tokens])
            from_blocks(lse_i[..., None], lse[heads][:, :, tokens, None])
            *_, o_i = linear_rows(q_i, z, means, rest_i, config)
            from_blocks(o_i, o_linear[heads][:, :, tokens])
    return o_sparse, o_linear, lse


@_forward.register_fake
def _(q, k, v, log_kept, rest, block_m, block_n, scale, int8):
    return _outputs(q)


def _outputs(q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(q.dtype, torch.float32)
    o_sparse, o_linear = (torch.empty_like(q, dtype=dtype) for _ in range(2))
    return o_sparse, o_linear, q.new_empty(q.shape[:3], dtype=dtype)


def _kept(
    log_kept: Tensor | None, rest: Tensor, heads: tuple[slice, slice], run: slice
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Of a run: the rest, and lists of the kept blocks with their counts and log degrees, as `sparse_forward` takes it.

    How long the lists are depends on numbers, which a compiled graph does not know: they are made inside the operator.
    """
    rest_i = rows_of_run(rest, heads, run)
    if log_kept is None:
        return rest_i, *kept_lists(~rest_i), None
    every = torch.arange(rest_i.shape[2], device=rest_i.device).expand(rest_i.shape)
    return rest_i, every, None, rows_of_run(log_kept, heads, run)


@torch.library.custom_op("slagen::sla2_backward", mutates_args=())
def _backward(
    do_sparse: Tensor,
    do_linear: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_kept: Tensor | None,
    rest: Tensor,
    block_m: int,
    block_n: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, and those of log_kept and rest, empty where there is none."""
    config, length = _config(block_m, block_n), q.shape[2]
    grads = dq, dk, dv, dkept, drest = _gradients(q, k, v, log_kept, rest)
    with torch.autocast(q.device.type, enabled=False):
        for heads in head_groups(q):
            k_j, v_j = to_blocks(k[heads], block_n), to_blocks(v[heads], block_n)
            dk_j, dv_j = torch.zeros_like(k_j), torch.zeros_like(v_j)
            z, means = key_states(k_j, v_j, config, length)
            dstates = means.new_zeros(*means.shape[:3], means.shape[3] + 1)
            for run, tokens in query_runs(q, block_m):
                q_i, do_i, do_l, dlse_i = (
                    to_blocks(x[heads][:, :, tokens], block_m) for x in (q, do_sparse, do_linear, dlse[..., None])
                )
                rest_i, indices, counts, bias = _kept(log_kept, rest, heads, run)
                dbias = None if bias is None else torch.empty_like(bias)
                dq_i = sparse_backward(
                    q_i * scale, k_j, v_j, indices, length, do_i, dk_j, dv_j,
                    dlse=dlse_i[..., 0], bias=bias, dbias=dbias, counts=counts,
                ).mul_(scale)  # fmt: skip
                drest_i = None if rest_i.dtype == torch.bool else torch.empty_like(rest_i)
                dq_i += linear_backward(q_i, z, means, rest_i, config, do_l, dstates, drest_i)[0]
                from_blocks(dq_i, dq[heads][:, :, tokens])
                for d, own in ((dkept, dbias), (drest, drest_i)):
                    if own is not None:
                        d[heads][:, :, run] = own.view_as(d[heads][:, :, run])
            states_backward(k_j, v_j, config, length, z, dstates, dk_j, dv_j)
            from_blocks(dk_j, dk[heads])
            from_blocks(dv_j, dv[heads])
    return grads


@_backward.register_fake
def _(do_sparse, do_linear, dlse, q, k, v, log_kept, rest, block_m, block_n, scale):
    return _gradients(q, k, v, log_kept, rest)


def _gradients(
    q: Tensor, k: Tensor, v: Tensor, log_kept: Tensor | None, rest: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dkept = q.new_empty(0) if log_kept is None else torch.empty_like(log_kept)
    drest = q.new_empty(0) if rest.dtype == torch.bool else torch.empty_like(rest)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), dkept, drest


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, block_m, block_n, scale, _int8 = inputs
    ctx.save_for_backward(*tensors)
    ctx.options = block_m, block_n, scale


def _autograd(ctx: Any, do_sparse: Tensor, do_linear: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
    _, _, _, log_kept, rest = saved = ctx.saved_tensors
    dq, dk, dv, dkept, drest = _backward(do_sparse, do_linear, dlse, *saved, *ctx.options)
    none = (None,) * 4
    return dq, dk, dv, None if log_kept is None else dkept, None if rest.dtype == torch.bool else drest, *none


_forward.register_autograd(_autograd, setup_context=_setup_context)
