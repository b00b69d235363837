"""What holds for Video Sparse Attention in every backend."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numerics import Product, Rounded, Rounding, assert_within_budget_of, make_qkv, results, strided
from torch.autograd import gradcheck

from slagen.attention.order import cube_order
from slagen.attention.protocol import Grid
from slagen.attention.sla import blocks, blockwise_sparse
from slagen.attention.sla.block_map import highest
from slagen.attention.vsa.config import VSAConfig
from slagen.attention.vsa.functional import video_sparse_attention
from slagen.attention.vsa.reference import cube_scores
from slagen.errors import UsageError

BACKENDS = ["reference", "torch"]
GRIDS = [Grid(*sizes) for sizes in ((1, 1, 1), (4, 4, 4), (3, 5, 7), (5, 8, 8), (4, 8, 12), (2, 4, 13), (5, 6, 13))]
NAMES = ("o", "dq", "dk", "dv", "dgate")


def name(grid):
    return f"{grid.num_frames}x{grid.height}x{grid.width}"


def draw(grid, dtype=torch.float64, heads=2, dim=8, batch=1, requires_grad=False):
    """q, k, v, a gate, and the gradient of o."""
    shape = (batch, heads, grid.num_tokens, dim)
    inputs = [*make_qkv(shape, dtype), make_qkv(shape, dtype, seed=1)[0]]
    return [x.requires_grad_(requires_grad) for x in inputs], make_qkv(shape, dtype, seed=2)[0]


@pytest.fixture(params=["whole", "tiny-pieces"])
def pieces(request, monkeypatch):
    """Cut short sequences, too, into the many runs and chunks of long ones."""
    if request.param != "whole":
        monkeypatch.setattr(blockwise_sparse, "CHUNK_BYTES", 1)
        monkeypatch.setattr(blocks, "RUN_BYTES", 1)


def attend(config, grid, backend):
    return lambda q, k, v, gate=None: video_sparse_attention(q, k, v, config, grid, gate, backend=backend)


def oracle(q, k, v, gate, config, grid):
    """One head by loops over tokens, in numpy, from the definition alone."""
    sides, scale = (grid.num_frames, grid.height, grid.width), q.shape[1] ** -0.5
    places = list(itertools.product(*map(range, sides)))
    cubes = list(itertools.product(*(range(math.ceil(side / 4)) for side in sides)))
    held = [[i for i, place in enumerate(places) if tuple(x // 4 for x in place) == cube] for cube in cubes]
    means = [np.stack([x[tokens].mean(0) for tokens in held]) for x in (q, k, v)]
    o = np.zeros_like(q)
    for m, tokens in enumerate(held):
        scores = means[0][m] @ means[1].T
        ranked = sorted(range(len(cubes)), key=lambda n: (-scores[n], n))
        kept = ranked[: max(1, math.ceil((1 - config.sparsity) * len(cubes) - 1e-6))]
        keys = [i for n in kept for i in held[n]]
        coarse = np.exp(scale * scores) @ means[2] / np.exp(scale * scores).sum()
        for i in tokens:
            p = np.exp(scale * k[keys] @ q[i])
            o[i] = p @ v[keys] / p.sum() + gate[i] * coarse
    return o


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grid", GRIDS, ids=name)
def test_agrees_with_loops_over_tokens(backend, grid):
    config = VSAConfig(sparsity=0.6)
    inputs, _ = draw(grid, dim=4)
    o = attend(config, grid, backend)(*inputs)
    for head in range(2):
        expected = oracle(*(x[0, head].numpy() for x in inputs), config, grid)
        np.testing.assert_allclose(o[0, head].numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grid", [Grid(1, 5, 6), Grid(5, 2, 5)], ids=name)
def test_gradcheck(backend, grid):
    """The gradients are those of finite differences, for q, k, v and the gate."""
    inputs, _ = draw(grid, dim=2, requires_grad=True)
    assert gradcheck(attend(VSAConfig(sparsity=0.5), grid, backend), inputs, fast_mode=True)


@pytest.mark.parametrize("gated", [True, False], ids=["gate", "no-gate"])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.99], ids=["all-kept", "half-kept", "one-kept"])
@pytest.mark.parametrize("grid", GRIDS, ids=name)
def test_torch_equals_reference(grid, sparsity, gated, pieces):
    """Both backends, and all their gradients, agree to rounding in float64."""
    config = VSAConfig(sparsity=sparsity)
    inputs, do = draw(grid, batch=2, heads=3)
    inputs = inputs if gated else inputs[:3]
    expected = results(attend(config, grid, "reference"), inputs, do)
    actual = results(attend(config, grid, "torch"), inputs, do)
    for what, a, e in zip(NAMES, actual, expected, strict=False):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10, msg=lambda m, what=what: f"{what}: {m}")


def plain(inputs, config, grid, rounding):
    """The reference's maths, every result and every gradient of one rounded; inputs and o lead with the draws."""
    q, k, v, gate = inputs
    cubes = cube_order(grid, torch.device("cpu"))
    cube, scale = cubes.slots // 64, q.shape[-1] ** -0.5
    members = (cube == torch.arange(len(cubes.counts))[:, None]).to(q.dtype) / cubes.counts[:, None]

    def rounded(x):
        return Rounded.apply(x, rounding)

    def product(a, b, shift=None):
        return Product.apply(a.expand(*b.shape[:-2], *a.shape[-2:]), b, rounding, True, shift)

    def attention(s, values):
        shift = s.detach().amax(-1, keepdim=True)
        p = rounded(rounding.single(s - shift).exp())
        sums = product(p, torch.cat([values, torch.ones_like(values[..., :1])], -1), shift)
        return rounded(sums[..., :-1] / sums[..., -1:])

    kept = highest(cube_scores(q[0], k[0], cubes), config.num_kept(len(members)))[:, :, cube][..., cube]
    fine = attention(rounded(product(q, k.mT) * scale).masked_fill(~kept, -torch.inf), v)
    q_mean, k_mean, v_mean = (product(members, x) for x in (q, k, v))
    coarse = attention(rounded(product(q_mean, k_mean.mT) * scale), v_mean)
    return rounded(fine + rounded(gate * coarse[..., cube, :]))


@pytest.mark.parametrize("grid", [Grid(3, 5, 7), Grid(5, 8, 8)], ids=name)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_error_is_within_budget(dtype, grid):
    """o and every gradient stay within twice the error of the definition computed at the dtype, plus one rounding."""
    config = VSAConfig(sparsity=0.6)
    inputs, do = draw(grid, dtype, dim=16)
    actual = results(attend(config, grid, "torch"), inputs, do)
    drawn = Rounding(dtype)
    assert_within_budget_of(
        attend(config, grid, "reference"), lambda *x: plain(x, config, grid, drawn), actual, inputs, do, NAMES
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grid", GRIDS, ids=name)
def test_all_cubes_kept_without_a_gate_is_dense_attention(backend, grid):
    inputs, do = draw(grid)
    actual = results(attend(VSAConfig(sparsity=0.0), grid, backend), inputs[:3], do)
    expected = results(F.scaled_dot_product_attention, inputs[:3], do)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_zero_gate_is_cube_top_k(backend):
    """The gate's own gradient is not zero then, so it can learn."""
    grid, config = Grid(5, 6, 7), VSAConfig(sparsity=0.6)
    inputs, do = draw(grid)
    inputs[3].zero_()
    gated = results(attend(config, grid, backend), inputs, do)
    alone = results(attend(config, grid, backend), inputs[:3], do)
    for g, a in zip(gated, alone, strict=False):
        assert torch.equal(g, a)
    assert gated[4].abs().min() > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_keys(backend):
    """All scores are equal: the cubes of lowest index are kept, and each weight is one over the number of tokens."""
    grid = Grid(4, 8, 8)
    inputs, _ = draw(grid)
    q, k, v, gate = inputs
    k.copy_(k[:, :, :1])
    o = attend(VSAConfig(sparsity=0.5), grid, backend)(q, k, v, gate)
    cubes = cube_order(grid, torch.device("cpu"))
    first = v[:, :, (cubes.slots // 64) < 2].mean(2, keepdim=True)
    torch.testing.assert_close(o, first + gate * v.mean(2, keepdim=True), rtol=1e-12, atol=1e-12)


def test_a_strided_view_and_its_gradients():
    grid = Grid(3, 5, 6)
    inputs, do = draw(grid)
    config = VSAConfig(sparsity=0.6)
    plain_results = results(attend(config, grid, "torch"), inputs, do)
    for a, e in zip(
        results(attend(config, grid, "torch"), [strided(x) for x in inputs], do), plain_results, strict=True
    ):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)


def test_heads_are_independent():
    grid, order = Grid(3, 5, 7), torch.tensor([2, 0, 1])
    inputs, _ = draw(grid, heads=3)
    run = attend(VSAConfig(sparsity=0.6), grid, "torch")
    assert torch.equal(run(*(x[:, order] for x in inputs)), run(*inputs)[:, order])


CHANGES = {
    "times-300": lambda q, k, v: (q.mul_(300), k.mul_(300)),
    "opposite": lambda q, k, v: (q[..., 3].add_(60), k[..., 3].sub_(60)),
    "constant": lambda q, k, v: (q.fill_(2), k.fill_(2)),
    "zero": lambda q, k, v: [x.zero_() for x in (q, k, v)],
    "huge-token": lambda q, k, v: [x[:, :, 77].mul_(500) for x in (q, k, v)],
    "largest-values": lambda q, k, v: v.sign_().mul_(65504),
    "tiny": lambda q, k, v: [x.mul_(1e-7) for x in (q, k, v)],
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", CHANGES)
def test_finite_in_finite_out(kind, dtype, backend):
    grid = Grid(3, 5, 7)
    inputs, do = draw(grid)
    CHANGES[kind](*inputs[:3])
    inputs = [x.to(dtype) for x in inputs[:3]] + [inputs[3].clamp(-1, 1).to(dtype) * 2**-10]
    do = (do * 2**-10).to(dtype)
    assert all(x.isfinite().all() for x in results(attend(VSAConfig(sparsity=0.6), grid, backend), inputs, do))


def test_values_of_tokens_not_kept_do_not_leak():
    """Nan and infinity in a cube that is not kept reach no other cube; the padding of ragged cubes holds none."""
    grid = Grid(1, 4, 10)
    inputs, _ = draw(grid)
    q, k, v, _ = inputs
    q.fill_(1)
    cube = cube_order(grid, torch.device("cpu")).slots // 64
    k.copy_(torch.tensor([3.0, 2.0, -9.0], dtype=k.dtype)[cube][:, None].expand_as(k))
    v[:, :, cube == 2] = torch.nan
    assert attend(VSAConfig(sparsity=0.5), grid, "torch")(q, k, v).isfinite().all()


@pytest.mark.parametrize("sparsity", [1.0, -0.1, float("nan"), "0.5", True])
def test_refuses_a_sparsity_out_of_range(sparsity):
    with pytest.raises(UsageError, match="at least 0 and below 1. Try"):
        VSAConfig(sparsity=sparsity)


def test_counts_cubes_as_fastvideo_does():
    """Rounded up, at least one; what floating point adds to a whole number does not count."""
    assert [VSAConfig(sparsity=s).num_kept(364) for s in (0.0, 0.8, 0.9, 0.999)] == [364, 73, 37, 1]
    assert VSAConfig(sparsity=0.7).num_kept(10) == 3


def test_refuses_what_does_not_fit():
    grid = Grid(2, 3, 4)
    (q, k, v, gate), _ = draw(grid)
    config = VSAConfig()
    cases = [
        (lambda: video_sparse_attention(q, k[:, :, 1:], v, config, grid), "all must have the same shape"),
        (lambda: video_sparse_attention(q, k.float(), v, config, grid), "dtypes"),
        (lambda: video_sparse_attention(q, k, v, config, grid, gate[:, :1]), "gate has shape"),
        (lambda: video_sparse_attention(q, k, v, config, Grid(2, 3, 5)), "2 x 3 x 5 has 30 tokens"),
        (lambda: video_sparse_attention(q, k, v, config, cube_order(Grid(2, 3, 5), q.device)), "has 30 tokens"),
        (
            lambda: video_sparse_attention(q, k, v, config, grid, backend="triton"),
            "one of auto, reference, torch for vsa",
        ),
    ]
    for call, told in cases:
        with pytest.raises(ValueError, match=told) as caught:
            call()
        assert "\n" not in str(caught.value)
