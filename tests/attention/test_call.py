"""`slagen.attend` and `slagen.methods`."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from numerics import make_qkv

import slagen
from slagen.attention import registry
from slagen.attention.mean.config import SolConfig
from slagen.attention.mean.functional import block_mean_attention
from slagen.attention.protocol import Grid
from slagen.errors import UsageError


def test_runs_a_method_by_name():
    q, k, v = make_qkv((1, 2, 150, 16), requires_grad=True)
    o = slagen.attend("sol", q, k, v, tau=0.5, block_m=16, block_n=16)
    torch.testing.assert_close(o, block_mean_attention(q, k, v, SolConfig(tau=0.5, block_m=16, block_n=16)))
    assert torch.autograd.grad(o.sum(), k)[0].isfinite().all()
    torch.testing.assert_close(slagen.attend("dense", q, k, v), F.scaled_dot_product_attention(q, k, v))
    whole = slagen.attend("mean", q, k, v, sparsity=0.0, backend="reference")
    torch.testing.assert_close(whole, F.scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize("name", [name for name, method in registry.METHODS.items() if method.memory is None])
def test_every_method_runs_or_says_that_it_has_learned_weights(name):
    q, k, v = make_qkv((1, 1, 128, 16), torch.float32)
    learns = any(group.used for group in registry.get(name).parameters)
    if learns and name != "vsa":  # of which only its gate is learned, and there is none without weights
        with pytest.raises(UsageError, match=f"{name} attention needs learned weights"):
            slagen.attend(name, q, k, v, grid=(2, 8, 8))
    else:
        assert slagen.attend(name, q, k, v, grid=(2, 8, 8)).shape == q.shape


def test_methods_are_those_of_the_command():
    rows = slagen.methods()
    assert [row["name"] for row in rows] == [*registry.METHODS, *registry.ADDITIONS]
    assert {"name", "kind", "summary", "needs_training", "needs_weights", "options"} <= set(rows[0])


@pytest.mark.parametrize(
    ("arguments", "options", "error", "said"),
    [
        (("fast",), {}, UsageError, "attention is 'fast', but must be one of"),
        (("sol",), {"taus": 1}, TypeError, r"attend\(\) has no argument 'taus'. Did you mean tau"),
        (("sol",), {"tau": float("nan")}, UsageError, "tau is nan"),
        (("sol",), {"backend": "sdpa"}, UsageError, "one of auto, reference, torch, triton for sol attention"),
        (("vsa",), {}, UsageError, "Give grid="),
        (
            ("delta",),
            {},
            UsageError,
            "attention is 'delta', but delta corrects another method. Try --attention sol --delta 64.",
        ),
        (("sol",), {"grid": (2, 5, 5)}, UsageError, r"grid is 2 x 5 x 5 \(50 tokens\), but q has 20 tokens"),
        (("sol",), {"grid": Grid(-2, -10, 1)}, UsageError, "grid is -2 x -10 x 1"),
        (("vsa",), {"grid": (4, 5)}, UsageError, r"grid is \(4, 5\), but must be three whole numbers. Give grid=\("),
        (("vsa",), {"grid": "1x4x5"}, UsageError, "grid is '1x4x5', but must be three whole numbers"),
        (("vsa",), {"grid": (1, 4, 5.0)}, UsageError, r"grid is \(1, 4, 5.0\), but must be three whole numbers"),
        (("dense",), {"taus": 1}, TypeError, r"attend\(\) has no argument 'taus'. Its arguments are none."),
    ],
)
def test_what_it_refuses(arguments, options, error, said):
    with pytest.raises(error, match=said):
        slagen.attend(*arguments, *make_qkv((1, 1, 20, 4)), **options)


@pytest.mark.parametrize("name", ["dense", "nabla", "radial", "sol"])
@pytest.mark.parametrize(
    "change",
    [
        lambda q, k, v: (q, k[:, :, 1:], v[:, :, 1:]),
        lambda q, k, v: (q, k.float(), v),
        lambda q, k, v: (q.int(), k.int(), v.int()),
        lambda q, k, v: (q[:0], k[:0], v[:0]),
        lambda q, k, v: (q[0], k[0], v[0]),
    ],
    ids=["lengths", "dtypes", "int", "empty", "3d"],
)
def test_tensors_that_do_not_fit_are_refused_alike(name, change):
    """Each method had errors of its own for these, or took them."""
    with pytest.raises(ValueError, match="^q, k, v have (shapes|dtypes)"):
        slagen.attend(name, *change(*make_qkv((1, 1, 20, 4))), grid=(1, 4, 5))


def test_lists_methods_without_torch():
    code = "import slagen, sys; slagen.methods(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
