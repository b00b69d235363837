"""SLA2 in every backend: the definition, its limits, and gradients."""

import math

import pytest
import torch
import torch.nn.functional as F
from numerics import make_qkv, results, strided
from torch.autograd import gradcheck

from slagen.attention.cost import ModelShape
from slagen.attention.mean.config import MeanConfig
from slagen.attention.mean.functional import block_mean_attention
from slagen.attention.sla import blocks, blockwise_sparse
from slagen.attention.sla.block_map import MARGINAL, block_map, block_scores
from slagen.attention.sla2.config import SLA2Config
from slagen.attention.sla2.cost import sla2_attention_flops
from slagen.attention.sla2.functional import sla2_attention
from slagen.attention.sla2.layer import SLA2

LENGTHS = [1, 15, 17, 65, 150]
MODES = [pytest.param(False, id="hard"), pytest.param(True, id="soft")]
CONFIGS = {
    "default": {},
    "plain-keys": {"smooth_keys": False},
    "mass": {"mixing": "mass"},
    "each-block": {"mixing_blocks": 3},
}


def small(**fields) -> SLA2Config:
    """Blocks of 32 queries and 16 keys, about a third of them kept."""
    return SLA2Config(**{"sparsity": 0.65, "block_m": 32, "block_n": 16, **fields})


def make_weights(config: SLA2Config, num_heads: int, head_dim: int, dtype=torch.float64):
    """A router near the identity, and logits on both sides of 0."""
    generator = torch.Generator().manual_seed(7)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    near = [torch.eye(head_dim, dtype=torch.float64) + 0.3 * draw(head_dim, head_dim) for _ in range(2)]
    return [x.to(dtype) for x in (*near, draw(num_heads, config.mixing_blocks))]


def attend(config, backend, soft=False):
    return lambda *x: sla2_attention(*x[:3], config, *x[3:], soft=soft, backend=backend)


@pytest.mark.parametrize("soft", MODES)
@pytest.mark.parametrize("fields", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("length", LENGTHS)
def test_torch_is_the_reference(length, fields, soft, monkeypatch):
    """o and every gradient in float64; cut into the pieces of long heads."""
    monkeypatch.setattr(blockwise_sparse, "CHUNK_BYTES", 1)
    monkeypatch.setattr(blocks, "RUN_BYTES", 64 * 4 * 8)
    config, shape = small(**fields), (2, 2, length, 8)
    inputs, do = [*make_qkv(shape), *make_weights(config, 2, 8)], make_qkv(shape, seed=2)[0]
    inputs[:3] = map(strided, inputs[:3])
    actual = results(attend(config, "torch", soft), inputs, do)
    exact = results(attend(config, "reference", soft), inputs, do)
    for name, a, e in zip(("o", "q", "k", "v", "router_q", "router_k", "logit"), actual, exact, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")
    trains = length > 16  # otherwise there is one block
    assert exact[4].any() == exact[5].any() == (soft and trains)
    assert exact[6].any() == (trains and config.mixing == "learned")


@pytest.mark.parametrize("soft", MODES)
@pytest.mark.parametrize("mixing", ["learned", "mass"])
def test_gradcheck(mixing, soft):
    """Finite differences, of the soft top-k's lambda and the mean key too."""
    config = small(sparsity=0.5, block_m=16, mixing=mixing, mixing_blocks=2, router_tau=0.5)
    inputs = [*make_qkv((1, 1, 35, 2)), *make_weights(config, 1, 2)]
    for x, passes in zip(inputs, (True, True, True, soft, soft, mixing == "learned"), strict=True):
        x.requires_grad_(passes)
    assert gradcheck(attend(config, "torch", soft), inputs)


@pytest.mark.parametrize("soft", MODES)
@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("length", [1, 16, 150])
def test_all_blocks_kept_is_dense(length, backend, soft):
    config = small(sparsity=0.0)
    q, k, v = make_qkv((1, 2, length, 8))
    o = attend(config, backend, soft)(q, k, v, *make_weights(config, 2, 8))
    torch.testing.assert_close(o, F.scaled_dot_product_attention(q, k, v), rtol=1e-12, atol=1e-12)


def kept_blocks(config, q, k, v, weights, soft=False):
    """The blocks that reach o where the exact branch has all weight: v marks the key block of each token."""
    length = q.shape[2]
    num_columns = config.sla.num_blocks(length)[1]
    v = F.one_hot(torch.arange(length) // config.block_n, num_columns).double().expand(*q.shape[:2], -1, -1)
    k, q = (F.pad(x, (0, num_columns - x.shape[3])) for x in (k, q))
    router = [torch.block_diag(w, torch.eye(num_columns - len(w), dtype=w.dtype)) for w in weights[:2]]
    sure = torch.full_like(weights[2], 1e4)
    return sla2_attention(q, k, v, config, *router, sure, soft=soft, backend="torch")[:, :, :: config.block_m] > 0


@pytest.mark.parametrize("smooth", [True, False], ids=["smooth", "plain"])
def test_identity_router_keeps_what_sla_keeps(smooth):
    config = small(smooth_keys=smooth)
    q, k, v = make_qkv((2, 2, 150, 8))
    weights = [torch.eye(8, dtype=torch.float64)] * 2 + [torch.zeros(2, 1, dtype=torch.float64)]
    scores = block_scores(q, k, config.sla)
    expected = block_map(scores, config.sla) != MARGINAL
    assert torch.equal(kept_blocks(config, q, k, v, weights), expected)
    assert torch.equal(expected.sum(-1), torch.full((2, 2, 5), config.sla.num_critical(10)))


def test_a_router_keeps_others():
    config = small()
    q, k, v = make_qkv((2, 2, 150, 8))
    kept = kept_blocks(config, q, k, v, make_weights(config, 2, 8))
    assert (kept != (block_map(block_scores(q, k, config.sla), config.sla) != MARGINAL)).any()


@pytest.mark.parametrize("mixing", ["learned", "mass"])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_cold_soft_topk_is_the_hard_one(backend, mixing):
    q, k, v = make_qkv((1, 2, 150, 8))
    config = small(router_tau=1e-5, mixing=mixing)
    weights = make_weights(config, 2, 8)
    soft, hard = (attend(config, backend, soft)(q, k, v, *weights) for soft in (True, False))
    torch.testing.assert_close(soft, hard, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_mass_is_the_mixing_of_means(backend):
    """a = e^lse / (e^lse + R) with R the mass of the rejected blocks, each n copies of its mean key: as in `mean`.

    The values are 1 in the kept blocks and 0 in all others, so that o is a.
    """
    config = small(mixing="mass", block_m=16)
    of_means = MeanConfig(sparsity=config.sparsity, block_m=16, block_n=16)
    q, k, _ = make_qkv((1, 1, 150, 8))
    weights = [torch.eye(8, dtype=torch.float64)] * 2 + [torch.zeros(1, 1, dtype=torch.float64)]
    kept = (block_map(block_scores(q, k, config.sla), config.sla) != MARGINAL)[0, 0]
    s = q[0, 0] @ k[0, 0].mT * 8**-0.5
    for row in range(10):
        tokens = kept[row].repeat_interleave(16)[:150]
        v = tokens.double()[:, None].expand_as(q)
        o, mean = attend(config, backend)(q, k, v, *weights), block_mean_attention(q, k, v, of_means)
        mean_scores = [q[0, 0] @ x.mean(0) * 8**-0.5 for x in k[0, 0].split(16)]
        rejected = sum(len(k[0, 0, 16 * j : 16 * j + 16]) * mean_scores[j].exp() for j in range(10) if not kept[row, j])
        mass = s.exp()[:, tokens].sum(-1)
        own = slice(16 * row, 16 * row + 16)
        torch.testing.assert_close(o[0, 0, own, 0], (mass / (mass + rejected))[own], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(o[:, :, own], mean[:, :, own], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_logits_along_the_query_blocks(backend):
    """One each is taken as it is; another number is interpolated; one is the same for all."""
    q, k, v = make_qkv((1, 1, 128, 8))
    eye = torch.eye(8, dtype=torch.float64)

    def a(*logits):
        config = small(mixing_blocks=len(logits))
        logit = torch.tensor([logits], dtype=torch.float64)
        sure = torch.full_like(logit, 1e4)
        o, exact, linear = (attend(config, backend)(q, k, v, eye, eye, x) for x in (logit, sure, -sure))
        weight = ((o - linear) / (exact - linear))[0, 0, ::32, 0]
        return weight.logit()

    close = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(a(0.5, -1.0, 2.0, 0.0), torch.tensor([0.5, -1.0, 2.0, 0.0]).double(), **close)
    torch.testing.assert_close(a(0.5), torch.full((4,), 0.5).double(), **close)
    torch.testing.assert_close(a(1.0, 3.0), torch.tensor([1.0, 1.5, 2.5, 3.0]).double(), **close)


EXTREMES = {
    "scores-of-1e4": lambda q, k: (q.mul_(100 * 8**0.25), k.mul_(100 * 8**0.25)),
    "outlier": lambda q, k: (q[..., 3].add_(60), k[..., 3].sub_(60)),
    "all-equal": lambda q, k: (q.fill_(2), k.fill_(2)),
    "zero": lambda q, k: (q.zero_(), k.zero_()),
    "tiny": lambda q, k: (q.mul_(1e-20), k.mul_(1e-20)),
}


@pytest.mark.parametrize("soft", MODES)
@pytest.mark.parametrize("mixing", ["learned", "mass"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])
@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("kind", EXTREMES)
def test_extremes_stay_finite(kind, backend, dtype, mixing, soft):
    config = small(mixing=mixing)
    q, k, v = make_qkv((1, 1, 150, 8))
    EXTREMES[kind](q, k)
    inputs = [*(x.to(dtype) for x in (q, k, v)), *make_weights(config, 1, 8, torch.float32)]
    found = results(attend(config, backend, soft), inputs, make_qkv((1, 1, 150, 8), seed=2)[0].to(dtype))
    assert all(x.isfinite().all() for x in found)
    assert found[0].abs().max() <= v.abs().max() * 1.001  # each row is a mean of values


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_equal_scores_keep_lower_blocks(backend):
    """Hard: by index. Soft: every block by the same degree, so that the exact branch is dense attention."""
    config = small(smooth_keys=False)
    q, k, v = make_qkv((1, 1, 160, 8))
    q.fill_(0.5), k.fill_(2)
    eye, sure = torch.eye(8, dtype=torch.float64), torch.full((1, 1), 1e4, dtype=torch.float64)
    count = config.sla.num_critical(10)
    hard, soft = (attend(config, backend, soft)(q, k, v, eye, eye, sure) for soft in (False, True))
    torch.testing.assert_close(hard[0, 0], v[0, 0, : 16 * count].mean(0).expand(160, 8))
    torch.testing.assert_close(soft[0, 0], v[0, 0].mean(0).expand(160, 8))


def test_complement_without_cancellation():
    """The linear branch where the kept blocks hold all but 1e-12 of a feature: as exact in float32 as on its own."""
    config = small(sparsity=0.6, block_m=16, smooth_keys=False)
    q, k, v = make_qkv((1, 1, 80, 8))
    q[..., 0] += 30
    k[:, :, :32, 0] += 30  # two of five blocks are kept, by all rows
    k[:, :, 32:, 0] -= 3
    eye, linear_alone = torch.eye(8, dtype=torch.float64), torch.full((1, 1), -1e4, dtype=torch.float64)
    inputs = [q, k, v, eye, eye, linear_alone]
    rest = k[:, :, 32:].softmax(-1)
    w = q.softmax(-1) @ rest.mT
    expected = w @ v[:, :, 32:] / w.sum(-1, keepdim=True)
    for dtype, limit in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        o = attend(config, "torch")(*(x.to(dtype) for x in inputs))
        assert (o.double() - expected).abs().max() <= limit


def test_layer_is_the_operator():
    """A fresh module starts at the identity and a = 0.9, whatever autocast says; what it learns has three names."""
    config = small(mixing_blocks=2)
    layer = SLA2(8, 2, config)
    q, k, v = make_qkv((1, 2, 150, 8), torch.float32)
    eye, logit = torch.eye(8), torch.full((2, 2), math.log(9))
    for backend in ("torch", "reference", "auto"):
        layer.backend = backend
        expected = sla2_attention(q, k, v, config, eye, eye, logit, backend=backend)
        assert torch.equal(layer(q, k, v), expected)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(layer(q, k, v), expected)
    assert set(layer.state_dict()) == {"router_q.weight", "router_k.weight", "mix.logit"}
    layer.soft = True
    layer(q, k, v).sum().backward()
    assert all(p.grad.any() for p in layer.parameters())


@pytest.mark.parametrize("soft", MODES)
def test_operator_is_well_registered(soft):
    """Schema, fake shapes and autograd hold, so that torch.compile can take the operator as it is."""
    q, k, v = make_qkv((1, 2, 40, 8), torch.float16, requires_grad=True)
    keys = k.detach().float().requires_grad_()
    logs = make_qkv((1, 2, 3, 3), torch.float32)[0].requires_grad_()
    chosen = (logs, logs) if soft else (None, torch.tensor([False, True, True]).expand(1, 2, 3, 3))
    utils = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(
        torch.ops.slagen.sla2_forward.default, (q, keys, v, *chosen, 16, 16, 0.25, True), test_utils=utils
    )


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"sparsity": 1.0}, "sparsity is 1.0"),
        ({"block_m": 48}, "block_m is 48"),
        ({"router_tau": 0.0}, "router_tau is 0.0, but must be a finite number above 0. Try --router-tau 0.1."),
        ({"router_tau": math.nan}, "router_tau is nan"),
        ({"smooth_keys": 1}, "smooth_keys is 1, but must be true or false."),
        ({"mixing": "mean"}, "mixing is 'mean', but must be learned or mass. Try --mixing learned."),
        ({"mixing_blocks": 0}, "mixing_blocks is 0, but must be a whole number from 1 to 65536. Try"),
        ({"mixing_blocks": True}, "mixing_blocks is True"),
    ],
)
def test_config_refuses(fields, text):
    from slagen.errors import UsageError

    with pytest.raises(UsageError) as error:
        SLA2Config(**fields)
    assert text in str(error.value)


def test_operator_refuses():
    q, k, v = make_qkv((1, 2, 40, 8))
    eye, logit = torch.eye(8), torch.zeros(2, 1)
    for change, text in (
        ({"router_q": torch.eye(4)}, "router_q has shape (4, 4) and dtype torch.float32 on cpu"),
        ({"logit": torch.zeros(2, 3)}, "logit has shape (2, 3) and dtype torch.float32 on cpu"),
        ({"scale": 0.0}, "scale is 0.0"),
        ({"backend": "cuda"}, "backend is 'cuda'"),
        ({"backend": "triton", "soft": True}, "the soft top-k has no Triton kernels. Try torch or auto."),
        ({"backend": "triton", "config": small(mixing="mass")}, "mixing 'mass' has no Triton kernels."),
    ):
        given = {"config": small(), "router_q": eye, "router_k": eye, "logit": logit, **change}
        with pytest.raises(ValueError) as error:
            sla2_attention(q, k, v, **given)
        assert text in str(error.value)


def test_a_fresh_layer_gives_the_exact_branch_nine_tenths():
    layer = SLA2(8, 2, small(mixing_blocks=3))
    torch.testing.assert_close(layer.mix().sigmoid(), torch.full((2, 3), 0.9))
    assert all(torch.equal(router.weight, torch.eye(8)) for router in (layer.router_q, layer.router_k))


@pytest.mark.parametrize("mixing", ["learned", "mass"])
def test_cost_counts_the_router_and_the_mix(mixing):
    """160 tokens of one head: 5 query blocks, 10 key blocks of which 3 are kept, and no proj_l."""
    length, dim, kept = 160, 8, 3 * 16
    exact, states, sums = 4 * length * kept * dim, 4 * length * dim**2, 2 * 5 * 10 * dim**2
    router = 2 * 5 * 10 * dim + 2 * (5 + 10) * dim**2
    mix = 3 * length * dim + (2 * length * 10 * dim if mixing == "mass" else 0)
    found = sla2_attention_flops(small(mixing=mixing), ModelShape(1, 1, dim, 32, 4), length)
    assert found == exact + states + sums + router + mix


def test_what_only_training_uses_is_shown_there_and_has_no_effect_elsewhere():
    """The temperature of the router's soft top-k; command lines that gave it to others go on."""
    from slagen.attention.registry import own_settings
    from slagen.generation.config import GenerateConfig
    from slagen.generation.estimate import plan
    from slagen.training.config import FinetuneConfig

    def hidden(config):
        return {setting.field for setting in own_settings(config) if setting.about.hidden}

    assert (hidden(GenerateConfig), hidden(FinetuneConfig)) == ({"router_tau"}, set())
    config = GenerateConfig("a", attention="sla2", attention_options=(("router_tau", 0.5),), allow_untrained=True)
    assert "--router-tau has no effect here, because only slagen finetune uses it" in plan(config).notes
