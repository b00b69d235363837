"""The error budget: plain PyTorch keeps it, and no fault of a kernel does."""

import pytest
import torch
from numerics import Rounding, assert_within_budget, make_proj, make_qkv, plain_attention, results

from slagen.attention import sparse_linear_attention
from slagen.attention.sla import reference
from slagen.attention.sla.config import SLAConfig

CONFIG = SLAConfig(0.6, block_m=32, block_n=16)
SHAPE = (1, 2, 75, 16)
INPUTS = (*make_qkv(SHAPE, torch.float32), *make_proj(16, torch.float32))
DO = make_qkv(SHAPE, torch.float32, seed=2)[0]
ROW = torch.tensor([1])  # one query block


def attend(q, k, v, weight, bias, **options):
    return sparse_linear_attention(q, k, v, CONFIG, weight, bias, backend="reference", **options)


def check(attend):
    assert_within_budget(results(attend, INPUTS, DO), INPUTS, DO, CONFIG, torch.float32)


def test_plain_pytorch_is_within_its_budget():
    check(attend)


def test_budget_is_of_the_references_maths():
    """Without rounding errors, what is drawn from is the reference."""
    rounding = Rounding(torch.float32)
    rounding.unit = rounding.sum_unit = 0.0
    wide, do = [x.double() for x in INPUTS], DO.double()
    drawn = results(lambda *x: plain_attention(x, CONFIG, rounding, "both"), [x[None] for x in wide], do[None])
    for d, e in zip(drawn, results(attend, wide, do), strict=True):
        torch.testing.assert_close(d[0], e, rtol=0, atol=1e-13)


def shifted(x):
    """The last row is read as the one before it."""
    return torch.cat([x[:, :, :-1], x[:, :, -2:-1]], 2)


FAULTS = {
    "scale": lambda q, k, v, w, b: attend(q, k, v, w, b, scale=0.25 * 1.001),
    "tail": lambda q, k, v, w, b: attend(q, shifted(k), shifted(v), w, b),
    "tf32-scores": lambda q, k, v, w, b: attend(q.half().float(), k, v, w, b),
    "tf32-values": lambda q, k, v, w, b: attend(q, k, v.half().float(), w, b),
    "half-weight": lambda q, k, v, w, b: attend(q, k, v, w.half().float(), b),
    "no-bias": lambda q, k, v, w, b: attend(q, k, v, w, None) + 0 * b,
    "bias-of-one-head": lambda q, k, v, w, b: attend(q, k, v, w, None) + torch.stack([b, b.detach()])[:, None],
    "value-gradient": lambda q, k, v, w, b: attend(q, k, torch.cat([v[:, :, :-1], v[:, :, -1:].detach()], 2), w, b),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_caught(fault):
    with pytest.raises(AssertionError, match="above its budget"):
        check(FAULTS[fault])


@pytest.mark.parametrize("fault", ["block", "epsilon"])
def test_faults_of_the_definition_are_caught(fault, monkeypatch):
    """One query block attends to its neighbours' blocks; e is not divided as its sums are."""
    right = reference.block_map
    with monkeypatch.context() as patch:
        if fault == "block":
            patch.setattr(
                reference, "block_map", lambda *x: right(*x).index_copy(2, ROW, right(*x)[:, :, 1:2].roll(1, 3))
            )
        else:
            patch.setitem(reference.EPSILON, "all", 1e-5 * SHAPE[2])
        actual = results(attend, INPUTS, DO)
    with pytest.raises(AssertionError, match="above its budget"):
        assert_within_budget(actual, INPUTS, DO, CONFIG, torch.float32)
