"""SLA2 in 8-bit arithmetic: the definition, every backend, and gradients that pass straight through."""

import math

import numpy as np
import pytest
import torch
from numerics import make_qkv, results, strided
from test_sla2 import LENGTHS, MODES, attend, make_weights, small

from slagen.attention import registry
from slagen.attention.learned import read_config
from slagen.attention.protocol import Grid
from slagen.attention.sla import blocks, blockwise_sparse
from slagen.attention.sla2 import low_bit
from slagen.attention.sla2.config import SLA2Config
from slagen.attention.sla2.functional import choose_backend
from slagen.errors import EnvironmentProblem, KernelProblem
from slagen.settings import to_fields

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def in_int8(**fields) -> SLA2Config:
    return small(**{"low_bit": "int8", **fields})


def rounded(x, largest):
    return np.round(x / (largest / 127)) * (largest / 127)


@pytest.mark.parametrize("mixing", ["learned", "mass"])
def test_reference_is_the_formulas(mixing):
    """One head in loops over blocks: all kept blocks of a row at once, weights rounded before the row is summed."""
    config = in_int8(mixing=mixing, block_n=16, block_m=32)
    q, k, v, router_q, router_k, logit = [*make_qkv((1, 1, 61, 4)), *make_weights(config, 1, 4)]
    o = attend(config, "reference")(q, k, v, router_q, router_k, logit)[0, 0].numpy()
    q, k, v, router_q, router_k = (x.numpy() for x in (q[0, 0], k[0, 0], v[0, 0], router_q, router_k))
    k, scale = k - k.mean(0), 0.5
    pieces = [slice(i, i + 16) for i in range(0, 61, 16)]
    keys, values = ([rounded(x[piece], np.abs(x[piece]).max()) for piece in pieces] for x in (k, v))
    phi = [np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in (q, k)]
    for start in (0, 32):
        own = q[start : start + 32]
        scores = [(router_q @ own.mean(0)) @ (router_k @ k[piece].mean(0)) for piece in pieces]
        kept = int(np.argmax(scores))
        for t, row in enumerate(rounded(own, np.abs(own).max()), start):
            s = scale * keys[kept] @ row
            mass, p = np.exp(s).sum(), np.exp(s - s.max())
            exact = rounded(p, 1.0) @ values[kept] / p.sum()
            rest = [piece for j, piece in enumerate(pieces) if j != kept]
            w = np.concatenate([phi[1][piece] @ phi[0][t] for piece in rest])
            linear = w @ np.concatenate([v[piece] for piece in rest]) / w.sum()
            others = sum(len(k[piece]) * math.exp(scale * q[t] @ k[piece].mean(0)) for piece in rest)
            a = mass / (mass + others) if mixing == "mass" else 1 / (1 + math.exp(-logit[0, 0]))
            np.testing.assert_allclose(o[t], a * exact + (1 - a) * linear, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("soft", MODES)
@pytest.mark.parametrize("fields", [{}, {"smooth_keys": False}, {"mixing": "mass"}, {"sparsity": 0.0}], ids=str)
@pytest.mark.parametrize("length", LENGTHS)
def test_torch_is_the_reference(length, fields, soft, monkeypatch):
    """o and every gradient in float64; cut into the pieces of long heads."""
    monkeypatch.setattr(blockwise_sparse, "CHUNK_BYTES", 1)
    monkeypatch.setattr(blocks, "RUN_BYTES", 64 * 4 * 8)
    config, shape = in_int8(**fields), (2, 2, length, 8)
    inputs, do = [*make_qkv(shape), *make_weights(config, 2, 8)], make_qkv(shape, seed=2)[0]
    inputs[:3] = map(strided, inputs[:3])
    actual, exact = (results(attend(config, backend, soft), inputs, do) for backend in ("torch", "reference"))
    for name, a, e in zip(("o", "q", "k", "v", "router_q", "router_k", "logit"), actual, exact, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_gradients_pass_straight_through(backend):
    """Those of q, k and v are those without rounding, to the bit; o is near, and the weight's gradient is of that o."""
    inputs, do = [*make_qkv((1, 2, 150, 8)), *make_weights(small(), 2, 8)], make_qkv((1, 2, 150, 8), seed=2)[0]
    found, plain = (results(attend(config, backend), inputs, do) for config in (in_int8(), small()))
    error = (found[0] - plain[0]).norm() / plain[0].norm()
    assert 1e-4 < error < 2e-2
    for a, e in zip(found[1:4], plain[1:4], strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-14)
    assert not torch.allclose(found[6], plain[6], rtol=1e-5)


def test_rounding_is_by_blocks():
    """An outlier among the keys or values makes its own block coarse, and no other."""
    config = in_int8(block_m=16, sparsity=0.0, smooth_keys=False)
    q, k, v = make_qkv((1, 1, 64, 8))
    weights = make_weights(config, 1, 8)
    v[:, :, :16] = 0
    expected = attend(config, "torch")(q, k, v, *weights)
    v[:, :, 0] = 1e-9  # below a step of every other block
    found = attend(config, "torch")(q, k, v, *weights)
    assert 0 < (found - expected).abs().max() < 1e-9
    zeros = attend(config, "torch")(*torch.zeros(3, 1, 1, 64, 8, dtype=torch.float64), *weights)
    assert not zeros.any()


# In low precision: inputs that are multiples of a block's step, and rows that no rounding of sums can move


def on_steps(shape, dtype):
    """q, k and v of whole numbers below 128 / 64, in every 16 rows the largest: rounding changes none of them."""
    generator = torch.Generator().manual_seed(4)
    numbers = [torch.randn(shape, generator=generator).mul(40).round().clamp(-127, 127) for _ in range(3)]
    for x in numbers:
        x[:, :, ::16, 0] = 127
    return [(x / 64).to(dtype).to(DEVICE) for x in numbers]


def clear_rows(q, k, config) -> torch.Tensor:
    """The rows of (B, H, L) with no weight near the border between two steps, in any key block."""
    s = (q.double() @ k.double().mT) * q.shape[3] ** -0.5
    steps = torch.cat([(x - x.amax(-1, keepdim=True)).exp() * 127 for x in s.split(config.block_n, -1)], -1)
    return ((steps.frac() - 0.5).abs() > 1e-4).all(-1)


BACKENDS = ["torch", pytest.param("triton", marks=pytest.mark.slow)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("shape", [(1, 2, 75, 32), (1, 1, 130, 32), (1, 1, 17, 64)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_error_is_that_of_the_sums(backend, shape, dtype):
    if backend == "triton":
        pytest.importorskip("triton", reason="needs Triton, which is for Linux")
    config = in_int8(smooth_keys=False, block_n=32)
    q, k, v = on_steps(shape, dtype)
    weights = [x.to(DEVICE) for x in make_weights(config, shape[1], shape[3], torch.float32)]
    exact = attend(config, "reference")(q.double(), k.double(), v.double(), *(x.double() for x in weights))
    found = attend(config, backend)(q, k, v, *weights)
    clear = clear_rows(q, k, config)
    assert clear.double().mean() > 0.8
    limit = {torch.float32: 3e-6, torch.float16: 2e-3}[dtype] * exact.abs().max()
    assert (found.double() - exact).abs()[clear].max() <= limit
    unrounded = attend(small(smooth_keys=False, block_n=32), backend)(q, k, v, *weights)
    assert (found - unrounded).abs().max() > limit or shape[2] == 17


@pytest.mark.slow
def test_kernels_gradients_are_those_without_rounding():
    pytest.importorskip("triton", reason="needs Triton, which is for Linux")
    q, k, v = on_steps((1, 1, 75, 32), torch.float32)
    weights = [x.to(DEVICE) for x in make_weights(small(), 1, 32, torch.float32)]
    do = make_qkv((1, 1, 75, 32), torch.float32, seed=2)[0].to(DEVICE)
    configs = (in_int8(block_n=32), small(block_n=32))
    found, plain = (results(attend(config, "triton"), [q, k, v, *weights], do) for config in configs)
    for a, e in zip(found[1:4], plain[1:4], strict=True):
        assert torch.equal(a, e)
    assert not torch.equal(found[0], plain[0]) and not torch.equal(found[6], plain[6])
    with torch.no_grad():
        assert torch.equal(attend(configs[0], "triton")(q, k, v, *weights), found[0])


@pytest.mark.slow
def test_the_kernel_is_tried_before_a_run(monkeypatch):
    pytest.importorskip("triton", reason="needs Triton, which is for Linux")
    from slagen.kernels import low_bit as kernels

    check = registry.get("sla2").check
    arguments = "triton", 32, torch.device(DEVICE), torch.float16, in_int8(block_n=32)
    check(*arguments)
    monkeypatch.setattr(kernels, "low_bit_forward", lambda q, k, v, *_, **__: v.float())
    with pytest.raises(KernelProblem, match="the int8 kernel fails on .*: its output is wrong. Try --backend torch."):
        check(*arguments)


@pytest.mark.slow
def test_operator_is_well_registered():
    pytest.importorskip("triton", reason="needs Triton, which is for Linux")
    q, k, v = on_steps((1, 1, 75, 32), torch.float16)
    means = torch.randn(1, 3, 32, device=DEVICE)
    arguments = (q, k.float(), v, means, means, 1, 32, 32, 0.2)
    utils = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.slagen.sla2_low_bit_forward.default, arguments, test_utils=utils)


def test_what_has_no_kernel():
    q = torch.zeros(1, 1, 64, 16)
    for q, config, text in (
        (torch.zeros(1, 1, 64, 16), in_int8(block_n=32), "low_bit 'int8' with a head dimension of 16, below 32,"),
        (torch.zeros(1, 1, 64, 32), in_int8(), "low_bit 'int8' with key blocks of 16, below 32,"),
    ):
        with pytest.raises(ValueError, match=f"backend is 'triton', but {text} has no Triton kernels. Try torch"):
            choose_backend(q, config, False, "triton")
        assert choose_backend(q, config, False, "auto") == "torch"
        with pytest.raises(EnvironmentProblem, match=f"sla2 attention with {text} has no Triton kernels. Give"):
            registry.get("sla2").check("triton", q.shape[3], q.device, q.dtype, config)
    assert low_bit.no_kernel(16, small()) is None


def test_files_and_notes_say_it():
    """At its default, files are as they were before the option was there."""
    sla2 = registry.get("sla2")
    assert "low_bit" not in to_fields(SLA2Config())
    trained = to_fields(SLA2Config(low_bit="int8"))
    assert trained["low_bit"] == "int8" and read_config("sla2", trained) == SLA2Config(low_bit="int8")
    assert sla2.note(SLA2Config(0.5, low_bit="int8"), {}, Grid.flat(256)).endswith("query block, computed in int8")
    assert "int8" not in sla2.note(SLA2Config(0.5), {}, Grid.flat(256))


def test_auto_takes_torch_where_there_is_no_kernel(monkeypatch):
    """What the command line picks on a card, by the config too, before anything is loaded."""
    from slagen.attention.sla2 import method

    monkeypatch.setattr(method, "choose_backend", lambda name, *about: "triton")
    for fields, head_dim, expected in (
        ({"mixing": "mass"}, 64, "torch"), ({"low_bit": "int8", "block_n": 16}, 64, "torch"),
        ({"low_bit": "int8"}, 16, "torch"), ({"low_bit": "int8"}, 64, "triton"), ({}, 16, "triton"),
    ):  # fmt: skip
        about = head_dim, torch.device("cuda"), torch.bfloat16, SLA2Config(**fields)
        assert method.SLA2.pick_backend("auto", *about) == expected
        assert method.SLA2.pick_backend("triton", *about) == "triton"  # `check` refuses it, by name
