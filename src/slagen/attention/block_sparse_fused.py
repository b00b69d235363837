"""Attention to the kept key blocks only by SLA's Triton kernels, as one PyTorch operator: its sparse branch alone.

Blocks are runs of a sequence, of which only the last may be partial. Rows may keep different numbers of blocks: shorter
lists go on with a block behind the last, all of whose keys the kernels mask.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from slagen.attention.sla.config import SLAConfig
from slagen.attention.sla.fused import alone, verify


def fused_block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, kept: Tensor, scale: float, blocks: tuple[int, int]
) -> Tensor:
    """Attend with the Triton kernels; arguments and result as in `block_sparse_attention`. Differentiable once."""
    verify(q, SLAConfig(block_m=blocks[0], block_n=blocks[1]))
    return _operator(q, k, v, kept, *blocks, scale)[0]


def operator_of_kept(name: str, forward: Callable[..., Any], backward: Callable[..., Any]) -> Callable[..., Any]:
    """The PyTorch operator of a softmax over kept blocks, and perhaps more, whose gradients need only o and lse.

    Args:
        name: of the operator. forward, backward: as `_forward` and `_backward` here, all types of arguments annotated.
    Returns: what takes the arguments of `forward`; differentiable once, in q, k and v.
    """
    attend = torch.library.custom_op(f"slagen::{name}_forward", forward, mutates_args=())
    differentiate = torch.library.custom_op(f"slagen::{name}_backward", backward, mutates_args=())

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        q, k, v, kept, *ctx.options = inputs
        ctx.save_for_backward(q, k, v, kept, *output)
        ctx.mark_non_differentiable(output[1])

    def autograd(ctx: Any, do: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return *differentiate(do, *ctx.saved_tensors, *ctx.options), *(None,) * 4

    attend.register_autograd(autograd, setup_context=setup_context)
    attend.register_fake(
        lambda q, *_: (torch.empty_like(q), q.new_empty(q.shape[0] * q.shape[1], q.shape[2], dtype=torch.float32))
    )
    differentiate.register_fake(lambda do, q, k, v, *_: tuple(torch.empty_like(x) for x in (q, k, v)))
    return attend


def _forward(
    q: Tensor, k: Tensor, v: Tensor, kept: Tensor, block_m: int, block_n: int, scale: float
) -> tuple[Tensor, Tensor]:
    """o, and log2 of the softmax denominator (B * H, L) float32."""
    from slagen.kernels.block_means import kept_columns
    from slagen.kernels.forward import attend

    with alone(q):
        kv_indices, _ = kept_columns(kept.flatten(0, 1))
        o, empty = torch.empty_like(q), q.new_empty(0)
        lse = q.new_empty(q.shape[0] * q.shape[1], q.shape[2], dtype=torch.float32)
        attend(
            q, k, v, o, lse, kv_indices, empty, empty, None, block_m=block_m, block_n=block_n,
            num_critical=kv_indices.shape[2], linear=False, marginal=False, feature_map="softmax", eps=0.0,
            scale=scale, sparse=True,
        )  # fmt: skip
    return o, lse


def kept_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, kept: Tensor, o: Tensor, lse: Tensor, block_m: int, block_n: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk and dv through the kept blocks, where o and lse may be those of a softmax over more than these."""
    from slagen.kernels import sla_backward
    from slagen.kernels.block_means import kept_lists_of_columns

    kv_indices, classes, q_indices, q_offsets = kept_lists_of_columns(kept.flatten(0, 1))
    empty = q.new_empty(0)
    dq, dk, dv, *_ = sla_backward(
        do, q, k, v, None, None, o, lse, kv_indices, classes, q_indices, q_offsets, empty, empty, block_m=block_m,
        block_n=block_n, num_critical=kv_indices.shape[2], num_negligible=0, marginal=False, feature_map="softmax",
        eps=0.0, scale=scale, sparse=True,
    )  # fmt: skip
    return dq, dk, dv


def _backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, kept: Tensor, o: Tensor, lse: Tensor, block_m: int, block_n: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    with alone(q):
        return kept_backward(do, q, k, v, kept, o, lse, block_m, block_n, scale)


_operator = operator_of_kept("block_sparse_fused", _forward, _backward)
