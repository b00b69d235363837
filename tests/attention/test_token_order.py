"""`order` of every method with blocks: in cube order it does with the reordered tokens what it does in raster order."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from compiling import compile_blocks, denoise
from finetune_runs import settings
from numerics import assert_within_budget, make_qkv, results
from test_order import members
from wan_models import build_pipeline, save_pipeline

import slagen
from slagen.attention import registry, sparse_linear_attention
from slagen.attention.mean.config import MeanConfig, SolConfig
from slagen.attention.protocol import Grid, Inputs, Layer, StepContext
from slagen.attention.sla.config import SLAConfig
from slagen.attention.sla2.config import SLA2Config
from slagen.errors import UsageError, WeightsError
from slagen.formats.sla import SLAMetadata, read_metadata
from slagen.generation.config import GenerateConfig
from slagen.generation.generate import generate
from slagen.generation.resolve import make_plan
from slagen.generation.session import Session
from slagen.training.finetune import finetune
from slagen.wan.folder import describe_folder
from slagen.wan.install import load_weights
from slagen.wan.processor import install_method
from slagen.wan.transformer import load_transformer

pytest_plugins = ["finetune_fixtures"]

GRIDS = [Grid(3, 5, 7), Grid(4, 4, 8)]  # ragged in every direction; whole cubes
BLOCKS = {"block_m": 16, "block_n": 16}
SLA = SLAConfig(sparsity=0.6, **BLOCKS)
MARGINAL = SLAConfig(sparsity=0.6, linear_domain="marginal", **BLOCKS)
CASES = {
    "sla": SLA, "sla-marginal": MARGINAL, "sparse": SLA, "linear": MARGINAL, "mean": MeanConfig(sparsity=0.6, **BLOCKS),
    "sol": SolConfig(tau=0.8, **BLOCKS), "sla2": SLA2Config(sparsity=0.6, **BLOCKS),
}  # fmt: skip


def name(grid):
    return f"{grid.num_frames}x{grid.height}x{grid.width}"


def cube(config):
    return dataclasses.replace(config, order="cube")


def sequence(grid):
    """The tokens in cube order, by loops: whole cubes first, then those of one shape together, larger ones first."""

    def shape(tokens):
        places = [(i // (grid.height * grid.width), i // grid.width % grid.height, i % grid.width) for i in tokens]
        return tuple(max(axis) - min(axis) + 1 for axis in zip(*places, strict=True))

    cubes = sorted(members(grid), key=shape, reverse=True)  # stable
    return torch.tensor([i for tokens in cubes for i in tokens])


def layer_of(case, config, backend, grid):
    """A layer of a method with drawn parameters, in float64, as a function of q, k and v."""
    method = registry.get(case.removesuffix("-marginal"))
    place = Layer(0, 1, 2, 8)
    module = method.build(config, place, backend, None).double()
    generator = torch.Generator().manual_seed(3)
    for parameter in module.requires_grad_(False).parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 3)
    context = StepContext()
    context.begin_pass(grid)
    return lambda q, k, v: module(q, k, v, Inputs(place, context))


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("grid", GRIDS, ids=name)
@pytest.mark.parametrize("case", CASES)
def test_it_is_raster_order_of_reordered_tokens(case, grid, backend):
    """o and every gradient, in float64; and it is another result than that of raster order."""
    config, order = CASES[case], sequence(grid)
    inputs, do = make_qkv((1, 2, grid.num_tokens, 8)), make_qkv((1, 2, grid.num_tokens, 8), seed=2)[0]
    actual = results(layer_of(case, cube(config), backend, grid), inputs, do)
    moved = results(layer_of(case, config, "reference", None), [x[:, :, order] for x in inputs], do[:, :, order])
    for a, e in zip(actual, moved, strict=True):
        torch.testing.assert_close(a[:, :, order], e, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(actual[0], layer_of(case, config, "reference", grid)(*inputs), atol=1e-3)


@pytest.mark.parametrize("case", ["sla", "sparse", "mean", "sol", "sla2"])
def test_all_blocks_kept_is_dense(case):
    grid, (q, k, v) = GRIDS[0], make_qkv((1, 2, 105, 8))
    whole = {"tau": -1e9} if case == "sol" else {"sparsity": 0.0}
    config = cube(dataclasses.replace(CASES[case], **whole))
    method = registry.get(case)
    module = method.build(config, Layer(0, 1, 2, 8), "torch", None)
    o = module(q, k, v, Inputs(Layer(0, 1, 2, 8), StepContext(grid=grid)))
    torch.testing.assert_close(o, F.scaled_dot_product_attention(q, k, v), rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_kernels_are_within_budget():
    """Forward and backward, on Triton's interpreter where there is no CUDA device."""
    pytest.importorskip("triton", reason="needs Triton, which is for Linux")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    grid = Grid(3, 3, 5)
    order, (inputs, do) = sequence(grid), (make_qkv((1, 1, 45, 16), torch.float32), make_qkv((1, 1, 45, 16), seed=2)[0])
    do = do.float()

    def attend(q, k, v):
        return sparse_linear_attention(q, k, v, cube(SLA), backend="triton", branches="sparse", grid=grid)

    actual = results(attend, [x.to(device) for x in inputs], do.to(device))
    moved = [x[:, :, order] for x in inputs]
    assert_within_budget(
        [x.cpu()[:, :, order] for x in actual], moved, do[:, :, order], SLA, torch.float32, branches="sparse"
    )


@pytest.mark.parametrize("name", ["mean", "sol"])
def test_attend_takes_the_grid(name):
    q, k, v = make_qkv((1, 2, 105, 8))
    expected = layer_of(name, cube(CASES[name]), "reference", GRIDS[0])(q, k, v)
    options = {field: value for field, value in vars(CASES[name]).items() if field != "order"}
    torch.testing.assert_close(slagen.attend(name, q, k, v, grid=(3, 5, 7), order="cube", **options), expected)
    with pytest.raises(UsageError, match=f"{name} attention in cube order depends on how the tokens are arranged"):
        slagen.attend(name, q, k, v, order="cube", **options)
    with pytest.raises(UsageError, match="order is 'hilbert', but must be one of 'raster', 'cube'. Try --order raster"):
        slagen.attend(name, q, k, v, grid=(3, 5, 7), order="hilbert", **options)


def test_without_a_grid_it_is_refused():
    q, k, v = make_qkv((1, 2, 105, 8))
    with pytest.raises(ValueError, match="the grid of the 105 tokens is unknown"):
        sparse_linear_attention(q, k, v, cube(SLA))
    with pytest.raises(ValueError, match="a grid of 3 x 5 x 8 has 120 tokens, but the sequence has 105"):
        sparse_linear_attention(q, k, v, cube(SLA), grid=Grid(3, 5, 8))


# In files


def test_raster_is_not_written():
    """Files, reports and keys of raster order are as they were before there was another."""
    for config in CASES.values():
        metadata = SLAMetadata(config, "toy", "0" * 64, "all", 1)
        assert "order" not in metadata.to_strings()["slagen"]
    for name in ("sla", "mean", "sol", "sla2"):
        method = registry.get(name)
        assert "order" not in method.describe(method.config(), Grid(4, 8, 8))
        assert method.describe(cube(method.config()), Grid(4, 8, 8))["order"] == "cube"


def test_one_model_in_memory_makes_clips_of_both_orders(tmp_path):
    """After a first clip in raster order, as in a batch, one in cube order failed: nobody noted its grid."""
    model = save_pipeline(tmp_path / "model")

    def planned(order):
        own = {"attention": "mean", "sparsity": 0.6, "attention_options": (("order", order),)}
        return make_plan(video(model, tmp_path, None, block_m=16, block_n=16, **own))

    plans = [planned(order) for order in ("raster", "cube", "raster")]
    session, alone = Session(plans[0]), Session(plans[1])
    embeds = session.encode(plans[0])
    raster, cubes, again = (session.denoise(plan, embeds, print)[0] for plan in plans)
    assert torch.equal(cubes, alone.denoise(plans[1], embeds, print)[0])
    assert torch.equal(raster, again) and not torch.equal(raster, cubes)


@pytest.fixture(scope="module")
def tuned(toy, plain_pictures_in_module, tmp_path_factory):
    """The model, and SLA's and SLA2's weights that were trained with cubes."""
    model, data = toy
    folders = {}
    for method, fields in {"sla": {}, "sla2": {"stages": "router,all", "router_steps": 1}}.items():
        folders[method] = tmp_path_factory.mktemp(method) / "out"
        own = {"attention_options": (("order", "cube"),), "steps": 2, "warmup_steps": 0, **fields}
        finetune(settings(model, folders[method], data=data, attention=method, **own))
    return model, folders


def video(model, folder, weights, **fields):
    return GenerateConfig(
        "a red circle", model=str(model), width=128, height=64, num_frames=9, steps=1, seed=1, device="cpu",
        weights=weights and str(weights), output=str(folder / "a.mp4"), overwrite=True, **fields,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sla", "sla2"])
def test_a_file_keeps_the_order_it_was_trained_with(method, tuned, tmp_path):
    model, folders = tuned
    assert read_metadata(folders[method]).config.order == "cube"
    made = generate(video(model, tmp_path, folders[method], attention=method)).videos[0]
    assert made.record.attention.to_dict()["order"] == "cube"
    plan = make_plan(video(model, tmp_path, folders[method], attention=method))
    assert plan.attention.order == "cube" and not plan.warnings
    assert "attention_options" not in plan.settings
    assert any("tokens in cube order" in note for note in plan.notes)
    raster = video(model, tmp_path, folders[method], attention=method, attention_options=(("order", "raster"),))
    other = make_plan(raster)
    assert other.attention.order == "raster" and other.settings["attention_options"] == {"order": "raster"}
    assert any("trained with" in told and "cube" in told for told in other.warnings)
    found = generate(raster).videos[0]
    assert found.record.latents_hash != made.record.latents_hash


@pytest.mark.slow
def test_loading_a_file_in_another_order_is_refused(tuned):
    model, folders = tuned
    transformer = load_transformer(describe_folder(model, "toy"), torch.float32)
    config = dataclasses.replace(read_metadata(folders["sla"]).config, order="raster")
    with pytest.raises(WeightsError, match="order is 'raster', but .* was trained with 'cube'"):
        load_weights(transformer, folders["sla"], registry.get("sla"), config=config)


# In a model


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sla", "sol"])
def test_blocks_are_compiled_once(name):
    """The permutation comes from outside the graphs: neither layers nor steps are compiled for anew."""
    pipe = build_pipeline()
    config = cube(dataclasses.replace(registry.get(name).config(), **BLOCKS))
    install_method(pipe.transformer, registry.get(name), config)
    graphs = compile_blocks(pipe.transformer)
    denoise(pipe, 3)
    assert len(graphs) == 1
