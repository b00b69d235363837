"""Finite in, finite out: outlier channels, huge and tiny numbers, in every backend, dtype, domain and feature map."""

import math

import pytest
import torch
from numerics import assert_within_budget, make_proj, make_qkv, results

from slagen.attention import sparse_linear_attention
from slagen.attention.sla.config import SLAConfig

# Inputs are made to overflow; that results are finite is checked.
pytestmark = pytest.mark.filterwarnings(
    "ignore:(overflow|invalid value) encountered:RuntimeWarning:triton.runtime.interpreter"
)

SHAPE = {"torch": (1, 1, 150, 32), "triton": (1, 1, 80, 16)}  # the interpreter is slow
DTYPES = [pytest.param(torch.float16, id="fp16"), pytest.param(torch.float32, id="fp32")]
DOMAINS = ["all", "marginal"]


def outlier(q_size: float, k_size: float):
    """One channel far from the others, as Wan has them."""

    def change(q, k, v):
        q[..., 3] += q_size
        k[..., 3] += k_size

    return change


def huge_token(q, k, v):
    for x in (q, k, v):
        x[:, :, 77] *= 500


KINDS = {
    "opposite-12": outlier(12, -12),
    "opposite-18": outlier(18, -18),
    "same-18": outlier(18, 18),
    "opposite-60": outlier(-60, 60),
    "times-300": lambda q, k, v: (q.mul_(300), k.mul_(300)),
    "below-30": lambda q, k, v: (q.sub_(30), k.sub_(30)),
    "constant": lambda q, k, v: (q.fill_(2), k.fill_(2)),
    "zero": lambda q, k, v: [x.zero_() for x in (q, k, v)],
    "huge-token": huge_token,
    "largest-values": lambda q, k, v: v.sign_().mul_(65504),
    "tiny": lambda q, k, v: [x.mul_(1e-7) for x in (q, k, v)],
}


def case(kind: str, dtype: torch.dtype, shape: tuple[int, int, int, int]):
    """Inputs and do, rounded to the dtype."""
    inputs, do = [*make_qkv(shape), *make_proj(shape[3])], make_qkv(shape, seed=2)[0]
    KINDS[kind](*inputs[:3])
    if kind == "largest-values":
        do *= 2**-10  # so that the gradients of q and k are numbers of float16
    return [x.to(dtype) for x in inputs], do.to(dtype)


def without_rounding_of_lse(actual, exact, inputs, do, config):
    """`actual`, with the exact dv where only p's own error tells them apart.

    As in FlashAttention-2, the kernels' backward takes p = exp2(s - lse) from scores computed again and one float32
    number a row. Scores of thousands are rounded by thousandths, and p is off by as much: eps log2(e) max |s|. Plain
    PyTorch divides by the sum of the weights at hand, so that this cancels, in dv altogether.
    """
    q, k, v = (x.double() for x in inputs[:3])
    relative = torch.finfo(torch.float32).eps * math.log2(math.e) * (q @ k.mT * q.shape[3] ** -0.5).abs().max()
    sparse = results(lambda *x: sparse_linear_attention(*x, config, backend="reference"), (q, k, v), do.double().abs())
    dv = actual[3].double()
    near = (dv - exact[3]).abs() <= relative * sparse[3]  # which is P^T |do|
    return *actual[:3], torch.where(near, exact[3], dv).to(actual[3].dtype), *actual[4:]


def check(backend: str, kind: str, dtype: torch.dtype, config: SLAConfig) -> None:
    """All is finite; within the budget; and where only a channel or two stand out, o is within 2e-3."""
    inputs, do = case(kind, dtype, SHAPE[backend])

    def attend(backend):
        return lambda *x: sparse_linear_attention(*x[:3], config, *x[3:], backend=backend)

    actual = results(attend(backend), inputs, do)
    exact = results(attend("reference"), [x.double() for x in inputs], do.double())
    # Where the exact gradient is no number of float16, neither is the one found.
    assert all(a.isfinite().all() for a, e in zip(actual, exact, strict=True) if e.abs().max() < torch.finfo(dtype).max)
    rough = {
        # The log of relu(x): that of 1e-7 has four bits less behind the point than that of 1.
        ("torch", "tiny", "relu"),
        # Of features further apart than float32 reaches, the kernels' denominators vanish, and with them O^l.
        ("triton", "times-300", "softmax"),
        # exp(-30) is 2^-43.3 to the kernels, and the exponent's rounding is 30 times that of 1.
        ("triton", "below-30", "elu"),
        # The kernels take delta from o: where O^s is 1e-7 of the bias, that has no digits left.
        *(("triton", "tiny", feature_map) for feature_map in ("softmax", "elu", "relu")),
    }
    if (backend, kind, config.feature_map) not in rough:
        if backend == "triton" and kind in ("times-300", "below-30", "huge-token", "opposite-60"):
            actual = without_rounding_of_lse(actual, exact, inputs, do, config)
        assert_within_budget(actual, inputs, do, config, torch.float32 if backend == "torch" else dtype)
    if kind.endswith(("-12", "-18")):
        assert (actual[0].double() - exact[0]).abs().max() <= 2e-3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize("feature_map", ["softmax", "elu", "relu"])
@pytest.mark.parametrize("kind", KINDS)
def test_torch(kind, feature_map, domain, dtype):
    check("torch", kind, dtype, SLAConfig(0.6, linear_domain=domain, feature_map=feature_map, block_m=32, block_n=32))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize("kind", KINDS)
def test_triton(kind, domain, dtype):
    pytest.importorskip("triton", reason="needs Triton, which is for Linux")
    check("triton", kind, dtype, SLAConfig(0.6, linear_domain=domain, block_m=32, block_n=32))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize("feature_map", ["elu", "relu"])
@pytest.mark.parametrize("kind", ["opposite-18", "below-30", "times-300", "tiny"])
def test_triton_with_other_feature_maps(kind, feature_map, domain, dtype):
    pytest.importorskip("triton", reason="needs Triton, which is for Linux")
    check("triton", kind, dtype, SLAConfig(0.6, linear_domain=domain, feature_map=feature_map, block_m=32, block_n=32))
