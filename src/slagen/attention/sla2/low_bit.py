"""The sparse branch of SLA2 in 8-bit arithmetic by its Triton kernel, as one PyTorch operator, forward only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from slagen.attention.sla.fused import alone
from slagen.attention.sla2.blockwise import blockwise_branches
from slagen.attention.sla2.config import COARSE, SLA2Config
from slagen.errors import KernelProblem

LEAST = 32  # rows of queries and keys, and a key block's tokens, as tensor cores take them in int8


def no_kernel(head_dim: int, config: SLA2Config) -> str | None:
    """Why the kernel cannot take heads of a dimension; None where it can, and where nothing is to be rounded."""
    if config.low_bit == "none" or min(head_dim, config.block_n) >= LEAST:
        return None
    given = f"a head dimension of {head_dim}" if head_dim < LEAST else f"key blocks of {config.block_n}"
    return f"low_bit 'int8' with {given}, below {LEAST},"


def low_bit_attention(
    q: Tensor, keys: Tensor, v: Tensor, q_means: Tensor, k_means: Tensor, config: SLA2Config, scale: float
) -> Tensor:
    """O^s of the blocks that the products of the means rank highest, in 8-bit arithmetic. No gradient passes.

    Args:
        q, keys, v: (B, H, L, D), the keys float32.
        q_means, k_means: (B * H, M, D) and (B * H, N, D) float32.
    Returns: (B, H, L, D) float32.
    """
    tensors = (x.detach() for x in (q, keys, v, q_means, k_means))
    return _forward(*tensors, config.sla.num_critical(k_means.shape[1]), config.block_m, config.block_n, scale)


@torch.library.custom_op("slagen::sla2_low_bit_forward", mutates_args=())
def _forward(
    q: Tensor, keys: Tensor, v: Tensor, q_means: Tensor, k_means: Tensor, topk: int, block_m: int, block_n: int,
    scale: float,
) -> Tensor:  # fmt: skip
    from slagen.kernels.low_bit import low_bit_forward
    from slagen.kernels.selection import select

    with alone(q):
        kv_indices, _ = select(torch.bmm(q_means, k_means.mT), topk, 0, classes=False)
        return low_bit_forward(q, keys, v, kv_indices, block_m=block_m, block_n=block_n, scale=scale)


@_forward.register_fake
def _(q, keys, v, q_means, k_means, topk, block_m, block_n, scale):
    return torch.empty_like(q, dtype=torch.float32, memory_format=torch.contiguous_format)


def check_kernel(head_dim: int, device: torch.device, dtype: torch.dtype, config: SLA2Config) -> None:
    """Try the kernel on a few blocks. Raises KernelProblem where it fails or is wrong."""
    from slagen.kernels.failures import LaunchError, launching
    from slagen.kernels.low_bit import low_bit_forward

    block_m, block_n, scale = config.block_m, config.block_n, head_dim**-0.5
    length = 3 * max(block_m, block_n) + 5
    num_rows, num_columns = config.sla.num_blocks(length)
    make: dict[str, Any] = {"generator": torch.Generator(device).manual_seed(0), "device": device}
    q, k, v = (torch.randn(1, 2, length, head_dim, **make).to(dtype) for _ in range(3))
    kept = torch.arange(0, num_columns, 2, device=device)  # the last block too, or the one before
    rest = torch.ones(1, 2, num_rows, num_columns, dtype=torch.bool, device=device)
    rest[..., kept] = False
    exact, *_ = blockwise_branches(q.double(), k.double(), v.double(), None, rest, config.sla, scale, int8=True)
    kv_indices = kept.to(torch.int32).expand(2, num_rows, -1).contiguous()
    try:
        with launching(), alone(q):
            found = low_bit_forward(q, k, v, kv_indices, block_m=block_m, block_n=block_n, scale=scale).double()
    except LaunchError as error:
        message = f"the int8 kernel fails on {device}: {error.reason}. Try --backend torch."
        raise KernelProblem(message) from error
    if not (found - exact).abs().max() <= COARSE * exact.abs().max():
        raise KernelProblem(f"the int8 kernel fails on {device}: its output is wrong. Try --backend torch.")
