"""slagen attention: the map is the one that the layer attends by, the mass is that of the full softmax; bad input."""

import json

import pytest
import torch
from wan_models import save_pipeline

from slagen.attention import registry
from slagen.attention.block_maps import BlockMap
from slagen.attention.protocol import Grid, Inputs, Layer, StepContext
from slagen.attention.sla.block_map import CRITICAL
from slagen.cli.main import run as command
from slagen.generation.config import GenerateConfig
from slagen.maps.config import MapConfig
from slagen.maps.mass import best_curve, block_mass, query_weights, summarise
from slagen.maps.run import draw

GRID = Grid(5, 6, 7)  # ragged in every direction
CASES = [
    ("sparse", {"sparsity": 0.7, "block_m": 16, "block_n": 16}),
    ("sparse", {"order": "cube", "block_m": 16, "block_n": 32}),
    ("sparse", {"selector": "subblock", "block_m": 32, "block_n": 16}),
    ("sparse", {"selector": "random", "block_n": 16}),
    ("mean", {"sparsity": 0.7, "block_m": 16, "block_n": 16, "order": "cube"}), ("sol", {"block_m": 16, "block_n": 16}),
    ("vsa", {"sparsity": 0.6}), ("nabla", {"top_p": 0.5, "sliding_tile": "none"}),
    ("radial", {"block_m": 16, "block_n": 16}), ("sla2", {"sparsity": 0.7, "block_m": 16, "block_n": 16}),
]  # fmt: skip


def built(name, options):
    method = registry.get(name)
    context = StepContext()
    context.begin_pass(GRID)
    module = method.build(method.config(**options), Layer(1, 3, 2, 16), method.backends[0].name, None)
    if hasattr(module, "begin_pass"):
        module.begin_pass(context)
    return module, Inputs(Layer(1, 3, 2, 16), context)


def draws(seed=0, heads=2):
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(3, 1, heads, GRID.num_tokens, 16, generator=generator)).unbind()


@pytest.mark.parametrize(("name", "options"), CASES)
@torch.no_grad()
def test_the_map_is_what_the_layer_attends_by(name, options):
    """A key outside the map changes nothing of a sparse method's output, and of those inside each one does."""
    module, inputs = built(name, options)
    q, k, v = draws()
    found = module.kept_blocks(q, k, inputs)
    kept = (found.classes == CRITICAL)[:, :, found.query_blocks][..., found.key_blocks]
    assert kept.shape == (1, 2, GRID.num_tokens, GRID.num_tokens) and kept.any(-1).all() and not kept.all()
    if name in ("mean", "sol", "sla2"):  # what is not exact enters in another way: the density is what they count
        if hasattr(module, "take_density"):
            module(q, k, v, inputs)
            assert module.take_density() == pytest.approx(kept.double().mean().item())
        return
    weights = (q.double() @ k.double().mT * 16**-0.5).masked_fill(~kept, -torch.inf).softmax(-1)
    assert (module(q, k, v, inputs) - weights @ v.double()).abs().max() < 1e-5


def test_mass_of_blocks_against_the_whole_softmax():
    q, k, _ = draws(1)
    module, inputs = built("sparse", {"order": "cube", "block_m": 16, "block_n": 32, "sparsity": 0.5})
    found = module.kept_blocks(q, k, inputs)
    weights = (q[0, 1].double() @ k[0, 1].double().mT / 4).softmax(-1)
    members = torch.nn.functional.one_hot(found.key_blocks).double()
    rows = torch.nn.functional.one_hot(found.query_blocks).double()
    expected = (rows.mT @ weights @ members) / rows.sum(0)[:, None]
    mass = block_mass(q[0, 1], k[0, 1], found.query_blocks, found.key_blocks)
    assert (mass - expected).abs().max() < 1e-6 and (mass.sum(1) - 1).abs().max() < 1e-5
    numbers = summarise(mass, found, 1)
    kept = (found.classes[0, 1] == CRITICAL)[found.query_blocks][:, found.key_blocks]
    assert numbers["kept_mass"] == pytest.approx((weights * kept).sum(1).mean().item(), abs=1e-6)
    assert numbers["density"] == pytest.approx(kept.double().mean().item())
    assert numbers["kept_mass"] <= numbers["best_mass"] <= 1
    curve = best_curve(mass, found.query_blocks)
    assert curve[0] == 0 and curve[-1] == pytest.approx(1) and (curve.diff() >= 0).all()
    assert (query_weights(q[0, 1], k[0, 1], 9) - weights[9]).abs().max() < 1e-6


def test_mass_that_is_known():
    """All of a query's softmax on one key: the block that holds it has it all."""
    k = torch.eye(32)[:, :16] * 100
    k[16:] = 0
    q = 100 * torch.eye(32, 16)
    blocks = torch.arange(32) // 8
    mass = block_mass(q[:16], k, torch.arange(16) // 8, blocks)
    assert torch.allclose(mass, torch.eye(2, 4))
    found = BlockMap(torch.tensor([[[[1, 0, 0, 0], [0, 0, 1, 0]]]], dtype=torch.int8), torch.arange(16) // 8, blocks)
    assert summarise(mass, found, 0) == pytest.approx({"density": 0.25, "kept_mass": 0.5, "best_mass": 1.0})


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return str(save_pipeline(tmp_path_factory.mktemp("toy") / "pipe", num_heads=2, head_dim=16))


def config(toy, folder, where=None, **changes):
    base = {"prompt": "a red circle", "width": 128, "height": 128, "num_frames": 9, "steps": 3, "seed": 3,
            "device": "cpu", "model": toy, "attention": "mean", "block_m": 16, "block_n": 16}  # fmt: skip
    return MapConfig(GenerateConfig(**{**base, **changes}), output=str(folder / "out"), **(where or {}))


def test_a_picture_and_its_numbers(toy, tmp_path):
    result = draw(config(toy, tmp_path, {"layer": -1, "head": 1, "step": 2, "query": (2, 0, 7)}))
    assert (result.layer, result.head, result.step, result.query, result.blocks) == (1, 1, 2, (2, 0, 7), (12, 12))
    assert result.picture.read_bytes().startswith(b"\x89PNG")
    found = json.loads(result.path.read_text())
    assert found == json.loads(json.dumps(result.to_dict())) and found["kind"] == "attention map"
    assert 0 < result.kept_mass <= result.best_mass <= 1 and 0 < result.query_kept_mass < 1
    again = draw(config(toy, tmp_path / "again", {"layer": 1, "head": -1, "step": -1, "query": (2, 0, 7)}))
    assert again.kept_mass == result.kept_mass
    elsewhere = draw(config(toy, tmp_path, {"layer": 0, "head": 1, "step": 2, "query": (2, 0, 7)}))
    assert elsewhere.kept_mass != result.kept_mass


@pytest.mark.parametrize(
    ("where", "changes", "message"),
    [
        (["--layer", "2"], [], "layer is 2, but must be from 0 to 1"),
        (["--head", "-3"], [], "head is -3, but must be from 0 to 1"),
        (["--step", "3"], [], "step is 3, but must be from 0 to 2"),
        (["--query", "3,0,0"], [], "query is 3,0,0, but the tokens of this clip run from 0,0,0 to 2,7,7"),
        (["--query", "1,2"], [], "query is '1,2', but must be three numbers: a latent frame"),
        ([], ["--attention", "dense"], "dense attention does not select key blocks"),
        (["-o", "x.jpg"], [], "the output is 'x.jpg', but must be a folder, or a file that ends in .png"),
    ],
)
def test_bad_input_is_one_message(where, changes, message, toy, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    line = ["attention", "a red circle", "--model", toy, "--device", "cpu", "--size", "128x128", "--num-frames", "9",
            "--steps", "3", "--attention", "mean", *where, *changes]  # fmt: skip
    assert command(line) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")
    assert not list(tmp_path.rglob("*.png"))
