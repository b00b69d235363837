"""`selector`: sub-blocks and random blocks, in every backend and method that ranks key blocks."""

import dataclasses
import json
import math

import pytest
import torch
from compiling import compile_blocks, denoise
from numerics import make_proj, make_qkv, results
from wan_models import build_pipeline

import slagen
from slagen.attention import registry, sparse_linear_attention
from slagen.attention.cost import ModelShape
from slagen.attention.learned import differences
from slagen.attention.mean.config import MeanConfig
from slagen.attention.mean.functional import block_mean_attention
from slagen.attention.mean.selection import kept_blocks
from slagen.attention.protocol import Grid, Inputs, Layer, StepContext
from slagen.attention.ranking import head_seeds, random_scores, subblock_scores
from slagen.attention.sla.block_map import CRITICAL, NEGLIGIBLE, block_map
from slagen.attention.sla.config import SLAConfig
from slagen.cli.main import run as command
from slagen.errors import UsageError
from slagen.training.config import DataConfig, FinetuneConfig
from slagen.wan.processor import install_method

BLOCKS = {"block_m": 32, "block_n": 16}
SELECTORS = ["subblock", "random"]
SLA = SLAConfig(sparsity=0.6, negligible=0.2, linear_domain="marginal", **BLOCKS)
MEAN = MeanConfig(sparsity=0.6, **BLOCKS)


@pytest.mark.parametrize("length", [1, 16, 19, 75])
def test_sub_blocks_by_loops(length):
    """The last block may be partial, and so may the last of its parts."""
    q, k, _ = make_qkv((1, 2, length, 8))

    def means(x, block):
        part = block // 4
        starts = range(0, length, block)
        return [
            [
                x[i : min(i + part, start + block, length)].mean(0)
                for i in range(start, min(start + block, length), part)
            ]
            for start in starts
        ]

    found = subblock_scores(q, k, 32, 16, 0.4)
    for h in range(2):
        for i, rows in enumerate(means(q[0, h], 32)):
            for j, columns in enumerate(means(k[0, h], 16)):
                expected = math.log(sum(math.exp(0.4 * (a @ b).item()) for a in rows for b in columns))
                assert found[0, h, i, j].item() == pytest.approx(expected, abs=1e-12)


def test_sub_blocks_see_what_a_mean_hides():
    """One key among others that cancel it: its block has the mean of an empty one, but the best part."""
    q, k = torch.zeros(1, 1, 32, 4), torch.zeros(1, 1, 64, 4)
    q[..., 0] = 4
    k[0, 0, 32:36, 0], k[0, 0, 36:40, 0] = 4, -4
    assert subblock_scores(q, k, 32, 16, 0.5)[0, 0, 0].argmax() == 2


def test_random_scores_are_seeded_and_spread():
    seeds = head_seeds(Layer(3, 4, 5, 16), "cpu")
    scores = random_scores(seeds, 40, 50)
    assert torch.equal(scores, random_scores(seeds, 40, 50)) and scores.shape == (5, 40, 50)
    assert torch.equal(scores[:, :7, :9], random_scores(seeds, 7, 9))  # a number depends on its place alone
    assert scores.unique().numel() > 0.99 * scores.numel() and scores.min() >= 0 and scores.max() < 2**24
    flat = (scores / 2**24).double()
    assert flat.mean().item() == pytest.approx(0.5, abs=0.01) and flat.var().item() == pytest.approx(1 / 12, abs=0.003)
    heads = flat.flatten(1)
    assert (torch.corrcoef(heads) - torch.eye(5)).abs().max() < 0.1
    assert (torch.corrcoef(flat[0]) - torch.eye(40)).abs().mean() < 0.2
    other = random_scores(head_seeds(Layer(2, 4, 5, 16), "cpu"), 40, 50)
    assert (other == scores).float().mean() < 0.01


@pytest.mark.parametrize("selector", ["pooled", *SELECTORS])
def test_as_many_blocks_whatever_the_selector(selector):
    """The density of a method does not depend on how it ranks."""
    q, k, _ = make_qkv((2, 3, 150, 8))
    config = dataclasses.replace(MEAN, selector=selector)
    kept = kept_blocks(q, k, config)
    assert kept.shape == (2, 3, 5, 10) and (kept.sum(-1) == config.num_kept(10)).all()
    if selector == "random":
        assert torch.equal(kept[0], kept[1]) and not torch.equal(kept[:, 0], kept[:, 1])
        assert torch.equal(kept, kept_blocks(q + 1, k.flip(2), config))  # of q and k it does not depend
        classes = block_map(random_scores(torch.arange(3), 5, 10), SLA)
        assert ((classes == CRITICAL).sum(-1) == 4).all() and ((classes == NEGLIGIBLE).sum(-1) == 2).all()


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("branches", ["both", "sparse", "linear"])
@pytest.mark.parametrize("length", [1, 33, 150])
def test_torch_is_the_reference(length, branches, selector):
    """o and every gradient in float64; another result than with pooled means, where there is a choice."""
    config = dataclasses.replace(SLA, selector=selector)
    inputs = [*make_qkv((2, 2, length, 8)), *make_proj(8)][: 3 if branches == "sparse" else 5]
    do = make_qkv((2, 2, length, 8), seed=2)[0]

    def attend(config, backend):
        return lambda *x: sparse_linear_attention(*x[:3], config, *x[3:], backend=backend, branches=branches)

    found, exact = (results(attend(config, backend), inputs, do) for backend in ("torch", "reference"))
    for a, e in zip(found, exact, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9)
    pooled = attend(SLA, "reference")(*inputs)
    assert torch.allclose(found[0], pooled, atol=1e-4) == (length == 1)


@pytest.mark.parametrize("selector", SELECTORS)
def test_block_means_in_torch_are_the_reference(selector):
    config, do = dataclasses.replace(MEAN, selector=selector), make_qkv((2, 2, 75, 8), seed=2)[0]
    found, exact = (
        results(lambda *x, b=backend: block_mean_attention(*x, config, backend=b), make_qkv((2, 2, 75, 8)), do)
        for backend in ("torch", "reference")
    )
    for a, e in zip(found, exact, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("selector", SELECTORS)
def test_kernels_take_any_selection(selector):
    """o and every gradient are those of the torch backend, on Triton's interpreter where there is no CUDA device."""
    pytest.importorskip("triton", reason="needs Triton, which is for Linux")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs = [*make_qkv((1, 2, 75, 16), torch.float32), *make_proj(16, torch.float32)]
    do = make_qkv((1, 2, 75, 16), torch.float32, seed=2)[0]
    config = dataclasses.replace(SLA, selector=selector)

    def attend(backend):
        return lambda *x: sparse_linear_attention(*x[:3], config, *x[3:], backend=backend)

    moved = [x.to(device) for x in inputs]
    found, expected = (results(attend(backend), moved, do.to(device)) for backend in ("triton", "torch"))
    for a, e in zip(found, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["sla", "mean"])
def test_layers_and_heads_choose_at_random_for_themselves(name):
    """In a layer as the reference has it, with the layer's own seeds."""
    method, inputs = registry.get(name), make_qkv((1, 2, 150, 8))
    config = dataclasses.replace(
        {"sla": dataclasses.replace(SLA, negligible=0.0), "mean": MEAN}[name], selector="random"
    )
    outputs = []
    for index in (0, 1):
        layer = Layer(index, 2, 2, 8)
        module, told = method.build(config, layer, "torch", None), Inputs(layer, StepContext())
        parameters = {key: x.double() for key, x in module.state_dict().items()}
        outputs.append(module(*inputs, told))
        exact = method.reference(config, *inputs, parameters, told)
        torch.testing.assert_close(outputs[-1], exact, rtol=1e-9, atol=1e-9)
        assert "seeds" not in module.state_dict()
    assert not torch.allclose(*outputs, atol=1e-3)


@pytest.mark.slow
def test_random_blocks_are_compiled_once():
    """The layer's seeds are tensors: layers are not compiled for anew."""
    pipe = build_pipeline()
    config = MeanConfig(block_m=16, block_n=16, selector="random")
    install_method(pipe.transformer, registry.get("mean"), config)
    graphs = compile_blocks(pipe.transformer)
    denoise(pipe, 2)
    assert len(graphs) == 1


def test_cost_notes_and_what_is_told():
    shape, grid, mean = ModelShape(2, 3, 16, 64, 8), Grid(2, 10, 16), registry.get("mean")
    costs = {each: mean.cost(dataclasses.replace(MEAN, selector=each), shape, grid) for each in ("pooled", *SELECTORS)}
    scores = 2 * 10 * 20 * 16 * 6
    assert costs["subblock"] - costs["pooled"] == 15 * scores and costs["pooled"] - costs["random"] == scores
    control = dataclasses.replace(MEAN, selector="random", order="cube")
    assert mean.note(control, {}, grid).endswith(
        "8 of 20 key blocks per query block, random selector, tokens in cube order"
    )
    assert mean.describe(control, grid)["selector"] == "random" and "selector" not in mean.describe(MEAN, grid)
    trained = SLAConfig(selector="subblock")
    assert differences(SLAConfig(), trained) == [
        "the weights were trained with the selector subblock, but this run uses pooled"
    ]
    assert SLAConfig.from_dict(trained.to_dict()) == trained and "selector" not in SLAConfig().to_dict()


def test_listed_with_their_kinds(capsys):
    assert command(["methods", "--json"]) == 0
    kinds = {row["name"]: row["kind"] for row in json.loads(capsys.readouterr().out)}
    assert (kinds["pooled"], kinds["subblock"], kinds["random"]) == ("selector", "selector", "control")
    assert command(["methods"]) == 0
    assert "--selector random" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--attention", "sol", "--selector", "random"], "selector is not an option of sol attention"),
        (["--attention", "vsa", "--selector", "random"], "selector is not an option of vsa attention"),
        (["--attention", "sla2", "--selector", "pooled"], "selector is not an option of sla2 attention"),
        (["--attention", "dense", "--selector", "random"], "selector is not an option of dense attention"),
    ],
)
def test_what_is_refused(arguments, said, capsys):
    assert command(["generate", "x", *arguments]) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_what_is_no_selector_and_what_is_no_method():
    with pytest.raises(UsageError, match="random selects key blocks for another method"):
        registry.get("random")
    with pytest.raises(UsageError, match="selector is 'best', but must be one of 'pooled', 'subblock', 'random'"):
        slagen.attend("mean", *make_qkv((1, 1, 64, 8)), selector="best")


@pytest.mark.parametrize(("name", "value"), [("selector", "random"), ("order", "cube")])
def test_linear_attention_over_all_tokens_has_nothing_to_choose(name, value):
    """It took both silently."""
    method, options = registry.get("linear"), {name: value}
    message = f"{name} is '{value}', but linear attention over all tokens chooses no key blocks. Leave --{name} out."
    with pytest.raises(UsageError, match=message):
        method.configure(SLAConfig(), options, Grid.flat(64))
    with pytest.raises(UsageError, match=message):
        FinetuneConfig(DataConfig("d"), attention="linear", attention_options=((name, value),)).attention_config(None)
    assert getattr(method.configure(SLA, options, Grid.flat(64)), name) == value  # they bound the domain "marginal"
    trained = SLAConfig(**options)
    assert method.configure(trained, {"sparsity": 0.5}, Grid.flat(64)) == dataclasses.replace(trained, sparsity=0.5)
