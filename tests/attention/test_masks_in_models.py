"""`radial` and `nabla` as methods: in a model, on the command line, what they cost and what they refuse."""

import json

import pytest
import torch
from compiling import compile_blocks, denoise
from numerics import make_qkv
from wan_models import build_pipeline, build_transformer, save_pipeline

from slagen.attention import registry
from slagen.attention.call import attend
from slagen.attention.cost import ModelShape, dense_attention_flops
from slagen.attention.nabla.config import NablaConfig
from slagen.attention.nabla.functional import nabla_attention
from slagen.attention.protocol import Grid, Inputs, Layer, StepContext
from slagen.attention.radial.config import RadialConfig
from slagen.attention.radial.functional import radial_attention
from slagen.cli.main import run as slagen
from slagen.wan.observe import take_densities
from slagen.wan.processor import install_method

RADIAL, NABLA = registry.get("radial"), registry.get("nabla")
SMALL = {"radial": RadialConfig(block_m=16, block_n=16), "nabla": NablaConfig(top_p=0.2, sliding_tile="none")}
FUNCTIONS = {"radial": radial_attention, "nabla": nabla_attention}
NAMES = list(SMALL)
WAN = Grid(21, 30, 52)  # of 81 frames of 832 x 480


def test_registered_without_needs():
    for method in (RADIAL, NABLA):
        about = method.to_dict()
        assert not (about["needs_training"] or about["needs_weights"] or about["needs_gpu"] or method.parameters)
    assert RADIAL.to_dict()["options"] == {"decay_factor": 0.2, "block_m": 128, "block_n": 128}
    assert NABLA.to_dict()["options"] == {"top_p": 0.4, "sliding_tile": "11x3x3"}
    assert "triton" in RADIAL.to_dict()["backends"] and "triton" not in NABLA.to_dict()["backends"]


def test_cost_density_and_notes():
    """Radial's density is exact; of NABLA it is about the largest."""
    shape = ModelShape(30, 12, 128, 8960, 512)
    dense = dense_attention_flops(shape, WAN.num_tokens)
    assert RADIAL.density(RadialConfig(), WAN) == pytest.approx(0.3182, abs=1e-4)
    assert RADIAL.cost(RadialConfig(), shape, WAN) / dense == pytest.approx(RADIAL.density(RadialConfig(), WAN))
    assert RADIAL.note(RadialConfig(), {}, WAN) == "decay-factor 0.2 over 21 frames -> 31.8% of all query-key pairs"
    assert NABLA.describe(NablaConfig(), WAN)["key_blocks"] == 21 * 4 * 7
    share = NABLA.density(NablaConfig(), WAN)
    assert share == pytest.approx(0.522, abs=1e-3)
    assert NABLA.cost(NablaConfig(), shape, WAN) / dense == pytest.approx(share + 588**2 / (2 * 32760**2))
    assert NABLA.note(NablaConfig(), {}, WAN).startswith(
        "top-p 0.4 over 588 patches of 8x8 tokens, plus the sliding tile 11x3x3 (12%) -> at most "
        "about 52% of all query-key pairs"
    )


def test_where_there_is_nothing_to_skip():
    assert not RADIAL.applies(RadialConfig(), Grid(1, 90, 90)) and not RADIAL.applies(RadialConfig(), Grid(2, 8, 8))
    assert RADIAL.applies(RadialConfig(), Grid(3, 8, 8))
    assert not NABLA.applies(NablaConfig(top_p=1), WAN) and not NABLA.applies(NablaConfig(), Grid(3, 9, 16))
    assert not NABLA.applies(NablaConfig(sliding_tile="none"), Grid(1, 8, 8))
    assert NABLA.applies(NablaConfig(sliding_tile="none"), Grid(2, 8, 8))


@pytest.mark.parametrize("name", NAMES)
def test_a_layer_takes_the_grid_and_counts_pairs(name):
    """Also where the grid changes from pass to pass; the reference of the method is that of the layer."""
    method, config, layer = registry.get(name), SMALL[name], Layer(0, 1, 2, 8)
    module = method.build(config, layer, "auto", None)
    for grid in (Grid(5, 8, 9), Grid(9, 8, 5), Grid(5, 8, 9)):
        q, k, v = make_qkv((1, 2, 360, 8))
        inputs = Inputs(layer, StepContext(grid=grid), kept={})
        module.begin_pass(inputs.context)
        o = module(q, k, v, inputs)
        torch.testing.assert_close(o, method.reference(config, q, k, v, {}, inputs), rtol=1e-12, atol=1e-12)
        assert torch.equal(o, FUNCTIONS[name](q, k, v, config, grid))
        density = module.take_density()
        assert 0 < density < 1 and module.take_density() is None
        if name == "radial":
            assert density == method.density(config, grid)
    with pytest.raises(ValueError, match="3 x 5 x 7 has 105 tokens, but the sequence has 360"):
        method.build(config, layer, "auto", None)(q, k, v, Inputs(layer, StepContext(grid=Grid(3, 5, 7)), kept={}))


def test_attend_runs_them_by_name():
    q, k, v = make_qkv((1, 2, 90, 8))
    expected = radial_attention(q, k, v, SMALL["radial"], Grid(3, 5, 6))
    assert torch.equal(attend("radial", q, k, v, grid=(3, 5, 6), block_m=16, block_n=16), expected)
    expected = nabla_attention(q, k, v, SMALL["nabla"], Grid(3, 5, 6))
    assert torch.equal(attend("nabla", q, k, v, grid=(3, 5, 6), top_p=0.2, sliding_tile="none"), expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_runs_and_has_gradients(name):
    model, method = build_transformer(), registry.get(name)
    latents = torch.randn(1, 4, 3, 18, 10, generator=torch.Generator().manual_seed(0), requires_grad=True)
    inputs = latents, torch.ones(1), torch.zeros(1, 8, 32)
    dense = model(*inputs)[0]
    install_method(model, method, SMALL[name])
    sparse = model(*inputs)[0]
    assert all(0 < density < 1 for density in take_densities(model))
    assert sparse.isfinite().all() and not torch.allclose(sparse, dense)
    assert torch.autograd.grad(sparse.sum(), latents)[0].abs().max() > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_steps_and_layers_compile_nothing_anew(name):
    pipe = build_pipeline(num_layers=3)
    install_method(pipe.transformer, registry.get(name), SMALL[name])
    graphs, counts = compile_blocks(pipe.transformer), []
    for steps in (1, 3):
        denoise(pipe, steps, size=96)
        counts.append(len(graphs))
    assert counts == [1, 1]


@pytest.mark.parametrize("name", NAMES)
def test_the_command_line_generates_and_plans(name, tmp_path, capsys):
    options = {
        "radial": ["--decay-factor", "0.5", "--block-m", "16", "--block-n", "16"],
        "nabla": ["--top-p", "0.2", "--sliding-tile", "1x1x1"],
    }[name]
    asked = ["a red circle", "--model", str(save_pipeline(tmp_path / "model")), "--size", "80x144", "--num-frames", "9"]
    asked += ["--attention", name, *options, "--device", "cpu"]
    output = ["--steps", "1", "--seed", "1", "--json", "--output", str(tmp_path / "a.mp4")]
    assert slagen(["generate", *asked, *output]) == 0
    told = capsys.readouterr()
    report = json.loads(told.out)
    about = report["attention"]
    assert about["mode"] == name and about["backend"] == "torch" and about["tokens"] == 135
    assert (
        about["layer_densities"] == [about["density"]] * 2 if name == "radial" else len(about["layer_densities"]) == 2
    )
    assert 0 < about["density"] < 1
    if name == "radial":
        assert about["density"] == about["expected_density"] and about["decay_factor"] == 0.5
    else:
        assert 0 < about["density_bound"] <= 1 and about["sliding_tile"] == "1x1x1"
    share = report["cost"]["attention_tflop"] / report["cost"]["dense_attention_tflop"]
    assert share == pytest.approx(about["density"], abs=0.01)
    assert slagen(["plan", *asked]) == 0
    told = " ".join(capsys.readouterr().err.split())
    assert {"radial": "over 3 frames ->", "nabla": "over 6 patches of 8x8 tokens"}[name] in told


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--attention", "radial", "--decay-factor", "0"], "decay_factor is 0.0, but must be a finite number above 0"),
        (["--attention", "radial", "--sparsity", "0.9"], "sparsity is not an option of radial attention"),
        (["--attention", "sol", "--decay-factor", "1"], "decay-factor is not an option of sol attention"),
        (["--attention", "nabla", "--top-p", "2"], "top_p is 2.0, but must be a number above 0 and at most 1"),
        (["--attention", "nabla", "--sliding-tile", "3"], "sliding_tile is '3', but must be three numbers"),
        (
            ["--attention", "nabla", "--backend", "triton"],
            "backend is 'triton', but must be one of auto, reference",
        ),
        (["--attention", "nabla", "--block-m", "64"], "block-m is not an option of nabla attention"),
    ],
)
def test_what_generate_refuses(arguments, said, capsys):
    assert slagen(["generate", "x", *arguments]) == 2
    assert said.replace("-", "_") in " ".join(capsys.readouterr().err.split()).replace("-", "_")
