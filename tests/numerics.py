"""Seeded inputs, and how far from the truth a backend may be."""

import torch
from torch import Tensor


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


def assert_within_budget(name: str, actual: Tensor, plain: Tensor, exact: Tensor) -> None:
    """Allow `actual` twice the error of the same maths in plain PyTorch at its dtype, plus one rounding step.

    Args:
        actual: from the backend under test.
        plain: from the reference, on the same inputs in the same dtype.
        exact: from the reference in float64, on the same inputs.
    """
    assert actual.dtype == plain.dtype, f"{name}: {actual.dtype}, not {plain.dtype}"
    assert actual.shape == exact.shape, f"{name}: {tuple(actual.shape)}, not {tuple(exact.shape)}"
    rounding = torch.finfo(actual.dtype).eps * exact.abs().max()
    budget = 2 * (plain.double() - exact).abs().max() + rounding
    error = (actual.double() - exact).abs().max()
    assert error <= budget, f"{name}: error {error:.3g} is above its budget {budget:.3g}"
