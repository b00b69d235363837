"""Delta attention: one exact query row of every N corrects a sparse method, whichever it is."""

import functools
import json
import math
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from compiling import compile_blocks, denoise
from numerics import Product, Rounded, Rounding, assert_within_budget_of, make_qkv, results, strided
from torch.autograd import gradcheck
from wan_models import build_pipeline, save_pipeline

import slagen
from slagen.attention import registry
from slagen.attention.delta.correction import corrected
from slagen.attention.delta.method import exact_share, with_delta
from slagen.attention.delta.reference import reference_correction
from slagen.attention.mean.config import SolConfig
from slagen.attention.policy import DensePart
from slagen.attention.protocol import Grid
from slagen.attention.sla.config import SLAConfig
from slagen.benchmark.config import BenchConfig
from slagen.benchmark.methods import Setting
from slagen.benchmark.registry import all_methods
from slagen.benchmark.run import bench
from slagen.benchmark.tables import short_cells
from slagen.cli.main import run as slagen_command
from slagen.generation.config import GenerateConfig
from slagen.generation.estimate import plan
from slagen.generation.generate import generate
from slagen.generation.prompts import read_prompts
from slagen.generation.replay import replay
from slagen.generation.report import density_section
from slagen.generation.resolve import make_plan
from slagen.generation.session import Session
from slagen.wan.processor import install, install_method, processors

SPARSE = [method for method in registry.METHODS.values() if method.family != "dense"]
SHAPES = [(1, 2, 150, 16), (2, 1, 64, 8), (1, 1, 1, 8), (1, 1, 65, 8)]
NAMES = ("o", "do", "dq", "dk", "dv")


def shape_name(shape):
    return "x".join(map(str, shape))


def draw(shape, dtype=torch.float64):
    """A sparse output, q, k and v, and the gradient of the corrected output."""
    return [make_qkv(shape, dtype, seed=1)[0], *make_qkv(shape, dtype)], make_qkv(shape, dtype, seed=2)[0]


@pytest.mark.parametrize("correct", [corrected, reference_correction], ids=["torch", "reference"])
def test_agrees_with_loops_over_rows(correct):
    (o, q, k, v), _ = draw((1, 1, 23, 4))
    rows = []
    for t in range(23):
        first = t - t % 5
        p = np.exp(k[0, 0].numpy() @ q[0, 0, first].numpy() / 2)
        rows.append(o[0, 0, t].numpy() + p @ v[0, 0].numpy() / p.sum() - o[0, 0, first].numpy())
    np.testing.assert_allclose(correct(o, q, k, v, 5)[0, 0].numpy(), np.stack(rows), rtol=0, atol=1e-12)


@pytest.mark.parametrize("stride", [1, 7, 64, 1000])
@pytest.mark.parametrize("shape", SHAPES, ids=shape_name)
def test_torch_equals_reference(shape, stride):
    """Forward and all gradients, strided views as Wan hands them over included, agree to rounding in float64."""
    inputs, do = draw(shape)
    expected = results(lambda *x: reference_correction(*x, stride), inputs, do)
    actual = results(lambda *x: corrected(*x, stride), [strided(x) for x in inputs], do)
    for name, a, e in zip(NAMES, actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")


def test_gradcheck():
    (inputs, _) = draw((1, 1, 9, 2))
    assert gradcheck(lambda *x: corrected(*x, 4), [x.requires_grad_() for x in inputs], fast_mode=True)


def plain(inputs, stride, rounding):
    """The reference's maths, every result and every gradient of one rounded; inputs and o lead with the draws."""
    o, q, k, v = inputs

    def rounded(x):
        return Rounded.apply(x, rounding)

    s = rounded(Product.apply(q, k.mT, rounding, True, None) * q.shape[-1] ** -0.5)
    shift = s.detach().amax(-1, keepdim=True)
    p = rounded(rounding.single(s - shift).exp())
    sums = Product.apply(p, torch.cat([v, torch.ones_like(v[..., :1])], -1), rounding, True, shift)
    exact = rounded(sums[..., :-1] / sums[..., -1:])
    first = torch.arange(q.shape[-2]) // stride * stride
    return rounded(o + rounded(exact - o)[..., first, :])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_within_the_budget(dtype):
    inputs, do = draw((1, 2, 150, 16), dtype)
    reference = functools.partial(reference_correction, stride=64)
    drawn = functools.partial(plain, stride=64, rounding=Rounding(dtype))
    actual = results(lambda *x: corrected(*x, 64), inputs, do)
    assert_within_budget_of(reference, lambda *x: drawn(x), actual, inputs, do, NAMES)


@pytest.mark.parametrize("method", SPARSE, ids=lambda method: method.name)
def test_every_row_exact_is_dense_attention(method):
    """Bit for bit, whatever the sparse method makes of the rest; and its reference and density say so."""
    grid = Grid(2, 5, 7)
    wrapped, config, layer = with_delta(method, 1), method.config(), (1, 2, 70, 16)
    q, k, v = make_qkv(layer, torch.float32)
    dense = F.scaled_dot_product_attention(q, k, v)
    assert torch.equal(corrected(torch.randn_like(q), q, k, v, 1), dense)
    assert wrapped.density(config, grid) == 1 and wrapped.delta == 1 and wrapped.describe(config, grid)["delta"] == 1
    learns = any(group.used for group in method.parameters) and method.name != "vsa"
    if not learns and method.memory is None:
        assert torch.equal(slagen.attend(method.name, q, k, v, grid=grid, delta=1), dense)
    assert pickle.loads(pickle.dumps(wrapped)).delta == 1 and pickle.loads(pickle.dumps(method)) is method


def test_a_stride_beyond_the_sequence_is_one_block():
    """Its rows were made before they were cut off, so that a large number took all memory."""
    q, k, v = make_qkv((1, 2, 20, 8))
    found = slagen.attend("sol", q, k, v, delta=10**12)
    torch.testing.assert_close(found, slagen.attend("sol", q, k, v, delta=20))


def test_some_rows_exact():
    """Others are the sparse method's, moved by its error at the first row of their block."""
    q, k, v = make_qkv((1, 2, 150, 16))
    sparse, dense = slagen.attend("sol", q, k, v, tau=3), F.scaled_dot_product_attention(q, k, v)
    o = slagen.attend("sol", q, k, v, tau=3, delta=64)
    torch.testing.assert_close(o[:, :, [0, 64, 128]], dense[:, :, [0, 64, 128]])
    torch.testing.assert_close(o[:, :, 100] - sparse[:, :, 100], (dense - sparse)[:, :, 64])
    assert exact_share(150, 64) == 3 / 150 and exact_share(150, None) == 0 and exact_share(64, 64) == 1 / 64


def settings(model, tmp_path, **changes):
    return GenerateConfig(
        **{"prompt": "a red circle", "model": str(model), "width": 64, "height": 64, "num_frames": 9, "steps": 2,
           "seed": 1, "guidance_scale": 3.0, "dtype": "fp32", "device": "cpu", "block_m": 16, "block_n": 16,
           "attention": "sol", "output": str(tmp_path / "a.mp4"), "overwrite": True, **changes}
    )  # fmt: skip


def test_videos_and_reports(tmp_path):
    model = save_pipeline(tmp_path / "model")

    def made(**changes):
        return generate(settings(model, tmp_path, **changes)).videos[0].report

    whole, dense, some = made(delta=1), made(attention="dense", block_m=None, block_n=None), made(delta=16)
    assert whole["latents_hash"] == dense["latents_hash"] != some["latents_hash"]
    assert "delta" not in dense["settings"] and "delta" not in dense["attention"]
    assert some["settings"]["delta"] == some["attention"]["delta"] == 16 and whole["attention"]["density"] == 1
    assert 1 / 16 < some["attention"]["density"] < 1
    tflop = {name: each["cost"]["attention_tflop"] for name, each in (("whole", whole), ("some", some))}
    assert tflop["whole"] - tflop["some"] == pytest.approx(dense["cost"]["attention_tflop"] * 15 / 16, rel=0.1)
    assert replay(str(tmp_path / "a.json")).same


def test_the_density_counts_exact_rows(tmp_path):
    part = DensePart((0,), (1,), 4, 3)
    assert density_section([0.2, None, None], part)["layer_densities"] == [0.2 + 0.25 * 0.8, 1.0, None]
    counted = density_section([0.2, None, None], part, 0.5)["layer_densities"]
    assert counted[0] == pytest.approx(1 - 0.8 * 0.75 * 0.5) and counted[1:] == [1.0, None]


def test_plans():
    def told(**changes):
        none = {"dense_steps": "0%", "dense_layers": "0%"}  # which the preset recommends
        return plan(GenerateConfig("a", model="wan2.1-t2v-1.3b", attention="sol", **{**none, **changes}))

    sol, some = told(), told(delta=64)
    assert some.flops.sla_attention - sol.flops.sla_attention == pytest.approx(
        some.flops.dense_attention / 64, rel=1e-3
    )
    assert some.kept_fraction == pytest.approx(sol.kept_fraction + (1 - sol.kept_fraction) * 512 / 32760)
    assert some.settings["delta"] == 64 and "delta" not in sol.settings
    assert any(note.endswith("; delta 64 -> 512 of 32760 query rows computed exactly") for note in some.notes)
    half = told(delta=64, dense_steps="50%")
    assert half.kept_fraction == pytest.approx((1 + some.kept_fraction) / 2)


def test_keys():
    def made(**changes):
        return make_plan(GenerateConfig("a", seed=1, model="tiny-wan", device="cpu", **changes))

    assert made(delta=8).settings == {**made().settings, "delta": 8}
    assert made(delta=8).attention_flops() > made().attention_flops()


def test_a_prompt_file_and_a_session_take_it(tmp_path):
    """The videos of a batch share a model in memory, whatever each is corrected by."""
    file = tmp_path / "p.txt"
    file.write_text("a --delta 16")
    assert read_prompts(str(file))[0].fields == {"delta": 16}
    model = save_pipeline(tmp_path / "model")
    plans = [make_plan(settings(model, tmp_path, delta=delta)) for delta in (None, 16)]
    session = Session(plans[0])
    embeds = session.encode(plans[0])
    latents = [session.denoise(each, embeds, lambda event: None)[0] for each in (*plans, plans[0])]
    assert torch.equal(latents[0], latents[2]) and not torch.equal(latents[0], latents[1])


@pytest.mark.slow
def test_bench():
    size = {"lengths": (), "seconds": 0.001, "device": "cpu", "sparsities": (0.5,)}
    mean, sdpa = bench(BenchConfig(shapes=("1x1x64x16",), methods=("mean", "sdpa"), delta=16, **size)).rows
    assert mean.correct and (mean.delta, sdpa.delta) == (16, None) and mean.to_dict()["delta"] == 16
    assert short_cells(mean)[0] == "mean, delta 16"


def test_bench_compares_with_its_reference():
    """The check of bench sees an error of the correction."""
    contender = next(each for each in all_methods(16) if each.name == "mean")
    setting = Setting(SLAConfig(0.5), torch.zeros(8, 8), torch.zeros(8), "auto", torch.device("cpu"), torch.float64)
    q, k, v = make_qkv((1, 1, 150, 8))
    o, exact = contender.make(setting)(q, k, v), contender.exact(setting, q, k, v)
    torch.testing.assert_close(o, exact)
    assert (o - slagen.attend("mean", q, k, v, sparsity=0.5)).abs().max() > 0.01


@pytest.mark.slow
def test_steps_compile_nothing_anew():
    """And a block stays one graph."""
    pipe, counts = build_pipeline(), []
    install_method(pipe.transformer, with_delta(registry.get("sol"), 16), SolConfig(block_m=16, block_n=16))
    graphs = compile_blocks(pipe.transformer)
    for steps in (1, 3):
        denoise(pipe, steps)
        counts.append(len(graphs))
    assert counts == [1, 1]


def test_one_exact_row_of_every_one_is_dense_in_a_model():
    dense, whole = build_pipeline(), build_pipeline()
    install(dense.transformer, None)
    install_method(whole.transformer, with_delta(registry.get("sol"), 1), SolConfig(block_m=16, block_n=16))
    assert processors(whole.transformer)[0].method.delta == 1
    assert torch.equal(denoise(whole, 2), denoise(dense, 2))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["generate", "a", "--delta", "0"], "delta is 0, but must be a whole number of at least 1. Try --delta 64."),
        (["plan", "--attention", "dense", "--delta", "64"], "--delta are not for dense attention. Leave"),
        (["bench", "--method", "sdpa", "--delta", "64"], "--delta is for slagen's sparse methods, and none of them"),
        (["bench", "--delta", "-1"], "delta is -1, but must be a whole number of at least 1"),
        (["finetune", "--delta", "64", "--data", "x"], "No such option: --delta"),
        (["generate", "a", "--attention", "delta"], "--attention is 'delta', but must be one of"),
    ],
    ids=" ".join,
)
def test_one_line_says_what_is_wrong(arguments, said, capsys):
    assert slagen_command(arguments) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_the_command_line_lists_and_runs_it(tmp_path, capsys):
    assert slagen_command(["methods", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["delta"]["kind"] == "wrapper" and rows["delta"]["options"] == {"delta": None}
    assert {row["kind"] for name, row in rows.items() if name in registry.METHODS} == {"method"}
    assert slagen_command(["methods"]) == 0
    assert "a wrapper --delta: Correct any sparse method" in " ".join(capsys.readouterr().out.split())
    arguments = ["--model", str(save_pipeline(tmp_path / "model")), "--size", "64x64", "--num-frames", "9"]
    arguments += ["--steps", "1", "--seed", "1", "--device", "cpu", "--output", str(tmp_path / "a.mp4")]
    arguments += ["--attention", "mean", "--block-n", "16", "--delta", "16", "--verbose"]
    assert slagen_command(["generate", "a", *arguments]) == 0
    told = " ".join(capsys.readouterr().err.split())
    assert "delta 16 -> 3 of 48 query rows computed exactly" in told
    assert "one query row in 16 attended exactly (delta)" in told
    assert math.isclose(json.loads((tmp_path / "a.json").read_text())["attention"]["delta"], 16)
