"""`mean` and `sol` as methods: options, cost, notes, and videos of the base model's own weights."""

import dataclasses
import json
import math

import pytest
import torch
from compiling import compile_blocks
from numerics import make_qkv
from wan_models import build_transformer, save_pipeline

from slagen.attention import registry
from slagen.attention.cost import ModelShape, dense_attention_flops
from slagen.attention.mean.config import MeanConfig, SolConfig
from slagen.attention.mean.selection import kept_blocks
from slagen.attention.protocol import Grid
from slagen.cli.main import run as slagen
from slagen.errors import UsageError, WeightsError
from slagen.formats.sla import weights_hash
from slagen.generation import replay as replaying
from slagen.generation.config import GenerateConfig
from slagen.generation.estimate import plan
from slagen.generation.generate import generate
from slagen.generation.resolve import make_plan
from slagen.generation.session import Session
from slagen.generation.stage_clock import StageClock
from slagen.wan.observe import take_densities
from slagen.wan.processor import install_method, processors, remove

MEAN, SOL = registry.get("mean"), registry.get("sol")
SHAPE = ModelShape(num_layers=2, num_heads=3, head_dim=16, ffn_dim=64, text_tokens=8)


def test_registered_without_needs():
    for method in (MEAN, SOL):
        about = method.to_dict()
        assert not (about["needs_training"] or about["needs_weights"] or about["needs_gpu"])
        assert about["backends"] == ["auto", "reference", "torch", "triton"]
    assert SOL.to_dict()["options"] == {"block_m": 64, "block_n": 64, "order": "raster", "tau": 1.0}
    assert "--tau" in SOL.to_dict()["flags"]


@pytest.mark.parametrize(
    ("config", "fields", "said"),
    [
        (MeanConfig, {"sparsity": 1.0}, "sparsity is 1.0, but must be a number of at least 0 and below 1"),
        (MeanConfig, {"block_m": 48}, "block_m is 48, but must be one of 16, 32, 64, 128"),
        (SolConfig, {"tau": math.nan}, "tau is nan, but must be a finite number. Try --tau 1."),
        (SolConfig, {"tau": 10**400}, "tau is 1000"),
        (SolConfig, {"tau": True}, "tau is True, but must be a finite number"),
        (SolConfig, {"block_n": 7}, "block_n is 7, but must be one of"),
    ],
)
def test_what_is_out_of_range(config, fields, said):
    with pytest.raises(UsageError, match=said):
        config(**fields)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--attention", "mean", "--tau", "1"], "tau is not an option of mean attention"),
        (["--attention", "sol", "--sparsity", "0.9"], "sparsity is not an option of sol attention"),
        (["--tau", "1"], "give --attention sol."),
        (["--attention", "sol", "--backend", "sdpa"], "backend is 'sdpa', but must be one of auto, reference"),
        (["--attention", "sol", "--tau", "inf"], "tau is inf, but must be a finite number"),
    ],
)
def test_what_generate_refuses(arguments, said, capsys):
    assert slagen(["generate", "x", *arguments]) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_cost_of_the_parts():
    """Scores of blocks, kept blocks and 4 L N D for the means, of every head and layer."""
    grid, heads = Grid(2, 10, 16), 2 * 3
    config = MeanConfig(sparsity=0.9, block_m=16, block_n=16)  # 2 of 20 blocks
    expected = (2 * 20 * 20 + 4 * 320 * 32 + 4 * 320 * 20) * 16 * heads
    assert MEAN.cost(config, SHAPE, grid) == expected
    assert MEAN.density(config, grid) == 0.1
    whole = MeanConfig(sparsity=0.0, block_m=16, block_n=16)
    assert MEAN.cost(whole, SHAPE, grid) == dense_attention_flops(SHAPE, 320) + (800 + 4 * 320 * 20) * 16 * heads
    # Every row keeps 3 blocks, the first and last 2, and of the rest one in two.
    half = SolConfig(tau=0.0, block_m=16, block_n=16)
    forced = (18 * 3 + 2 * 2) / 400
    assert SOL.density(half, grid) == pytest.approx(forced + (1 - forced) / 2)
    sparse = SolConfig(tau=40.0, block_m=16, block_n=16)
    assert SOL.cost(sparse, SHAPE, grid) == round((800 + 4 * 320 * 320 * forced + 4 * 320 * 20) * 16) * heads


def test_expected_density_is_that_of_bell_shaped_scores():
    q, k, _ = make_qkv((2, 4, 64 * 16, 32))
    for tau in (0.5, 1.0, 1.5):
        config = SolConfig(tau=tau, block_m=16, block_n=16)
        measured = kept_blocks(q, k, config).double().mean().item()
        assert measured == pytest.approx(SOL.density(config, Grid.flat(1024)), abs=0.02)


def test_notes_and_what_applies():
    grid = Grid(21, 30, 52)
    assert SOL.note(SolConfig(), {}, grid) == (
        "tau 1 -> about 16% of key blocks, or 16% including those around each query block (estimates; the report has "
        "the measured fraction)"
    )
    assert MEAN.note(MeanConfig(), {}, grid) == "sparsity 0.85 -> 76 of 512 key blocks per query block"
    assert SOL.describe(SolConfig(), grid)["key_blocks"] == 512
    assert [SOL.applies(SolConfig(), Grid.flat(n)) for n in (64, 128, 129)] == [False, False, True]
    assert [MEAN.applies(MeanConfig(), Grid.flat(n)) for n in (64, 65)] == [False, True]
    assert SOL.applies(SolConfig(block_m=128), Grid.flat(192))  # the first row keeps all, the last does not


# In a model


@pytest.mark.parametrize("name", ["mean", "sol"])
def test_all_blocks_kept_is_the_base_model(name):
    config = {"mean": MeanConfig(sparsity=0.0), "sol": SolConfig(tau=-1e9)}[name]
    config = dataclasses.replace(config, block_m=16, block_n=16)
    model = build_transformer()
    inputs = (
        torch.randn(1, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0)),
        torch.ones(1),
        torch.zeros(1, 8, 32),
    )
    with torch.no_grad():
        dense, before = model(*inputs)[0], weights_hash(model)
        install_method(model, registry.get(name), config)
        assert weights_hash(model) == before  # nothing of it is a weight
        assert take_densities(model) == [None, None]
        torch.testing.assert_close(model(*inputs)[0], dense)
        assert take_densities(model) == [1.0, 1.0]
        for processor in processors(model):
            processor.config = {"mean": MeanConfig(sparsity=0.67), "sol": SolConfig(tau=9.0)}[name]
            processor.config = dataclasses.replace(processor.config, block_m=16, block_n=16)
        assert not torch.allclose(model(*inputs)[0], dense)
    # 48 tokens are 3 blocks: one of them in each row, or all but the two corners.
    assert take_densities(model) == pytest.approx([{"mean": 1 / 3, "sol": 7 / 9}[name]] * 2)
    remove(model)
    assert take_densities(model) == [None, None]


def test_density_counts_pairs_of_tokens():
    """50 tokens in blocks of 16: the last block has 2, and the corner pairs of blocks are left out."""
    from slagen.attention.mean.layer import BlockMeanAttention

    layer = BlockMeanAttention(SolConfig(tau=99.0, block_m=16, block_n=16)).to(torch.bfloat16)
    for _ in range(2):
        layer(*make_qkv((2, 1, 50, 8), torch.bfloat16))
    left_out = 2 * (16 * 16 + 2 * (16 * 2))  # (0, 2), (0, 3), (1, 3) and the same mirrored
    assert layer.take_density() == 1 - left_out / 2500
    assert layer.take_density() is None


def test_compiles_whole_and_once():
    """Counting pairs, selecting and attending leave one graph, which all layers, steps and clips share."""
    model = build_transformer(num_layers=3)
    install_method(model, SOL, SolConfig(block_m=16, block_n=16))
    inputs = torch.zeros(1, 4, 3, 8, 8), torch.zeros(1), torch.zeros(1, 8, 32)
    graphs = compile_blocks(model)
    with torch.no_grad():
        for _ in range(2):
            model(*inputs)
    assert len(graphs) == 1
    assert None not in take_densities(model)


def settings(model, output, **changes):
    return GenerateConfig(
        **{"prompt": "a red circle", "model": str(model), "width": 64, "height": 64, "num_frames": 9, "steps": 2,
           "seed": 1, "guidance_scale": 3.0, "dtype": "fp32", "device": "cpu", "block_m": 16, "block_n": 16,
           "output": str(output), **changes}
    )  # fmt: skip


@pytest.mark.parametrize("name", ["mean", "sol"])
def test_the_report_has_the_density_really_used(name, tmp_path):
    model = save_pipeline(tmp_path / "model")
    own = {"mean": {"sparsity": 0.6}, "sol": {"attention_options": (("tau", 0.3),)}}[name]
    made = generate(settings(model, tmp_path / "a.mp4", attention=name, **own)).videos[0].report["attention"]
    assert made["mode"] == name and made["backend"] == "torch" and made["key_blocks"] == 3
    assert len(made["layer_densities"]) == 2
    assert made["density"] == pytest.approx(sum(made["layer_densities"]) / 2)
    low = {"mean": 1 / 3, "sol": 7 / 9}[name]
    assert low <= made["density"] <= 1
    if name == "mean":
        assert made["density"] == pytest.approx(made["expected_density"])


def test_flops_are_those_of_the_measured_density(tmp_path):
    """`sol` only estimates beforehand what it keeps; the report's FLOPs go with the density beside them."""
    config = settings(save_pipeline(tmp_path / "model"), tmp_path / "a.mp4", attention="sol")
    report = generate(config).videos[0].report
    about, cost, made = report["attention"], report["cost"], make_plan(config)
    estimated = made.attention_flops() / dense_attention_flops(made.weights.source.shape, made.num_tokens)
    assert about["density"] != pytest.approx(about["expected_density"])
    expected = estimated + about["density"] - about["expected_density"]
    assert cost["attention_tflop"] / cost["dense_attention_tflop"] == pytest.approx(expected, rel=1e-6)


def test_the_density_counts_what_ran_dense(tmp_path):
    model = save_pipeline(tmp_path / "model")
    parts = {"dense_steps": "0", "dense_layers": "1"}
    config = settings(model, tmp_path / "a.mp4", attention="mean", sparsity=0.6, **parts)
    made = generate(config).videos[0].report["attention"]
    assert made["layer_densities"] == pytest.approx([(1 + 1 / 3) / 2, 1])  # 1 of 3 blocks, in one of two steps
    assert made["density"] == pytest.approx((2 / 3 + 1) / 2)


def test_a_clip_that_failed_counts_in_no_density(tmp_path):
    """The failed one keeps all blocks; the next in the same session keeps 1 of 3."""
    config = settings(save_pipeline(tmp_path / "model"), tmp_path / "a.mp4", attention="mean", sparsity=0.0)
    failing, plan = (make_plan(dataclasses.replace(config, sparsity=sparsity)) for sparsity in (0.0, 0.6))
    session = Session(failing)

    def fail(event):
        if event.kind == "step":
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        session.sample(failing, session.encode(failing), StageClock(), fail)
    found = session.sample(plan, session.encode(plan), StageClock(), lambda event: None)
    assert found.denoised.densities == pytest.approx([1 / 3, 1 / 3])


def test_sla_of_weights_without_it_offers_sol(tmp_path, capsys):
    model = save_pipeline(tmp_path / "model")
    with pytest.raises(WeightsError, match="Use --attention sol, which needs no training"):
        generate(GenerateConfig("x", model=str(model), device="cpu", output=str(tmp_path / "a.mp4")))
    assert slagen(["models", "--json"]) == 0
    rows = {row["name"]: row["recommended_attention"] for row in json.loads(capsys.readouterr().out)}
    assert {name for name, method in rows.items() if method == "sol"} == {"wan2.1-t2v-1.3b", "wan2.1-t2v-14b"}
    assert slagen(["models"]) == 0
    assert capsys.readouterr().out.count("recommended: --attention sol, which needs no training") == 2


def test_plan_says_that_the_density_is_an_estimate():
    none = {"dense_steps": "0%", "dense_layers": "0%"}
    content = plan(GenerateConfig("a", model="wan2.1-t2v-1.3b", attention="sol", **none))
    assert content.flops_of == "sol" and content.key_blocks == 512
    assert content.kept_fraction == pytest.approx(0.163, abs=1e-3)
    assert any("tau 1 -> about 16% of key blocks" in text and "estimates" in text for text in content.notes)
    assert 5 < content.flops.dense_attention / content.flops.sla_attention < 6


@pytest.mark.parametrize(
    ("changes", "steps", "layers", "said"),
    [
        ({}, list(range(10)), [0], "20% and --dense-layers 0, as recommended for wan2.1-t2v-14b with sol"),
        ({"tau": 1.3}, list(range(10)), [0], "using --dense-steps 20% and --dense-layers 0"),
        (
            {"dense_steps": "0-1"},
            [0, 1],
            [0],
            "note: using --dense-layers 0, as recommended for wan2.1-t2v-14b with sol",
        ),
        ({"dense_steps": "0%", "dense_layers": "-1"}, None, [39], None),
        ({"attention": "mean"}, None, None, None),
        ({"model": "turbowan2.1-t2v-14b-480p"}, None, None, None),
    ],
    ids=["alone", "tau", "steps", "both", "another-method", "another-preset"],
)
def test_stock_presets_run_sol_with_dense_steps_and_a_dense_layer(changes, steps, layers, said):
    """As in the paper's figures, unless others are given."""
    tau = {"attention_options": (("tau", changes["tau"]),)} if "tau" in changes else {}
    fields = {"model": "wan2.1-t2v-14b", "attention": "sol", **changes, **tau}
    fields.pop("tau", None)
    content = plan(GenerateConfig("a", **fields))
    assert (content.settings.get("dense_steps"), content.settings.get("dense_layers")) == (steps, layers)
    notes = [f"note: {note}" for note in content.notes]
    assert any(said in note for note in notes) if said else not any("recommends" in note for note in notes)
    if not changes:  # 20 % of the steps, and of the others 1 layer of 40
        sparse = SOL.density(SolConfig(), Grid(21, 45, 80))
        assert content.kept_fraction == pytest.approx(1 - 0.8 * 39 / 40 * (1 - sparse))


def test_a_replay_does_not_take_what_a_preset_recommends_since(tmp_path, monkeypatch):
    config = settings(save_pipeline(tmp_path / "model"), tmp_path / "a.mp4", attention="sol")
    generate(config)
    file = tmp_path / "a.json"
    report = json.loads(file.read_text())
    ran = []
    monkeypatch.setattr(replaying, "generate", lambda config, on_event: ran.append(config) or stop())

    def stop():
        raise KeyError("stopped")

    for told in ({}, {"dense_steps": "20%", "dense_layers": "0"}):
        report["settings"].update(model="wan2.1-t2v-1.3b", **told)
        file.write_text(json.dumps(report))
        with pytest.raises(UsageError, match="stopped"):
            replaying.replay(str(file))
    assert [(c.dense_steps, c.dense_layers) for c in ran] == [("0%", "0%"), ("20%", "0")]


@pytest.mark.slow
def test_the_bundled_model_runs_with_its_dense_weights(tmp_path, capsys):
    """Its folder has weights tuned for SLA, which spoil any other attention: they stay where they are."""
    command = ["generate", "a red circle moving right", "--steps", "1", "--seed", "1", "--device", "cpu", "--json",
               "--no-cache"]  # fmt: skip
    reports = {}
    for name, *options in (["sol"], ["mean", "--sparsity", "0.8"], ["dense"]):
        output = tmp_path / f"{name}.mp4"
        assert slagen([*command, "--attention", name, *options, "--output", str(output)]) == 0
        reports[name] = json.loads(capsys.readouterr().out)
    dense = reports.pop("dense")
    for name, made in reports.items():
        assert made["weights"] == dense["weights"] and made["weights"]["sla_hash"] is None
        assert made["attention"]["mode"] == made["settings"]["attention"] == name
        assert 0.15 < made["attention"]["density"] < 1
        assert made["latents_hash"] != dense["latents_hash"]
