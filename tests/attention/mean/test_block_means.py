"""What holds for attention with block means in every backend: `mean` and `sol`."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numerics import (
    NAMES,
    Product,
    Quotient,
    Rounded,
    Rounding,
    assert_within_budget_of,
    make_qkv,
    results,
    strided,
)
from torch.autograd import gradcheck

from slagen.attention.mean.config import MeanConfig, SolConfig
from slagen.attention.mean.functional import block_mean_attention
from slagen.attention.mean.selection import kept_blocks
from slagen.attention.sla import blocks, blockwise_sparse

BACKENDS = ["reference", "torch"]
TAILS = [1, 15, 16, 17, 65, 150]


def mean(**fields) -> MeanConfig:
    """Blocks of 16, about a third of them kept."""
    return MeanConfig(**{"sparsity": 0.65, "block_m": 16, "block_n": 16, **fields})


def sol(**fields) -> SolConfig:
    return SolConfig(**{"tau": 0.8, "block_m": 16, "block_n": 16, **fields})


METHODS = [pytest.param(mean, id="mean"), pytest.param(sol, id="sol")]


@pytest.fixture(params=["whole", "tiny-pieces", "two-heads-in-pieces"])
def pieces(request, monkeypatch):
    """Cut short heads, too, into the many runs and chunks of long ones; at length 17, in groups of two heads."""
    if request.param != "whole":
        monkeypatch.setattr(blockwise_sparse, "CHUNK_BYTES", 1)
        run_tokens = 32 if request.param == "tiny-pieces" else 34
        monkeypatch.setattr(blocks, "RUN_BYTES", run_tokens * 4 * 8)  # D = 8, float32


def attend(config, backend, **options):
    return lambda q, k, v: block_mean_attention(q, k, v, config, backend=backend, **options)


# What the reference defines


def kept_by_loops(q, k, config):
    """The key blocks that each query block keeps, by loops over blocks, in numpy."""
    rows, columns = config.num_blocks(len(q))
    kept = []
    for i in range(rows):
        query = q[i * config.block_m : (i + 1) * config.block_m].mean(0)
        scores = [query @ k[j * config.block_n : (j + 1) * config.block_n].mean(0) for j in range(columns)]
        if isinstance(config, MeanConfig):
            count = max(1, math.floor((1 - config.sparsity) * columns + 1e-6))
            kept.append(set(sorted(range(columns), key=lambda j: (-scores[j], j))[:count]))
        else:
            border = np.mean(scores) + config.tau * np.std(scores)
            tokens = range(i * config.block_m, min((i + 1) * config.block_m, len(q)))
            beside = {t // config.block_n + side for t in tokens for side in (-1, 0, 1)} & set(range(columns))
            kept.append({j for j in range(columns) if scores[j] > border} | beside)
    return kept


def oracle(q, k, v, config, scale):
    """One head by loops over tokens, in numpy: a rejected block is as many copies of its means as it has tokens."""
    kept, o = kept_by_loops(q, k, config), np.zeros_like(q)
    for t in range(len(q)):
        total, sums = 0.0, np.zeros(q.shape[1])
        for s in range(len(q)):
            j = s // config.block_n
            own = slice(j * config.block_n, (j + 1) * config.block_n)
            exact = j in kept[t // config.block_m]
            key, value = (k[s], v[s]) if exact else (k[own].mean(0), v[own].mean(0))
            weight = math.exp(scale * (q[t] @ key))
            total, sums = total + weight, sums + weight * value
        o[t] = sums / total
    return o


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("block_m", [16, 32])
@pytest.mark.parametrize("method", METHODS)
def test_agrees_with_loops_over_tokens(backend, block_m, method):
    config = method(block_m=block_m)
    q, k, v = make_qkv((1, 2, 100, 4))
    o = block_mean_attention(q, k, v, config, scale=0.7, backend=backend)
    for head in range(2):
        expected = oracle(*(x[0, head].numpy() for x in (q, k, v)), config, 0.7)
        np.testing.assert_allclose(o[0, head].numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("length", TAILS)
@pytest.mark.parametrize("sizes", [(16, 16), (32, 16), (16, 64)], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_selection_agrees_with_loops(method, sizes, length):
    config = method(block_m=sizes[0], block_n=sizes[1])
    q, k, _ = make_qkv((2, 2, length, 8))
    found = kept_blocks(q, k, config)
    for b, h in np.ndindex(2, 2):
        expected = kept_by_loops(q[b, h].numpy(), k[b, h].numpy(), config)
        assert [set(row.nonzero().flatten().tolist()) for row in found[b, h]] == expected


@pytest.mark.parametrize("method", METHODS)
def test_selection_is_that_of_the_keys_less_what_they_share(method):
    """A key that all have in common decides nothing, and in float32 hides nothing."""
    q, k, _ = (x.float() for x in make_qkv((1, 2, 300, 8)))
    assert torch.equal(kept_blocks(q, k, method()), kept_blocks(q, k + 8, method()))
    assert torch.equal(kept_blocks(q, k, method()), kept_blocks(3 * q, k, method()))


def test_sol_keeps_the_diagonal_and_differs_from_row_to_row():
    q, k, _ = make_qkv((1, 1, 320, 8))
    kept = kept_blocks(q, k, sol())[0, 0]
    beside = torch.ones(20, 20).triu(-1).tril(1).bool()
    assert kept[beside].all()
    assert len(set(kept.sum(-1).tolist())) > 2
    assert torch.equal(kept_blocks(q, k, sol(tau=100.0))[0, 0], beside)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", METHODS)
def test_gradcheck(backend, method):
    """The gradients are those of finite differences: through kept blocks, mean keys, mean values and the merge."""
    inputs = make_qkv((1, 2, 70, 2), requires_grad=True)
    assert gradcheck(attend(method(), backend), inputs, fast_mode=True)


def test_gradcheck_of_every_number():
    assert gradcheck(attend(sol(), "torch"), make_qkv((1, 1, 50, 2), requires_grad=True))


# The torch backend against the reference


@pytest.mark.parametrize("length", TAILS)
@pytest.mark.parametrize("method", METHODS)
def test_torch_equals_reference(method, length, pieces):
    """Output and gradients agree to rounding in float64."""
    inputs, do = make_qkv((2, 3, length, 8)), make_qkv((2, 3, length, 8), seed=2)[0]
    for block_m, block_n in ((16, 16), (32, 16), (16, 64)):
        config = method(block_m=block_m, block_n=block_n)
        expected, actual = (results(attend(config, backend), inputs, do) for backend in BACKENDS)
        for name, a, e in zip(NAMES, actual, expected, strict=False):
            torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


def plain(inputs, config, rounding):
    """The reference's maths, every result and every gradient of one rounded; inputs and o lead with the draws."""
    q, k, v = inputs
    length = q.shape[-2]

    def product(a, b, shift=None):
        return Product.apply(a, b, rounding, True, shift)

    kept = kept_blocks(q[0], k[0], config)
    kept = kept.repeat_interleave(config.block_m, dim=2)[:, :, :length]
    block_of = torch.arange(length) // config.block_n
    members = (block_of == torch.arange(kept.shape[3])[:, None]).double()
    means = (members / members.sum(1, keepdim=True)).expand(*q.shape[:-2], *members.shape)
    scale = q.shape[-1] ** -0.5
    tokens, rejected = (Rounded.apply(product(q, keys.mT) * scale, rounding) for keys in (k, product(means, k)))
    rejected = Rounded.apply(rejected + members.sum(1).log(), rounding).masked_fill(kept, -torch.inf)
    s = torch.cat([tokens.masked_fill(~kept[..., block_of], -torch.inf), rejected], -1)
    shift = s.detach().amax(-1, keepdim=True)
    p = Rounded.apply(rounding.single(s - shift).exp(), rounding)
    values = torch.cat([v, product(means, v)], -2)
    sums = product(p, torch.cat([values, torch.ones_like(values[..., :1])], -1), shift)
    return Rounded.apply(Quotient.apply(sums[..., :-1], sums[..., -1:], rounding), rounding)


def assert_within_budget(actual, inputs, do, config, dtype=torch.float32):
    """Fail unless o, dq, dk and dv are within the error budget of `numerics.py`."""
    drawn = Rounding(dtype)
    assert_within_budget_of(
        attend(config, "reference"), lambda *x: plain(x, config, drawn), actual, inputs, do, NAMES[:4]
    )
    assert all(a.dtype == inputs[0].dtype for a in actual)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "config", [mean(), mean(sparsity=0.0), mean(sparsity=0.99), sol(), sol(tau=-0.5), sol(tau=9.0)], ids=str
)
def test_error_is_within_budget(config, dtype):
    """o and every gradient stay within twice the error of the definition computed in float32, as this backend does."""
    inputs, do = make_qkv((1, 2, 150, 16), dtype), make_qkv((1, 2, 150, 16), dtype, seed=2)[0]
    assert_within_budget(results(attend(config, "torch"), inputs, do), inputs, do, config)


# Truths that need no table of tolerances


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("length", TAILS)
@pytest.mark.parametrize("config", [mean(sparsity=0.0), sol(tau=-1e9)], ids=["mean", "sol"])
def test_all_blocks_kept_is_dense(config, length, backend):
    inputs, do = make_qkv((2, 2, length, 8)), make_qkv((2, 2, length, 8), seed=2)[0]
    expected = results(F.scaled_dot_product_attention, inputs, do)
    for a, e in zip(results(attend(config, backend), inputs, do), expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("length", [64, 150])
@pytest.mark.parametrize("config", [mean(), mean(sparsity=0.99), sol()], ids=str)
def test_equal_keys_in_each_block_are_dense(config, length, backend):
    """Whatever the values are: the weights in a block are equal, so its mean value is what it adds."""
    q, k, v = make_qkv((2, 2, length, 8))
    k = k[:, :, ::16].repeat_interleave(16, dim=2)[:, :, :length]
    o = block_mean_attention(q, k, v, config, backend=backend)
    torch.testing.assert_close(o, F.scaled_dot_product_attention(q, k, v), rtol=1e-12, atol=1e-12)


def test_means_are_nearer_to_dense_than_their_blocks_left_out():
    """What the tail is for: where the keys of a block are alike, to drop the rejected blocks is far worse."""
    q, k, v = make_qkv((1, 2, 512, 16))
    q, k = q / 2, k + 2 * k[:, :, ::16].repeat_interleave(16, dim=2)
    dense = F.scaled_dot_product_attention(q, k, v)
    config = mean(sparsity=0.9)
    kept = kept_blocks(q, k, config).repeat_interleave(16, 2).repeat_interleave(16, 3)
    left_out = F.scaled_dot_product_attention(q, k, v, kept)
    with_means = block_mean_attention(q, k, v, config)
    assert (with_means - dense).norm() < 0.5 * (left_out - dense).norm()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", METHODS)
def test_permuted_heads_permute_the_output(backend, method):
    inputs, order = make_qkv((2, 4, 100, 8)), [2, 0, 3, 1]
    o = attend(method(), backend)(*inputs)
    permuted = attend(method(), backend)(*(x[:, order] for x in inputs))
    torch.testing.assert_close(permuted, o[:, order], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("length", [64, 100], ids=["L64", "L100"])
@pytest.mark.parametrize("method", METHODS)
def test_strides_make_no_difference(method, length, pieces):
    inputs, do = make_qkv((2, 3, length, 8)), make_qkv((2, 3, length, 8), seed=2)[0]
    expected = results(attend(method(), "torch"), inputs, do)
    views = [strided(x) for x in inputs]
    assert not views[0].is_contiguous()
    for a, e in zip(results(attend(method(), "torch"), views, strided(do)), expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)


def test_autocast_changes_nothing():
    inputs, do = make_qkv((1, 2, 100, 8), torch.float32), make_qkv((1, 2, 100, 8), torch.float32, seed=2)[0]
    expected = results(attend(sol(), "torch"), inputs, do)
    with torch.autocast("cpu", torch.bfloat16):
        actual = results(attend(sol(), "torch"), inputs, do)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_memory_does_not_grow_with_the_square_of_the_length():
    """No tensor has more than 1 / 8 of L x L numbers of a head; scores to the means are L / block_n wide."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple | list) else (out,):
                if isinstance(x, torch.Tensor):
                    largest = max(largest, x.numel())
            return out

    length = 4096
    q, k, v = make_qkv((1, 1, length, 16), torch.float32)
    config = SolConfig()
    kept = kept_blocks(q, k, config)
    from slagen.attention.mean import blockwise

    with Sizes():
        o, lse = blockwise._forward._init_fn(q, k, v, kept, 64, 64, 0.25)
        blockwise._backward._init_fn(o, q, k, v, kept, lse, 64, 64, 0.25)
    assert 0 < largest <= length * length // 8


# Extremes


KINDS = {
    "large-scores": lambda q, k, v: (q.mul_(30), k.mul_(30)),
    "constant-keys": lambda q, k, v: k.fill_(2),
    "constant": lambda q, k, v: (q.fill_(2), k.fill_(2)),
    "zero": lambda q, k, v: [x.zero_() for x in (q, k, v)],
    "huge-token": lambda q, k, v: [x[:, :, 77].mul_(500) for x in (q, k, v)],
    "outlier-channel": lambda q, k, v: (q[..., 3].add_(18), k[..., 3].sub_(18)),
    "tiny": lambda q, k, v: [x.mul_(1e-7) for x in (q, k, v)],
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", [mean(), sol(), sol(tau=0.0), sol(tau=-1e9)], ids=str)
def test_extremes(config, kind, dtype):
    """Finite in, finite out, and within the budget; constant keys have a sigma of 0, or of rounding."""
    inputs, do = make_qkv((1, 1, 150, 32)), make_qkv((1, 1, 150, 32), seed=2)[0]
    KINDS[kind](*inputs)
    inputs, do = [x.to(dtype) for x in inputs], do.to(dtype)
    actual = results(attend(config, "torch"), inputs, do)
    assert all(x.isfinite().all() for x in actual)
    if torch.equal(kept_blocks(*inputs[:2], config), kept_blocks(*(x.double() for x in inputs[:2]), config)):
        assert_within_budget(actual, inputs, do, config)
    else:
        assert kind in ("constant-keys", "constant", "zero")  # scores that differ by rounding only


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"backend": "cuda"}, "backend is 'cuda'; it must be one of auto, reference, torch, triton"),
        ({"scale": 0.0}, "scale is 0.0; it must be finite and above 0"),
        ({"config": 3}, "it must be a MeanConfig or a SolConfig"),
    ],
)
def test_what_it_does_not_take(changes, said):
    with pytest.raises(ValueError, match=said):
        block_mean_attention(*make_qkv((1, 1, 20, 4)), **{"config": sol(), **changes})


def test_equal_scores_are_not_above_the_threshold():
    """Only the blocks beside the query block are kept then, whatever tau is from 0 on."""
    q = make_qkv((1, 1, 96, 8))[0]
    kept = kept_blocks(q, torch.zeros_like(q), sol(tau=0.0))[0, 0]
    assert torch.equal(kept, torch.ones(6, 6, dtype=torch.bool).triu(-1).tril(1))
