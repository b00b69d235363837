"""Seeded inputs, and how far from the truth a backend may be."""

import torch
import torch.nn.functional as F
from torch import Tensor

from slagen.attention.block_map import CRITICAL, MARGINAL, block_map, block_scores
from slagen.attention.reference import EPSILON, feature_map
from slagen.config import SLAConfig


def make_qkv(
    shape: tuple[int, int, int, int], dtype: torch.dtype = torch.float64, seed: int = 0, requires_grad: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw q, k, v of shape (B, H, L, D); the same numbers, rounded, for every dtype."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3))
    return q.requires_grad_(requires_grad), k.requires_grad_(requires_grad), v.requires_grad_(requires_grad)


def make_proj(
    head_dim: int, dtype: torch.dtype = torch.float64, seed: int = 1, requires_grad: bool = False
) -> tuple[Tensor, Tensor]:
    """Draw the weight and bias of proj_l, far from zero so that the linear branch counts."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(head_dim, head_dim, generator=generator, dtype=torch.float64) * head_dim**-0.5
    bias = torch.randn(head_dim, generator=generator, dtype=torch.float64)
    return weight.to(dtype).requires_grad_(requires_grad), bias.to(dtype).requires_grad_(requires_grad)


def strided(x: Tensor) -> Tensor:
    """The same values as Wan hands them over: a transposed view of (B, L, H, D)."""
    return x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_(x.requires_grad)


def assert_within_budget(name: str, actual: Tensor, plain: Tensor, exact: Tensor, unit: float = 0.0) -> None:
    """Allow `actual` twice the error of the same maths in plain PyTorch at its dtype, plus one rounding step.

    Args:
        actual: from the backend under test.
        plain: from plain PyTorch on the same inputs in the same dtype: the reference, or `plain_attention`.
        exact: from the reference in float64, on the same inputs.
        unit: the size of terms that cancel to zero, where the exact result is zero.
    """
    assert actual.dtype == plain.dtype, f"{name}: {actual.dtype}, not {plain.dtype}"
    assert actual.shape == exact.shape, f"{name}: {tuple(actual.shape)}, not {tuple(exact.shape)}"
    rounding = torch.finfo(actual.dtype).eps * max(exact.abs().max().item(), unit)
    budget = 2 * (plain.double() - exact).abs().max() + rounding
    error = (actual.double() - exact).abs().max()
    assert error <= budget, f"{name}: error {error:.3g} is above its budget {budget:.3g}"


def plain_attention(q: Tensor, k: Tensor, v: Tensor, config: SLAConfig, weight: Tensor | None, bias: Tensor | None):
    """The reference's maths as plain PyTorch does it at the inputs' own dtype: every product and softmax is rounded.

    Differentiable; the blocks are those the reference selects. What a kernel of that dtype is measured against.
    """
    classes = block_map(block_scores(q, k, config), config)
    classes = classes.repeat_interleave(config.block_m, 2)[:, :, : q.shape[2]]
    classes = classes.repeat_interleave(config.block_n, 3)[..., : q.shape[2]]
    s = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(classes != CRITICAL, -torch.inf)
    o = s.softmax(-1) @ v
    if weight is None:
        return o
    w = feature_map(q, config.feature_map) @ feature_map(k, config.feature_map).mT
    if config.linear_domain == "marginal":
        w = w.masked_fill(classes != MARGINAL, 0)
    denominator = w.sum(-1, keepdim=True) + EPSILON[config.linear_domain]
    empty = denominator == 0
    o_linear = (w @ v / denominator.masked_fill(empty, 1)).masked_fill(empty, 0)
    return o + F.linear(o_linear, weight.to(q.dtype), None if bias is None else bias.to(q.dtype))
