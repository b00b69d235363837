"""Attention with block means by the Triton kernels, as one PyTorch operator.

The forward pass is the attend kernel of SLA over the kept blocks, and a kernel that goes on over the means. As p and
delta of the whole softmax are those of its parts, SLA's backward kernels, given o and lse of the whole, make the
gradients through the kept blocks; those through the means are a few products in PyTorch, a run of rows at a time.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from slagen.attention.block_sparse_fused import kept_backward, operator_of_kept
from slagen.attention.mean.config import MeanConfig, SolConfig
from slagen.attention.mean.reference import reference_attention
from slagen.attention.mean.selection import kept_blocks
from slagen.attention.sla.block_map import block_means, block_tokens
from slagen.attention.sla.config import SLAConfig
from slagen.attention.sla.fused import alone, autograd_of_its_own, first_fault, verify
from slagen.errors import KernelProblem

SCORE_BYTES = 2**28  # scores of queries and means that the backward pass holds at a time


def fused_attention(q: Tensor, k: Tensor, v: Tensor, kept: Tensor, block_m: int, block_n: int, scale: float) -> Tensor:
    """Attend with the Triton kernels; arguments and result as in `blockwise_attention`. Differentiable once."""
    verify(q, SLAConfig(block_m=block_m, block_n=block_n))
    return _operator(q, k, v, kept, block_m, block_n, scale)[0]


def check_kernels(head_dim: int, device: torch.device, dtype: torch.dtype, config: MeanConfig | SolConfig) -> None:
    """Try the kernels forward and backward on a few blocks. Raises KernelProblem where they fail or are wrong."""
    from slagen.kernels.failures import LaunchError, launching

    length = 5 * max(config.block_m, config.block_n) + 5
    make: dict[str, Any] = {"generator": torch.Generator(device).manual_seed(0), "device": device}
    with autograd_of_its_own():
        inputs = [torch.randn(1, 2, length, head_dim, **make).to(dtype).requires_grad_() for _ in range(3)]
        wide = [x.detach().double().requires_grad_() for x in inputs]
        do = torch.randn(1, 2, length, head_dim, **make)
        exact = reference_attention(wide[0], wide[1], wide[2], config, head_dim**-0.5)
        truth = [exact.detach(), *torch.autograd.grad(exact, wide, do.double())]
        kept = kept_blocks(wide[0], wide[1], config)
        verify(inputs[0], SLAConfig(block_m=config.block_m, block_n=config.block_n))
        try:
            with launching():
                o = fused_attention(
                    inputs[0], inputs[1], inputs[2], kept, config.block_m, config.block_n, head_dim**-0.5
                )  # fmt: skip
                found = [o.detach(), *torch.autograd.grad(o, inputs, do.to(dtype))]
        except LaunchError as error:
            message = f"the Triton kernels fail on {device}: {error.reason}. Try --backend torch."
            raise KernelProblem(message) from error
    if (fault := first_fault(found, truth, dtype)) is not None:
        raise KernelProblem(f"the Triton kernels fail on {device}: {fault}. Try --backend torch.")


def _forward(
    q: Tensor, k: Tensor, v: Tensor, kept: Tensor, block_m: int, block_n: int, scale: float
) -> tuple[Tensor, Tensor]:
    from slagen.kernels.block_means import block_means_forward

    with alone(q):
        return block_means_forward(q, k, v, kept.flatten(0, 1), block_m=block_m, block_n=block_n, scale=scale)


def _backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, kept: Tensor, o: Tensor, lse: Tensor, block_m: int, block_n: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    with alone(q):
        dq, dk, dv = kept_backward(do, q, k, v, kept, o, lse, block_m, block_n, scale)
        _add_means_backward(do, q, k, v, kept, o, lse, block_m, block_n, scale, (dq, dk, dv))
    return dq, dk, dv


def _add_means_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, kept: Tensor, o: Tensor, lse: Tensor, block_m: int, block_n: int,
    scale: float, grads: tuple[Tensor, Tensor, Tensor],
) -> None:  # fmt: skip
    """Add the gradients through the block means to those through the kept blocks; products in float32."""
    (dq, dk, dv), (batch, num_heads, length, _), num_columns = grads, q.shape, kept.shape[3]
    counts = block_tokens(length, block_n, q.device).float()
    block_of = torch.arange(length, device=q.device) // block_n
    step = max(1, SCORE_BYTES // (4 * num_columns * block_m)) * block_m
    lse = lse.view(batch, num_heads, length) * math.log(2)
    for b in range(batch):
        for h in range(num_heads):
            keys, values = (block_means(x[b, None, h, None], block_n)[0, 0].to(q.dtype).float() for x in (k, v))
            dkeys, dvalues = torch.zeros_like(keys), torch.zeros_like(values)
            for start in range(0, length, step):
                rows = slice(start, start + step)
                q_i, o_i, do_i = (x[b, h, rows].float() for x in (q, o, do))
                own = kept[b, h, start // block_m : (start + step) // block_m]
                own = own.repeat_interleave(block_m, 0)[: len(q_i)]
                s = (q_i @ keys.mT * scale + counts.log()).masked_fill_(own, -torch.inf)
                p = (s - lse[b, h, rows, None]).exp_()
                ds = (do_i @ values.mT - (do_i * o_i).sum(-1, keepdim=True)).mul_(p).mul_(scale)
                dq[b, h, rows] += (ds @ keys).to(dq.dtype)
                dkeys += ds.mT @ q_i
                dvalues += p.mT @ do_i
            dk[b, h] += (dkeys / counts[:, None])[block_of].to(dk.dtype)
            dv[b, h] += (dvalues / counts[:, None])[block_of].to(dv.dtype)


_operator = operator_of_kept("block_means_fused", _forward, _backward)
