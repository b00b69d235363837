"""SLA2's error in low precision: within what rounding leaves plain PyTorch, and no fault is."""

import dataclasses
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from numerics import Product, Quotient, Rounded, Rounding, assert_within_budget_of, make_qkv, results
from test_sla2 import MODES, attend, make_weights, small
from torch import Tensor

from slagen.attention.sla.block_map import block_means
from slagen.attention.sla2 import reference
from slagen.attention.sla2.config import SLA2Config


def means_of(x: Tensor, block: int) -> Tensor:
    return block_means(x[0].detach(), block)


NAMES = ("o", "dq", "dk", "dv", "drouter_q", "drouter_k", "dlogit")


def plain_sla2(inputs: Sequence[Tensor], config: SLA2Config, rounding: Rounding, soft: bool) -> Tensor:
    """The reference's maths, every result and every gradient of one rounded; inputs and o lead with the draws."""
    q, k, v, router_q, router_k, logit = inputs
    length, head_dim = q.shape[-2:]

    def rounded(x: Tensor) -> Tensor:
        return Rounded.apply(x, rounding)

    def product(a: Tensor, b: Tensor, shift: Tensor | None = None) -> Tensor:
        return Product.apply(a, b, rounding, True, shift)

    def exponentials(x: Tensor) -> Tensor:
        return rounding.single(x - x.detach().amax(-1, keepdim=True)).exp()

    def phi(x: Tensor) -> Tensor:
        e = exponentials(x)
        return rounded(e / Product.apply(e, torch.ones_like(e[..., :1, :].mT), rounding, False, None))

    def mean(w: Tensor, shift: Tensor | None = None) -> tuple[Tensor, Tensor]:
        sums = product(w, torch.cat([v, torch.ones_like(v[..., :1])], -1), shift)
        return rounded(Quotient.apply(sums[..., :-1], sums[..., -1:], rounding)), sums[..., -1]

    def means(x: Tensor, block: int) -> Tensor:
        return rounded(block_means(x.flatten(0, 1), block).unflatten(0, x.shape[:2]))

    def routed(x: Tensor, weight: Tensor) -> Tensor:
        return product(x.flatten(1, -2), weight.mT).view(x.shape)

    def per_token(x: Tensor) -> Tensor:
        rows = x.repeat_interleave(config.block_m, -2)[..., :length, :]
        return rows.repeat_interleave(config.block_n, -1)[..., :length]

    if config.smooth_keys:
        k = rounded(k - k.mean(-2, keepdim=True))
    key_means = means(k, config.block_n)
    scores = product(routed(means(q, config.block_m), router_q), routed(key_means, router_k).mT)
    count = config.sla.num_critical(scores.shape[-1])
    if soft:
        m = reference._soft_topk(rounded(scores * (head_dim**-0.5 / config.router_tau)), count)
    else:
        exact = (means_of(x, b) @ w[0].mT for x, b, w in ((q, config.block_m, router_q), (k, config.block_n, router_k)))
        m = reference._hard_topk(next(exact) @ next(exact).mT, count).expand_as(scores)
    kept, rest = (rounded(F.logsigmoid(x)) if soft else F.logsigmoid(x) for x in (m, -m))
    s = rounded(product(q, k.mT) * head_dim**-0.5) + per_token(kept)  # -inf cannot be rounded
    s = rounded(s) if soft else s
    shift = s.detach().amax(-1, keepdim=True)
    o_sparse, mass = mean(rounded(exponentials(s)), shift)
    o_linear, _ = mean(product(phi(q), phi(k).mT) * per_token(rest).exp())
    if config.mixing == "mass":
        sizes = torch.tensor([len(x) for x in torch.arange(length).split(config.block_n)]).double().log()
        rows = rest.repeat_interleave(config.block_m, -2)[..., :length, :]
        estimated = rounded(product(q, key_means.mT) * head_dim**-0.5 + sizes) + rows
        logits = rounded(mass.log() + shift[..., 0] - rounding.single(estimated.logsumexp(-1)))[..., None]
    else:
        logits = rounded(logit[:, None, ..., None].expand(-1, -1, -1, length, 1))  # its gradient sums rounded terms
    return rounded(rounded(logits.sigmoid()) * o_sparse + rounded((-logits).sigmoid()) * o_linear)


def case(dtype: torch.dtype, shape=(1, 2, 75, 16), config: SLA2Config | None = None):
    inputs = [*make_qkv(shape, dtype), *make_weights(config or small(), shape[1], shape[3], torch.float32)]
    return inputs, make_qkv(shape, dtype, seed=2)[0]


def check(actual, inputs, do, config: SLA2Config, dtype: torch.dtype, soft: bool) -> None:
    """o and every gradient are within twice the error that is drawn of plain PyTorch at `dtype`, plus one rounding."""
    drawn = Rounding(dtype)
    assert_within_budget_of(
        attend(config, "reference", soft), lambda *x: plain_sla2(x, config, drawn, soft), actual, inputs, do, NAMES
    )


@pytest.mark.parametrize("soft", MODES)
@pytest.mark.parametrize("fields", [{}, {"smooth_keys": False}, {"mixing": "mass"}], ids=["default", "plain", "mass"])
def test_budget_is_of_the_references_maths(fields, soft):
    """Without rounding errors, what is drawn from is the reference."""
    config, rounding = small(**fields), Rounding(torch.float32)
    rounding.unit = rounding.sum_unit = 0.0
    inputs, do = case(torch.float64)
    inputs = [x.double() for x in inputs]
    drawn = results(lambda *x: plain_sla2(x, config, rounding, soft), [x[None] for x in inputs], do[None])
    for d, e in zip(drawn, results(attend(config, "reference", soft), inputs, do), strict=True):
        torch.testing.assert_close(d[0], e, rtol=0, atol=1e-11)


@pytest.mark.parametrize("soft", MODES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("fields", [{}, {"smooth_keys": False}, {"mixing": "mass"}], ids=["default", "plain", "mass"])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_error_is_within_budget(backend, fields, dtype, soft):
    config = small(**fields)
    inputs, do = case(dtype)
    check(results(attend(config, backend, soft), inputs, do), inputs, do, config, torch.float32, soft)


FAULTS = {
    "scale": lambda x, config, soft: attend(dataclasses.replace(config, router_tau=0.1001), "torch", soft)(*x),
    "lambda": None,
    "keys-of-half": lambda x, config, soft: attend(config, "torch", soft)(x[0], x[1].half().float(), *x[2:]),
    "mix-of-half": lambda x, config, soft: attend(config, "torch", soft)(*x[:5], x[5].half().float()),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_caught(fault, monkeypatch):
    """A temperature off by a thousandth, lambda without its gradient, and keys or logits rounded to half."""
    config = small()
    inputs, do = case(torch.float32)
    found = FAULTS[fault]
    if fault == "lambda":
        from slagen.attention.sla2 import functional

        exact = functional.soft_topk
        monkeypatch.setattr(functional, "soft_topk", lambda x, count: x + (exact(x, count) - x).detach())

        def found(x, config, soft):
            return attend(config, "torch", soft)(*x)

    with pytest.raises(AssertionError, match="above its budget"):
        check(results(lambda *x: found(x, config, True), inputs, do), inputs, do, config, torch.float32, True)
