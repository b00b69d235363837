"""What holds for sparse-linear attention in every backend."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numerics import NAMES, assert_within_budget, make_proj, make_qkv, results, strided
from torch.autograd import gradcheck

from slagen.attention import SparseLinearAttention, sparse_linear_attention
from slagen.attention.sla import blocks, blockwise_sparse
from slagen.attention.sla.block_map import block_map, block_scores
from slagen.attention.sla.config import SLAConfig

BACKENDS = ["reference", "torch"]
FEATURE_MAPS = ["softmax", "elu", "relu"]
TAILS = [1, 15, 16, 17, 31, 64, 65, 200]


def small(**fields) -> SLAConfig:
    """Blocks of 16, about a third of them critical."""
    return SLAConfig(**{"sparsity": 0.65, "block_m": 16, "block_n": 16, **fields})


DOMAINS = [
    pytest.param({"linear_domain": "all"}, id="all"),
    pytest.param({"linear_domain": "marginal"}, id="marginal"),
    pytest.param({"linear_domain": "marginal", "negligible": 0.3}, id="marginal-negligible"),
]


@pytest.fixture(params=["whole", "tiny-pieces", "two-heads-in-pieces"])
def pieces(request, monkeypatch):
    """Cut short heads, too, into the many runs and chunks of long ones; at length 17, in groups of two heads."""
    if request.param != "whole":
        monkeypatch.setattr(blockwise_sparse, "CHUNK_BYTES", 1)
        run_tokens = 32 if request.param == "tiny-pieces" else 34
        monkeypatch.setattr(blocks, "RUN_BYTES", run_tokens * 4 * 8)  # D = 8, float32


# What the reference defines


def oracle(q, k, v, config: SLAConfig, weight, bias, scale: float):
    """One head of sparse-linear attention by loops over tokens, in numpy, from the paper's formulas alone."""
    length, dim = q.shape
    rows, columns = config.num_blocks(length)

    def phi(x):
        if config.feature_map == "softmax":
            return np.exp(x) / np.exp(x).sum()
        return np.maximum(x, 0) if config.feature_map == "relu" else np.where(x > 0, x + 1, np.exp(x))

    o = np.zeros((length, dim))
    for i in range(rows):
        tokens = range(i * config.block_m, min((i + 1) * config.block_m, length))
        scores = []
        for j in range(columns):
            keys = k[j * config.block_n : (j + 1) * config.block_n]
            scores.append((q[tokens].mean(0) * keys.mean(0)).sum())
        ranked = sorted(range(columns), key=lambda j: (-scores[j], j))
        critical = set(ranked[: max(1, math.floor((1 - config.sparsity) * columns + 1e-6))])
        dropped = math.floor(config.negligible * columns + 1e-6)
        negligible = set(ranked[len(critical) :][::-1][:dropped])
        for t in tokens:
            exact, linear = np.zeros(dim), np.zeros(dim)
            exact_sum, linear_sum = 0.0, 1e-5 if config.linear_domain == "all" else 0.0
            for s in range(length):
                block = s // config.block_n
                if block in critical:
                    p = math.exp(scale * (q[t] @ k[s]))
                    exact, exact_sum = exact + p * v[s], exact_sum + p
                if config.linear_domain == "all" or not (block in critical or block in negligible):
                    w = phi(q[t]) @ phi(k[s])
                    linear, linear_sum = linear + w * v[s], linear_sum + w
            o[t] = exact / exact_sum + weight @ (linear / linear_sum if linear_sum else linear) + bias
    return o


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize("domain", DOMAINS)
def test_agrees_with_loops_over_tokens(backend, domain, feature_map):
    config = small(**domain, feature_map=feature_map, block_m=32)
    q, k, v = make_qkv((1, 2, 75, 4))
    weight, bias = make_proj(4)
    o = sparse_linear_attention(q, k, v, config, weight, bias, scale=0.7, backend=backend)
    for head in range(2):
        expected = oracle(*(x[0, head].numpy() for x in (q, k, v)), config, weight.numpy(), bias.numpy(), 0.7)
        np.testing.assert_allclose(o[0, head].numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize("domain", DOMAINS)
def test_gradcheck(backend, domain, feature_map):
    """The gradients are those of finite differences, for q, k, v, weight and bias."""
    config = small(**domain, feature_map=feature_map)
    inputs = (*make_qkv((1, 2, 70, 2), requires_grad=True), *make_proj(2, requires_grad=True))

    def attend(q, k, v, weight, bias):
        return sparse_linear_attention(q, k, v, config, weight, bias, backend=backend)

    assert gradcheck(attend, inputs, fast_mode=True)


# The torch backend against the reference


def gradients(inputs, config, do, **options):
    """o, then the gradients of all inputs."""
    return results(lambda *x: sparse_linear_attention(*x[:3], config, *x[3:], **options), inputs, do)


@pytest.mark.parametrize("length", TAILS)
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize("domain", DOMAINS)
def test_torch_equals_reference(domain, feature_map, length, pieces):
    """Both backends, and all their gradients, agree to rounding in float64."""
    inputs = (*make_qkv((2, 3, length, 8)), *make_proj(8))
    do = make_qkv((2, 3, length, 8), seed=2)[0]
    for block_m, block_n in ((16, 16), (32, 16), (16, 64)):
        config = small(**domain, feature_map=feature_map, block_m=block_m, block_n=block_n)
        expected = gradients(inputs, config, do, backend="reference")
        actual = gradients(inputs, config, do, backend="torch")
        for name, a, e in zip(NAMES, actual, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("branches", ["sparse", "linear"])
@pytest.mark.parametrize("domain", DOMAINS)
def test_one_branch_equals_reference(domain, branches):
    inputs = (*make_qkv((1, 2, 100, 8)), *make_proj(8))
    do = make_qkv((1, 2, 100, 8), seed=2)[0]
    expected = gradients(inputs, small(**domain), do, backend="reference", branches=branches)
    actual = gradients(inputs, small(**domain), do, backend="torch", branches=branches)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.99], ids=["all-kept", "half-kept", "one-kept"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("domain", DOMAINS)
def test_error_is_within_budget(domain, dtype, sparsity):
    """o and every gradient stay within twice the error of the definition computed in float32, as this backend does."""
    config = small(**domain, sparsity=sparsity)
    inputs = (*make_qkv((2, 2, 75, 16), dtype), *make_proj(16, torch.float32))
    do = make_qkv((2, 2, 75, 16), dtype, seed=2)[0]
    actual = gradients(inputs, config, do, backend="torch")
    assert_within_budget(actual, inputs, do, config, torch.float32)


# Truths that need no table of tolerances


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("length", TAILS)
def test_all_blocks_and_zero_proj_is_dense_attention(backend, length):
    q, k, v = make_qkv((2, 2, length, 8))
    zero = torch.zeros(8, 8, dtype=q.dtype), torch.zeros(8, dtype=q.dtype)
    dense = F.scaled_dot_product_attention(q, k, v)
    for config in (small(sparsity=0), small(sparsity=0, linear_domain="marginal")):
        o = sparse_linear_attention(q, k, v, config, *zero, backend=backend)
        torch.testing.assert_close(o, dense, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("domain", DOMAINS)
def test_permuted_heads_permute_the_output(backend, domain):
    inputs, proj, order = make_qkv((2, 4, 100, 8)), make_proj(8), [2, 0, 3, 1]
    o = sparse_linear_attention(*inputs, small(**domain), *proj, backend=backend)
    permuted = sparse_linear_attention(*(x[:, order] for x in inputs), small(**domain), *proj, backend=backend)
    torch.testing.assert_close(permuted, o[:, order], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("domain", DOMAINS)
def test_batch_equals_its_elements(backend, domain, pieces):
    inputs, proj = make_qkv((3, 2, 100, 8)), make_proj(8)
    o = sparse_linear_attention(*inputs, small(**domain), *proj, backend=backend)
    alone = [
        sparse_linear_attention(*(x[i : i + 1] for x in inputs), small(**domain), *proj, backend=backend)
        for i in range(3)
    ]
    torch.testing.assert_close(o, torch.cat(alone), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("length", [64, 100], ids=["L64", "L100"])
def test_strides_make_no_difference(backend, length):
    """Wan hands over transposed views; slices of every second number, and swapped last dimensions, are rarer."""
    inputs, proj = make_qkv((2, 3, length, 8)), make_proj(8)
    do = make_qkv((2, 3, length, 8), seed=2)[0]
    expected = gradients((*inputs, *proj), small(), do, backend=backend)
    transposed = [strided(x) for x in inputs]
    assert not transposed[0].is_contiguous()
    every_second = [torch.stack([x, x], -1).flatten(-2)[..., ::2] for x in inputs]
    columns = [x.mT.contiguous().mT for x in inputs]
    for views in (transposed, every_second, columns):
        assert all(torch.equal(view, x) for view, x in zip(views, inputs, strict=True))
        views = [*views, proj[0].mT.contiguous().mT, proj[1]]
        for actual, e in zip(gradients(views, small(), strided(do), backend=backend), expected, strict=True):
            torch.testing.assert_close(actual, e, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_broadcast_keys_and_values(backend):
    """A stride of 0 is a stride too."""
    q, k, v = make_qkv((2, 3, 40, 8))
    k, v = k[:, :1].expand_as(q), v[:, :1].expand_as(q)
    o = sparse_linear_attention(q, k, v, small(), *make_proj(8), backend=backend)
    copied = sparse_linear_attention(q, k.clone(), v.clone(), small(), *make_proj(8), backend=backend)
    torch.testing.assert_close(o, copied, rtol=1e-12, atol=1e-12)


# Where the linear branch has nothing to say


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_weight_the_linear_branch_adds_nothing(backend):
    q, k, v = make_qkv((1, 2, 100, 8))
    zero = torch.zeros(8, 8, dtype=q.dtype)
    alone = sparse_linear_attention(q, k, v, small(), backend=backend)
    assert torch.equal(alone, sparse_linear_attention(q, k, v, small(), zero, backend=backend))
    proj = make_proj(8)
    assert torch.equal(alone, sparse_linear_attention(q, k, v, small(), *proj, backend=backend, branches="sparse"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("domain", DOMAINS)
def test_branches_add_up(backend, domain):
    q, k, v = make_qkv((1, 2, 100, 8))
    both, sparse, linear = (
        sparse_linear_attention(q, k, v, small(**domain), *make_proj(8), backend=backend, branches=branches)
        for branches in ("both", "sparse", "linear")
    )
    torch.testing.assert_close(sparse + linear, both, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "config", [{"sparsity": 0}, {"sparsity": 0.65, "negligible": 0.9}], ids=["critical", "negligible"]
)
def test_no_marginal_block_leaves_the_bias_and_finite_gradients(backend, config):
    """0 / 0 must reach neither the output nor, as nan times 0, a gradient."""
    config = small(linear_domain="marginal", **config)
    assert config.num_marginal(7) == 0
    inputs, (weight, bias) = make_qkv((1, 2, 100, 8)), make_proj(8)
    do = make_qkv((1, 2, 100, 8), seed=2)[0]
    o, dq, dk, dv, dweight, dbias = gradients((*inputs, weight, bias), config, do, backend=backend)
    alone = gradients(inputs, config, do, backend=backend)
    for actual, expected in zip((o - bias, dq, dk, dv), alone, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    assert dweight.count_nonzero() == 0
    torch.testing.assert_close(dbias, do.sum((0, 1, 2)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("linear_domain", ["all", "marginal"])
def test_relu_that_cuts_every_product_leaves_the_bias_and_finite_gradients(backend, linear_domain):
    config = small(linear_domain=linear_domain, feature_map="relu")
    q, k, v = make_qkv((1, 2, 100, 8))
    q[:, :, 30:60] = -q[:, :, 30:60].abs()
    weight, bias = make_proj(8)
    do = make_qkv((1, 2, 100, 8), seed=2)[0]
    grads = gradients((q, k, v, weight, bias), config, do, backend=backend)
    alone = sparse_linear_attention(q, k, v, config, backend=backend)
    torch.testing.assert_close(grads[0][:, :, 30:60], alone[:, :, 30:60] + bias, rtol=1e-12, atol=1e-12)
    assert all(x.isfinite().all() for x in grads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_eps_is_that_of_the_released_code(backend):
    """phi is tiny in every row, so that 1e-5 decides: o = O^l W^T + b with num / (num + 1e-5)."""
    q, k, v = (torch.full((1, 1, 20, 4), value, dtype=torch.float64) for value in (1e-3, 1e-3, 1.0))
    proj = torch.eye(4, dtype=torch.float64), None
    weights = 20 * 4 * 1e-6
    for linear_domain, expected in (("all", weights / (weights + 1e-5)), ("marginal", 1.0)):
        config = small(linear_domain=linear_domain, feature_map="relu", sparsity=0.5)
        o = sparse_linear_attention(q, k, v, config, *proj, backend=backend, branches="linear")
        if linear_domain == "all":
            torch.testing.assert_close(o, torch.full_like(o, expected))
        else:
            torch.testing.assert_close(o, torch.full_like(o, expected), rtol=1e-12, atol=0)


# Selection


def test_last_block_is_pooled_by_its_true_count():
    """17 tokens in blocks of 16: the lone last key outscores the mean of the others only if divided by 1."""
    k = torch.ones(1, 1, 17, 4)
    k[:, :, 16] = 2
    scores = block_scores(torch.ones(1, 1, 17, 4), k, small())
    assert scores.tolist() == [[[[4, 8], [4, 8]]]]


def test_equal_scores_rank_by_index():
    config = small(sparsity=0.7, negligible=0.3, linear_domain="marginal")
    scores = torch.zeros(1, 1, 2, 10)
    scores[..., 1, 4] = 1
    scores[..., 1, 7] = -1
    assert block_map(scores, config).tolist() == [
        [[[1, 1, 1, 0, 0, 0, 0, -1, -1, -1], [1, 1, 0, 0, 1, 0, 0, -1, -1, -1]]]
    ]


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_keys_are_chosen_alike_by_every_backend(backend):
    """All scores tie; with values that tell blocks apart, the first blocks are seen to be chosen."""
    q, k, v = (torch.ones(1, 1, 160, 4) for _ in range(3))
    v *= (torch.arange(160) // 16)[:, None]
    o = sparse_linear_attention(q, k, v, small(sparsity=0.7), backend=backend)
    torch.testing.assert_close(o, torch.ones_like(o))  # the mean of blocks 0, 1 and 2


def test_non_finite_inputs_reach_the_output():
    """A nan is not silently skipped, and does not break the selection."""
    for position in (0, 50, 99):
        q, k, v = make_qkv((1, 1, 100, 8), torch.float32)
        k[:, :, position] = torch.nan
        o = sparse_linear_attention(q, k, v, small())
        assert o.isnan().all()


# dtypes, modes and arguments


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_output_has_the_dtype_of_q(backend, dtype):
    q, k, v = make_qkv((1, 2, 40, 8), dtype, requires_grad=True)
    weight, bias = make_proj(8, torch.float32, requires_grad=True)
    o = sparse_linear_attention(q, k, v, small(), weight, bias, backend=backend)
    o.sum().backward()
    assert [x.dtype for x in (o, q.grad, k.grad, v.grad)] == [dtype] * 4
    assert weight.grad.dtype == bias.grad.dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_changes_nothing(backend):
    """The maths stays in float32, backward too."""
    inputs = (*make_qkv((1, 2, 100, 8), torch.float32), *make_proj(8, torch.float32))
    do = make_qkv((1, 2, 100, 8), torch.float32, seed=2)[0]
    expected = gradients(inputs, small(), do, backend="torch")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o = sparse_linear_attention(*inputs[:3], small(), *inputs[3:], backend=backend)
        actual = gradients(inputs, small(), do, backend="torch")
    torch.testing.assert_close(o, expected[0])
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_inference_mode_takes_parameters(backend):
    module = SparseLinearAttention(8, small(), backend=backend)
    q, k, v = make_qkv((1, 2, 40, 8), torch.float32)
    expected = module(q, k, v)
    with torch.inference_mode():
        assert torch.equal(module(q, k, v), expected)


def test_second_derivatives_are_refused():
    q, k, v = make_qkv((1, 1, 20, 4), requires_grad=True)
    loss = sparse_linear_attention(q, k, v, small()).square().sum()
    (dq,) = torch.autograd.grad(loss, q, create_graph=True)
    with pytest.raises(RuntimeError, match="blockwise_backward.* no autograd formula"):
        dq.sum().backward()


def test_auto_is_the_torch_backend():
    inputs = (*make_qkv((1, 2, 100, 8)), small(), *make_proj(8))
    assert torch.equal(sparse_linear_attention(*inputs), sparse_linear_attention(*inputs, backend="torch"))


@pytest.mark.gpu
@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_auto_works_on_cuda(domain, dtype):
    inputs = (*make_qkv((2, 3, 200, 16), dtype), *make_proj(16, torch.float32))
    do = make_qkv((2, 3, 200, 16), dtype, seed=2)[0]
    actual = gradients([x.cuda() for x in inputs], small(**domain), do.cuda())
    assert_within_budget(actual, inputs, do, small(**domain), dtype)


X = torch.zeros(1, 2, 20, 8)
WEIGHT, BIAS = torch.zeros(8, 8), torch.zeros(8)


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        pytest.param((X[0], X[0], X[0]), {}, r"\(2, 20, 8\)", id="three-dimensions"),
        pytest.param((X, X[:, :, :19], X), {}, r"\(1, 2, 19, 8\)", id="other-length"),
        pytest.param((X, X, X[..., :4]), {}, r"\(1, 2, 20, 4\)", id="other-head-dim"),
        pytest.param((X[:, :, :0], X[:, :, :0], X[:, :, :0]), {}, r"\(1, 2, 0, 8\)", id="no-token"),
        pytest.param((X, X.double(), X), {}, "torch.float64", id="mixed-dtypes"),
        pytest.param((X.int(), X.int(), X.int()), {}, "torch.int32", id="integers"),
        pytest.param((X, X, X.to("meta")), {}, "v is on meta", id="mixed-devices"),
        pytest.param((X, X, X), {"proj_bias": BIAS}, "without proj_weight", id="bias-alone"),
        pytest.param((X, X, X), {"proj_weight": WEIGHT[:4]}, r"proj_weight has shape \(4, 8\)", id="weight-shape"),
        pytest.param((X, X, X), {"proj_weight": WEIGHT.int()}, "torch.int32", id="weight-integers"),
        pytest.param(
            (X, X, X), {"proj_weight": WEIGHT, "proj_bias": WEIGHT}, r"proj_bias has shape \(8, 8\)", id="bias-shape"
        ),
        pytest.param((X, X, X), {"proj_weight": WEIGHT.to("meta")}, "proj_weight is on meta", id="weight-device"),
        pytest.param((X, X, X), {"scale": 0}, "scale is 0", id="scale-0"),
        pytest.param((X, X, X), {"scale": -1.0}, "scale is -1.0", id="scale-negative"),
        pytest.param((X, X, X), {"scale": math.nan}, "scale is nan", id="scale-nan"),
        pytest.param((X, X, X), {"scale": math.inf}, "scale is inf", id="scale-inf"),
        pytest.param((X, X, X), {"backend": "cuda"}, "reference, torch, triton", id="backend-unknown"),
        pytest.param((X, X, X), {"branches": "none"}, "both, sparse, linear", id="branches-unknown"),
        pytest.param((X, X, X), {"branches": "linear"}, "linear branch needs proj_weight", id="linear-without-weight"),
        pytest.param((X, X, X), {"config": None}, "SLAConfig", id="no-config"),
    ],
)
def test_what_cannot_work_is_refused(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        sparse_linear_attention(*arguments, **{"config": small(), **options})


# The module


def test_fresh_module_is_the_sparse_branch():
    module = SparseLinearAttention(8, small())
    q, k, v = make_qkv((1, 2, 100, 8), torch.float32)
    assert {name: (p.shape, p.dtype) for name, p in module.named_parameters()} == {
        "proj_l.weight": ((8, 8), torch.float32),
        "proj_l.bias": ((8,), torch.float32),
    }
    assert all(p.count_nonzero() == 0 for p in module.parameters())
    assert torch.equal(module(q, k, v), sparse_linear_attention(q, k, v, small()))


def test_module_learns_its_projection_from_zero():
    module = SparseLinearAttention(8, small())
    q, k, v = make_qkv((1, 2, 100, 8), torch.bfloat16)
    module(q, k, v).float().square().sum().backward()
    assert all(p.grad.count_nonzero() > 0 for p in module.parameters())


def test_making_a_module_draws_no_random_number():
    """Else installing attention would change a seeded run."""
    state = torch.get_rng_state()
    SparseLinearAttention(8)
    assert torch.equal(torch.get_rng_state(), state)
