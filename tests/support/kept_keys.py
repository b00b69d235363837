"""The error budget of attention to some keys only, and the grids that block-sparse methods are tried on."""

from collections.abc import Callable, Sequence

import torch
from numerics import Product, Quotient, Rounded, Rounding, assert_within_budget_of, make_qkv
from torch import Tensor

from slagen.attention.protocol import Grid

NAMES = ("o", "dq", "dk", "dv")


def grid_name(grid: Grid) -> str:
    """A readable id."""
    return f"{grid.num_frames}x{grid.height}x{grid.width}"


def draw(grid: Grid, dtype: torch.dtype = torch.float64, heads: int = 2, dim: int = 8) -> tuple[list[Tensor], Tensor]:
    """q, k and v of two batches, and the gradient of o."""
    shape = (2, heads, grid.num_tokens, dim)
    return list(make_qkv(shape, dtype)), make_qkv(shape, dtype, seed=2)[0]


def assert_kept_within_budget(
    actual: Sequence[Tensor],
    inputs: Sequence[Tensor],
    do: Tensor,
    reference: Callable[..., Tensor],
    kept: Tensor,
    dtype: torch.dtype,
) -> None:
    """Fail unless o, dq, dk and dv are within the budget of `numerics.py`.

    Args:
        kept: bool, broadcast to (B, H, L, L), the keys that each query attends to.
        dtype: the dtype that the backend under test multiplies in.
    """
    rounding = Rounding(dtype)

    def rounded(x: Tensor) -> Tensor:
        return Rounded.apply(x, rounding)

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = rounded(Product.apply(q, k.mT, rounding, True, None) * q.shape[-1] ** -0.5).masked_fill(~kept, -torch.inf)
        shift = s.detach().amax(-1, keepdim=True)
        p = rounded(rounding.single(s - shift).exp())
        sums = Product.apply(p, torch.cat([v, torch.ones_like(v[..., :1])], -1), rounding, True, shift)
        return rounded(Quotient.apply(sums[..., :-1], sums[..., -1:], rounding))

    assert_within_budget_of(reference, plain, actual, inputs, do, NAMES)
