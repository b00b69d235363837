"""Seeded inputs, and how far from the truth a backend may be.

A kernel may be at most twice as far from the float64 reference as the same maths in plain PyTorch at the kernel's own
dtype, plus one rounding step. How far plain PyTorch is depends on the order in which the host's BLAS adds, and for few
numbers it can be next to nothing by luck. So it is not run but drawn, alike on every host: the maths in float64, with
every operation's result moved by as much as rounding moves it (Monte Carlo arithmetic). The largest error of DRAWS such
runs counts, and of more where there are few rows. With u half the dtype's eps, and r uniform in [-1, 1]:

    a result x          + u x r
    a sum x of n terms  + u sqrt(n (x^2 / 3 + sum terms^2 / 6)) r, with the u of float32, in which sums are held
    an exponent's shift m, a number a row: weights x (1 + u m r) in the backward pass, with the u of float32

Each addition rounds the sum so far. In a random order the square of that is, on average over the n additions, the
bracket: also where the terms cancel, for which the error of one run says nothing. The shift is what a backward pass
that keeps no weights makes them anew with: the row's log-sum-exp, rounded, as in FlashAttention; in the forward pass it
stands above and below the line.
"""

import functools
import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from slagen.attention import sparse_linear_attention
from slagen.attention.sla.block_map import CRITICAL, MARGINAL, block_map, block_scores
from slagen.attention.sla.config import SLAConfig
from slagen.attention.sla.reference import EPSILON, feature_map

DRAWS = 16
ROWS = 256  # of all draws together: the largest error of a few is small by luck
NAMES = ("o", "dq", "dk", "dv", "dweight", "dbias")


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


def results(attend: Callable[..., Tensor], inputs: Sequence[Tensor], do: Tensor) -> tuple[Tensor, ...]:
    """o, then the gradients of all inputs, through fresh leaves of the same strides; 0 where an input has none."""
    leaves = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in inputs]
    o = attend(*leaves)
    grads = torch.autograd.grad(o, leaves, do, allow_unused=True)
    return o.detach(), *(torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves, strict=True))


def assert_within_budget(
    actual: Sequence[Tensor],
    inputs: Sequence[Tensor],
    do: Tensor,
    config: SLAConfig,
    dtype: torch.dtype,
    branches: str = "both",
) -> None:
    """Fail unless o and every gradient of SLA are within the error budget, as `assert_within_budget_of` says.

    Args:
        inputs: q, k, v, and with a linear branch weight and bias.
        dtype: the dtype that the backend under test multiplies in.
    """

    def reference(*x: Tensor) -> Tensor:
        return sparse_linear_attention(*x[:3], config, *x[3:], backend="reference", branches=branches)

    def plain(*x: Tensor) -> Tensor:
        return plain_attention(x, config, Rounding(dtype), branches)

    assert_within_budget_of(reference, plain, actual, inputs, do, NAMES[: len(inputs) + 1])


def assert_within_budget_of(
    reference: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    actual: Sequence[Tensor],
    inputs: Sequence[Tensor],
    do: Tensor,
    names: Sequence[str],
) -> None:
    """Fail unless o and every gradient are finite and within the error budget at the head of this file.

    Args:
        reference: inputs in float64 -> o, as it is defined.
        plain: the same maths, every result and every gradient of one rounded; inputs and o lead with the draws.
        actual: o and the gradients of `inputs`, from the backend under test; names: what to call them.
        inputs: as that backend was given them, q first.
        do: the gradient of o.
    """
    wide, wide_do = [x.detach().double().cpu() for x in inputs], do.double().cpu()
    exact = results(reference, wide, wide_do)
    draws = max(DRAWS, ROWS // do[..., 0].numel())
    drawn = results(plain, [x.expand(draws, *x.shape) for x in wide], wide_do.expand(draws, *do.shape))
    assert actual[0].dtype == inputs[0].dtype, f"o: {actual[0].dtype}, not {inputs[0].dtype}"
    for name, a, d, e in zip(names, actual, drawn, exact, strict=True):
        assert_no_worse(name, a, d, e)


def assert_no_worse(name: str, actual: Tensor, drawn: Tensor, exact: Tensor) -> None:
    """Fail unless one result is finite and within the budget that its drawn runs, (DRAWS, ...) float64, leave it."""
    assert actual.shape == exact.shape, f"{name}: {tuple(actual.shape)}, not {tuple(exact.shape)}"
    assert actual.isfinite().all(), f"{name} is not finite"
    info = torch.finfo(actual.dtype)
    rounding = info.eps * exact.abs().max().clamp(min=info.smallest_normal)
    budget = 2 * (drawn - exact).abs().max() + rounding
    error = (actual.double().cpu() - exact).abs().max()
    assert error <= budget, f"{name}: error {error:.3g} is above its budget {budget:.3g}"


class Rounding:
    """The errors of plain PyTorch at a dtype: for each operation another stretch of one long row of random numbers."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.unit, self.sum_unit = torch.finfo(dtype).eps / 2, torch.finfo(torch.float32).eps / 2
        self.random = random.Random(0)

    def result(self, x: Tensor) -> Tensor:
        return torch.addcmul(x, x, self._uniform(x), value=self.unit)

    def single(self, x: Tensor) -> Tensor:
        """x, rounded to float32 inside an operation: an exponent of 100 moves its result a hundred times as much."""
        return x * self._uniform(x).mul(self.sum_unit).add_(1)  # x may be -inf

    def sum(self, a: Tensor, b: Tensor) -> Tensor:
        """a @ b, not yet rounded to the dtype."""
        one = slice(0, 1)  # the draws differ by roundings, which change next to nothing of how large those are
        return self._of_terms(a @ b, a[one] ** 2 @ b[one] ** 2, a.shape[-1])

    def row_sum(self, terms: Tensor) -> Tensor:
        """The sums of rows, (..., 1), not yet rounded to the dtype."""
        return self._of_terms(terms.sum(-1, keepdim=True), (terms**2).sum(-1, keepdim=True), terms.shape[-1])

    def _of_terms(self, x: Tensor, squares: Tensor, n: int) -> Tensor:
        size = (n * (x[: len(squares)] ** 2 / 3 + squares / 6)).sqrt()
        return torch.addcmul(x, size.expand_as(x), self._uniform(x), value=self.sum_unit)

    def again(self, weights: Tensor, shift: Tensor) -> Tensor:
        """Weights e^(s - shift) as the backward pass makes them anew; a row's shift, (..., 1), was rounded for it."""
        size = shift.abs().expand(weights.shape[0], *shift.shape[1:])
        return weights * (self._uniform(size) * size).mul(self.sum_unit).add_(1)

    def _uniform(self, x: Tensor) -> Tensor:
        numbers = uniform_numbers()
        start = self.random.randrange(len(numbers) - x.numel())
        return numbers[start : start + x.numel()].view(x.shape)


@functools.cache
def uniform_numbers() -> Tensor:
    """Drawn once from [-1, 1]: to draw them anew for every operation took a third of the time of these tests."""
    return torch.empty(2**24, dtype=torch.float64).uniform_(-1, 1, generator=torch.Generator().manual_seed(0))


def plain_attention(inputs: Sequence[Tensor], config: SLAConfig, rounding: Rounding, branches: str) -> Tensor:
    """The reference's maths, every result and every gradient of one rounded; inputs and o lead with the draws."""
    q, k, v, *proj = inputs

    def rounded(x: Tensor) -> Tensor:
        return Rounded.apply(x, rounding)

    def product(a: Tensor, b: Tensor, shift: Tensor | None = None) -> Tensor:
        return Product.apply(a, b, rounding, True, shift)

    def exponentials(x: Tensor) -> Tensor:
        return rounding.single(x - x.detach().amax(-1, keepdim=True)).exp()

    def phi(x: Tensor) -> Tensor:
        if config.feature_map != "softmax":
            return rounded(feature_map(x, config.feature_map))
        e = exponentials(x)  # one operation, which works in float32
        return rounded(e / Product.apply(e, torch.ones_like(e[..., :1, :].mT), rounding, False, None))

    def mean(w: Tensor, eps: float, shift: Tensor | None = None) -> Tensor:
        """Of v, and of eps times 0; 0 where all weights are 0."""
        sums = product(w, torch.cat([v, torch.ones_like(v[..., :1])], -1), shift)
        denominator = sums[..., -1:] + eps
        empty = denominator == 0
        return rounded(
            Quotient.apply(sums[..., :-1], denominator.masked_fill(empty, 1), rounding).masked_fill(empty, 0)
        )

    classes = block_map(block_scores(q[0], k[0], config), config)
    classes = classes.repeat_interleave(config.block_m, 2)[:, :, : q.shape[-2]]
    classes = classes.repeat_interleave(config.block_n, 3)[..., : q.shape[-2]]
    o = torch.zeros_like(q)
    if branches != "linear":
        s = rounded(product(q, k.mT) * q.shape[-1] ** -0.5).masked_fill(classes != CRITICAL, -torch.inf)
        o = mean(rounded(exponentials(s)), 0.0, shift=s.detach().amax(-1, keepdim=True))
    if not proj or branches == "sparse":
        return o
    w = product(phi(q), phi(k).mT)
    if config.linear_domain == "marginal":
        w = w.masked_fill(classes != MARGINAL, 0)
    rows = mean(w, EPSILON[config.linear_domain]).flatten(1, -2)
    o = o + product(rows, proj[0].mT).view(o.shape)
    if len(proj) == 2:
        o = o + product(torch.ones_like(rows[..., :1]), proj[1][:, None]).view(o.shape)
    return rounded(o)


class Rounded(torch.autograd.Function):
    """x, and its gradient, rounded to the dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rounding: Rounding) -> Tensor:
        ctx.rounding = rounding
        return rounding.result(x)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None]:
        return ctx.rounding.result(dx), None


class Product(torch.autograd.Function):
    """a @ b, and its gradients, each a sum; rounded to the dtype, or not where it is part of one operation.

    With a shift, a holds weights that the backward pass recomputes: for b's gradient, and where they multiply a's.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, rounding: Rounding, final: bool, shift: Tensor | None) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.rounding, ctx.finish = rounding, rounding.result if final else torch.clone
        ctx.again = partial(rounding.again, shift=shift) if shift is not None else torch.clone
        return ctx.finish(rounding.sum(a, b))

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor | None, ...]:
        a, b = ctx.saved_tensors
        da = ctx.again(ctx.finish(ctx.rounding.sum(dx, b.mT)))
        return da, ctx.finish(ctx.rounding.sum(ctx.again(a).mT, dx)), None, None, None


class Quotient(torch.autograd.Function):
    """Rows (..., D) over a number each, (..., 1), whose gradient is a sum over the row, FlashAttention's delta."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, rounding: Rounding) -> Tensor:
        ctx.rounding = rounding
        ctx.save_for_backward(a, b)
        return a / b

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor | None, ...]:
        a, b = ctx.saved_tensors
        return dx / b, -ctx.rounding.row_sum(dx * a / b) / b, None
