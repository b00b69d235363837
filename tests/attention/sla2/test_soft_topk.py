"""The soft top-k: its sums, its exact gradient, and its limits."""

import pytest
import torch
from torch.autograd import gradcheck

from slagen.attention.sla2.soft_topk import soft_topk

TAU = 0.1


def scores(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def degrees(s, count, tau=TAU):
    return soft_topk(s / tau, count).sigmoid()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e4, 1e8])
@pytest.mark.parametrize(("num_blocks", "count"), [(2, 1), (9, 1), (9, 4), (9, 8), (500, 25)])
def test_degrees_sum_to_count(num_blocks, count, size, dtype):
    m = degrees((size * scores(3, 5, num_blocks)).to(dtype), count)
    assert (m.sum(-1) - count).abs().max() <= 4 * num_blocks * torch.finfo(dtype).eps
    assert ((m >= 0) & (m <= 1)).all()


@pytest.mark.parametrize("count", [1, 3, 8])
@pytest.mark.parametrize("tau", [0.05, 0.1, 1.0])
def test_gradient_is_that_of_finite_differences(tau, count):
    s = scores(2, 9).requires_grad_()
    assert gradcheck(lambda s: degrees(s, count, tau), s)
    assert gradcheck(lambda s: torch.nn.functional.logsigmoid(soft_topk(s / tau, count)), s)


@pytest.mark.parametrize("count", [1, 3, 8])
def test_gradient_includes_that_of_lambda(count):
    """dL/ds = w (g - sum(w g) / sum(w)); the second term is as large as the first, and all gradients sum to 0."""
    s, g = scores(4, 9).requires_grad_(), scores(4, 9, seed=1)
    m = degrees(s, count)
    (found,) = torch.autograd.grad(m, s, g)
    w = (m * (1 - m) / TAU).detach()
    share = (w * g).sum(-1, keepdim=True) / w.sum(-1, keepdim=True)
    torch.testing.assert_close(found, w * (g - share), rtol=1e-10, atol=1e-12)
    assert (w * share).norm() > 0.2 * (w * g).norm()
    torch.testing.assert_close(found.sum(-1), torch.zeros(4).double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("count", [1, 4, 8])
def test_cold_degrees_are_the_hard_choice(count):
    s = scores(5, 9)
    hard = torch.zeros_like(s).scatter(-1, s.topk(count, -1).indices, 1.0)
    torch.testing.assert_close(degrees(s, count, tau=1e-6), hard, rtol=0, atol=1e-12)


def test_warm_and_equal_degrees_are_even():
    """At a high temperature, or of equal scores, each of N blocks is kept by k / N."""
    even = torch.full((5, 9), 4 / 9, dtype=torch.float64)
    torch.testing.assert_close(degrees(scores(5, 9), 4, tau=1e9), even, rtol=0, atol=1e-8)
    torch.testing.assert_close(degrees(torch.full((5, 9), 7.0).double(), 4), even, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_where_every_degree_is_sure(dtype):
    """Every w is 0 in floating point, sum(w) too: the gradients of log m and log (1 - m) stay finite and sum to 0."""
    s = torch.tensor([[1e4, 2e4, -3e4, 4e4, 0.0]], dtype=dtype).requires_grad_()
    logs = soft_topk(s / TAU, 2)
    for sign in (1, -1):
        (found,) = torch.autograd.grad(
            torch.nn.functional.logsigmoid(sign * logs), s, torch.ones_like(s), retain_graph=True
        )
        assert found.isfinite().all()
        assert found.sum().abs() <= 1e-4 / TAU
