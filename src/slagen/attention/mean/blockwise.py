"""Attention with block means block by block: what `reference.py` defines, in memory that grows with L N, not L^2.

The kept blocks are the sparse branch of `sla/blockwise_sparse.py`, with output O^s and log-sum-exp lse. In the softmax
that holds the means of the rejected blocks too, that branch is one more key, with score lse and value O^s:

    p = softmax(scale q_t . c_1 + log n_1, ..., scale q_t . c_N + log n_N, lse)        kept blocks masked
    o = sum_j p_j u_j + p_s O^s

which is the one softmax of the definition. With delta = rowsum(dO * O), the gradients of the scores are p (dP - delta)
throughout, and p_s times that for the scores inside the branch.

The backward pass computes the scores of each chunk again: the inputs, lse and the selection are kept for it. Which
blocks are kept comes in as a mask, so any selection will do. G, R and blocks are as in `sla/blocks.py`.
"""

from typing import Any

import torch
from torch import Tensor

from slagen.attention.sla.block_map import block_tokens
from slagen.attention.sla.blocks import from_blocks, head_groups, query_runs, rows_of_run, to_blocks
from slagen.attention.sla.blockwise_sparse import kept_lists, sparse_backward, sparse_forward


def blockwise_attention(
    q: Tensor, k: Tensor, v: Tensor, kept: Tensor, block_m: int, block_n: int, scale: float
) -> Tensor:
    """Attend block by block. Differentiable once.

    Args:
        q, k, v: (B, H, L, D), float16, bfloat16, float32 or float64, any strides.
        kept: (B, H, M, N) bool, the key blocks that each query block attends to exactly, at least one.
        scale: factor on q @ k^T before softmax.
    Returns: o (B, H, L, D) in q's dtype.
    """
    return _forward(q, k, v, kept, block_m, block_n, scale)[0]


def _means(blocks: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Means of blocks (G, N, block_n, D), with zeros after them for the sparse branch, (G, N + 1, D); and n, (N, 1)."""
    counts = block_tokens(length, blocks.shape[2], blocks.device)[:, None].to(blocks.dtype)
    means = blocks.new_zeros(blocks.shape[0], blocks.shape[1] + 1, blocks.shape[3])
    torch.div(blocks.sum(2), counts, out=means[:, :-1])
    return means, counts


def _weights(q: Tensor, means: Tensor, counts: Tensor, kept: Tensor, lse: Tensor) -> Tensor:
    """p above, (G, R * block_m, N + 1), of scaled queries (G, R, block_m, D), kept (G, R, N), lse (G, R, block_m)."""
    s = q.flatten(1, 2) @ means.mT
    s[..., -1] = lse.flatten(1)
    scores = s[..., :-1].unflatten(1, q.shape[1:3])
    scores.add_(counts.mT.log()).masked_fill_(kept[:, :, None], -torch.inf)
    return s.softmax(-1)


@torch.library.custom_op("slagen::block_means_forward", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, kept: Tensor, block_m: int, block_n: int, scale: float
) -> tuple[Tensor, Tensor]:
    """o, and lse (B, H, M, block_m)."""
    o, length = torch.empty_like(q), q.shape[2]
    lse = q.new_empty(*kept.shape[:3], block_m, dtype=torch.promote_types(q.dtype, torch.float32))
    for heads in head_groups(q):
        k_j, v_j = to_blocks(k[heads], block_n), to_blocks(v[heads], block_n)
        (key_means, counts), value_means = _means(k_j, length), _means(v_j, length)[0]
        for run, tokens in query_runs(q, block_m):
            q_i = to_blocks(q[heads][:, :, tokens], block_m) * scale
            o_i, lse_i, kept_i = torch.empty_like(q_i), torch.empty_like(q_i[..., 0]), rows_of_run(kept, heads, run)
            lists, num_kept = kept_lists(kept_i)
            sparse_forward(q_i, k_j, v_j, lists, length, o_i, lse_i, counts=num_kept)
            p = _weights(q_i, key_means, counts, kept_i, lse_i)
            o_i.mul_(p[..., -1:].view(*lse_i.shape, 1)).add_((p @ value_means).view(o_i.shape))
            from_blocks(o_i, o[heads][:, :, tokens])
            lse[heads][:, :, run] = lse_i.view(lse[heads][:, :, run].shape)
    return o, lse


@_forward.register_fake
def _(q, k, v, kept, block_m, block_n, scale):
    lse = q.new_empty(*kept.shape[:3], block_m, dtype=torch.promote_types(q.dtype, torch.float32))
    return torch.empty_like(q), lse


@torch.library.custom_op("slagen::block_means_backward", mutates_args=())
def _backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kept: Tensor,
    lse: Tensor,
    block_m: int,
    block_n: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    length = q.shape[2]
    with torch.autocast(q.device.type, enabled=False):
        for heads in head_groups(q):
            k_j, v_j = to_blocks(k[heads], block_n), to_blocks(v[heads], block_n)
            dk_j, dv_j = torch.zeros_like(k_j), torch.zeros_like(v_j)
            (key_means, counts), value_means = _means(k_j, length), _means(v_j, length)[0]
            dkey_means, dvalue_means = torch.zeros_like(key_means), torch.zeros_like(value_means)
            for run, tokens in query_runs(q, block_m):
                q_i = to_blocks(q[heads][:, :, tokens], block_m) * scale
                do_i = to_blocks(do[heads][:, :, tokens], block_m)
                kept_i, lse_i = rows_of_run(kept, heads, run), rows_of_run(lse, heads, run)
                p = _weights(q_i, key_means, counts, kept_i, lse_i)
                dp = do_i.flatten(1, 2) @ value_means.mT
                share, delta = p[..., -1:].view(*lse_i.shape, 1), (p * dp).sum(-1).view(*lse_i.shape, 1)
                lists, num_kept = kept_lists(kept_i)
                dq_i = sparse_backward(
                    q_i, k_j, v_j, lists, length, do_i * share, dk_j, dv_j, counts=num_kept, merged=(share, delta)
                )  # delta is that of the whole now
                ds = dp.sub_(delta.view(*dp.shape[:2], 1)).mul_(p)
                dq_i += (ds @ key_means).view(dq_i.shape)
                dkey_means += ds.mT @ q_i.flatten(1, 2)
                dvalue_means += p.mT @ do_i.flatten(1, 2)
                from_blocks(dq_i.mul_(scale), dq[heads][:, :, tokens])
            dk_j += (dkey_means[:, :-1] / counts)[:, :, None]
            dv_j += (dvalue_means[:, :-1] / counts)[:, :, None]
            from_blocks(dk_j, dk[heads])
            from_blocks(dv_j, dv[heads])
    return dq, dk, dv


@_backward.register_fake
def _(do, q, k, v, *_):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, kept, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, kept, output[1])
    ctx.mark_non_differentiable(output[1])


def _autograd(ctx: Any, do: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward(do, *ctx.saved_tensors, *ctx.options), *(None,) * 4


_forward.register_autograd(_autograd, setup_context=_setup_context)
