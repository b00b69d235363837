"""Re-ttention: its window, what it remembers and for how long, and what it says of its memory."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from compiling import compile_blocks, denoise
from numerics import DRAWS, Product, Rounded, Rounding, assert_no_worse, make_qkv, strided
from wan_models import build_pipeline, build_transformer, save_pipeline

import slagen
from slagen.attention import registry
from slagen.attention.cost import ModelShape
from slagen.attention.delta.method import with_delta
from slagen.attention.policy import DensePart, Remembered
from slagen.attention.protocol import Grid, Inputs, Layer, StepContext
from slagen.attention.rettention import reference, windowed
from slagen.attention.rettention.config import RettentionConfig
from slagen.attention.rettention.layer import Rettention
from slagen.benchmark.config import BenchConfig
from slagen.benchmark.run import bench
from slagen.cli.main import run as slagen_command
from slagen.errors import SlagenError, UsageError
from slagen.generation.config import GenerateConfig
from slagen.generation.estimate import plan
from slagen.generation.generate import check_memory
from slagen.generation.resolve import Plan, make_plan
from slagen.wan.processor import denoising, install, install_method, processors

METHOD = registry.get("rettention")
GRIDS = [Grid(3, 4, 5), Grid(1, 3, 7), Grid(4, 1, 1), Grid(2, 5, 3)]
LAYER = Layer(0, 1, 2, 8)


def name(grid):
    return f"{grid.num_frames}x{grid.height}x{grid.width}"


def draw(grid, dtype=torch.float64, seed=0):
    return make_qkv((1, 2, grid.num_tokens, 8), dtype, seed=seed)


@pytest.fixture(params=["whole", "tiny-pieces"])
def pieces(request, monkeypatch):
    """Cut short sequences, too, into the many runs of long ones."""
    if request.param != "whole":
        monkeypatch.setattr(windowed, "RUN_BYTES", 1)


@pytest.mark.parametrize("grid", GRIDS, ids=name)
def test_agrees_with_loops_over_tokens(grid):
    (q, k, v), reach, places = draw(grid), 1, grid.height * grid.width
    o, rest, ratio = windowed.dense_step(q, k, v, grid.num_frames, reach)
    o_window = windowed.window_step(q, k, v, grid.num_frames, reach)
    a, b, c = (x[0, 1].numpy() for x in (q, k, v))
    for t in range(grid.num_tokens):
        p = np.exp(b @ a[t] * 8**-0.5)
        inside = [s for s in range(grid.num_tokens) if abs(s % places - t % places) <= reach]
        kept = p[inside] @ c[inside]
        np.testing.assert_allclose(o[0, 1, t].numpy(), p @ c / p.sum(), atol=1e-12)
        np.testing.assert_allclose(ratio[0, 1, t].item(), p[inside].sum() / p.sum(), atol=1e-12)
        np.testing.assert_allclose(rest[0, 1, t].numpy(), (p @ c - kept) / p.sum(), atol=1e-12)
        np.testing.assert_allclose(o_window[0, 1, t].numpy(), kept / p[inside].sum(), atol=1e-12)


@pytest.mark.parametrize("reach", [0, 2, 50])
@pytest.mark.parametrize("grid", GRIDS, ids=name)
def test_torch_equals_reference(grid, reach, pieces):
    q, k, v = (strided(x) for x in draw(grid))
    expected = (*reference.dense_step(q, k, v, grid, reach), reference.window_step(q, k, v, grid, reach))
    frames = grid.num_frames
    actual = (*windowed.dense_step(q, k, v, frames, reach), windowed.window_step(q, k, v, frames, reach))
    for what, a, e in zip(("o", "res", "rho", "o_window"), actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12, msg=lambda m, what=what: f"{what}: {m}")
    mask = reference.window_mask(grid, reach)
    fraction = min(1.0, 2 * reach / (grid.height * grid.width))
    if RettentionConfig(window_fraction=fraction).reach(grid) == reach:
        assert RettentionConfig(window_fraction=fraction).pairs(grid) == mask.sum()


def call(module, context, memory, tensors):
    module.begin_pass(context)
    return module(*tensors, Inputs(LAYER, context, kept=memory))


def run_steps(config, grid, inputs, backend="auto", first=0):
    """The output of each step of a clip, from step `first`, with what it remembers."""
    module, memory = Rettention(config, backend), {}
    return [call(module, StepContext(first + i, 50, 1, grid), memory, x) for i, x in enumerate(inputs)], memory


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_what_steps_make_of_a_dense_one(backend):
    """Written out: dense, then three between, then dense again; and the first one is dense whatever its number."""
    grid, config = Grid(2, 3, 4), RettentionConfig(window_fraction=0.2, refresh_steps=4, ratio_growth=0.04)
    inputs = [draw(grid, seed=seed) for seed in range(6)]
    found, memory = run_steps(config, grid, inputs, backend, first=4)
    o, rest, ratio = reference.dense_step(*inputs[0], grid, 1)
    torch.testing.assert_close(found[0], F.scaled_dot_product_attention(*inputs[0]))
    torch.testing.assert_close(found[0], o)
    for j in (0, 1, 2):
        share = (ratio + j * 0.04).clamp(max=1)
        torch.testing.assert_close(found[1 + j], share * reference.window_step(*inputs[1 + j], grid, 1) + rest)
    torch.testing.assert_close(found[4], F.scaled_dot_product_attention(*inputs[4]))
    torch.testing.assert_close(memory["residual"], reference.dense_step(*inputs[4], grid, 1)[1])
    late, _ = run_steps(config, grid, inputs, backend, first=6)
    torch.testing.assert_close(late[0], found[0])
    torch.testing.assert_close(late[1], found[1])


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_a_window_of_everything_is_dense_in_every_step(backend):
    """As the ratio grows to 1 and no further."""
    grid, config = Grid(2, 3, 3), RettentionConfig(window_fraction=1.0, ratio_growth=0.5)
    for step in (lambda *x: reference.dense_step(*x, grid, 9)[0], lambda *x: reference.window_step(*x, grid, 9)):
        torch.testing.assert_close(step(*draw(grid)), F.scaled_dot_product_attention(*draw(grid)))
    narrow = Grid(4, 1, 1)  # one place: every window is everything
    inputs = [draw(narrow, seed=seed) for seed in range(4)]
    found, _ = run_steps(config, narrow, inputs, backend)
    for o, x in zip(found, inputs, strict=True):
        torch.testing.assert_close(o, F.scaled_dot_product_attention(*x))


def plain(first, second, grid, reach, rounding):
    """The step after a dense one by the reference's maths, every result of one rounded; inputs lead with the draws."""
    inside = reference.window_mask(grid, reach)

    def rounded(x):
        return Rounded.apply(x, rounding)

    def weights(q, k, mask):
        s = rounded(Product.apply(q, k.mT, rounding, True, None) * q.shape[-1] ** -0.5)
        s = s if mask is None else s.masked_fill(~mask, -torch.inf)
        return rounded(rounding.single(s - s.amax(-1, keepdim=True)).exp())

    def product(p, v):
        sums = Product.apply(p, torch.cat([v, torch.ones_like(v[..., :1])], -1), rounding, True, None)
        return sums[..., :-1], sums[..., -1:]

    p = weights(*first[:2], None)
    (top, total), (top_w, total_w) = product(p, first[2]), product(p * inside, first[2])
    rest, ratio = rounded(rounded(top / total) - rounded(top_w / total)), rounded(total_w / total)
    top, total = product(weights(*second[:2], inside), second[2])
    return rounded(rounded(ratio * rounded(top / total)) + rest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_within_the_budget(dtype):
    """Dense step and the one after it; no gradient passes through it."""
    grid, config = Grid(3, 4, 5), RettentionConfig(window_fraction=0.2)
    inputs = [draw(grid, dtype, seed=seed) for seed in (0, 1)]
    wide = [[x.double() for x in each] for each in inputs]
    exact = run_steps(config, grid, wide, "reference")[0][1]
    first, second = ([x.expand(DRAWS, *x.shape) for x in each] for each in wide)
    drawn = plain(first, second, grid, config.reach(grid), Rounding(dtype))
    actual = run_steps(config, grid, inputs)[0][1]
    assert actual.dtype == dtype
    assert_no_worse("o", actual, drawn, exact)


def test_clips_and_passes_do_not_mix():
    """The same clip twice is the same, whatever came before, and each pass of guidance has its own memory."""
    pipe = build_pipeline()
    install_method(pipe.transformer, METHOD, RettentionConfig(window_fraction=0.2))
    first = denoise(pipe, 3)
    with denoising(pipe.transformer, 2) as end_step:
        context = pipe.transformer._slagen_installation.context
        for _ in range(2):
            for seed in (3, 4):  # conditional, unconditional
                latents = torch.randn(1, 4, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
                with torch.no_grad():
                    pipe.transformer(latents, torch.zeros(1), torch.zeros(1, 8, 32))
            end_step()
        assert sorted(context.memory) == [(0, False), (0, True), (1, False), (1, True)]
        kept = [context.memory[0, conditional]["residual"] for conditional in (False, True)]
        assert not torch.equal(*kept)
    assert context.memory == {} and processors(pipe.transformer)[0].kept == {}
    assert torch.equal(denoise(pipe, 3), first)


def test_its_place_in_a_loop():
    """Outside of one it is dense attention, and of a clip whose steps all are dense it is that to the bit."""
    dense, other = build_pipeline(), build_pipeline()
    install(dense.transformer, None)
    install_method(other.transformer, METHOD, RettentionConfig(window_fraction=0.2))
    inputs = torch.ones(1, 4, 3, 8, 8), torch.zeros(1), torch.zeros(1, 8, 32)
    with torch.no_grad():
        assert torch.equal(other.transformer(*inputs)[0], dense.transformer(*inputs)[0])
    whole = DensePart((0, 1), (), 2, 2)
    assert torch.equal(denoise(other, 2, whole), denoise(dense, 2))
    assert not torch.equal(denoise(other, 2), denoise(dense, 2))
    assert processors(other.transformer)[0].take_density() is not None


@pytest.mark.slow
def test_steps_compile_two_variants():
    """Dense, and between; layers and steps add none."""
    model, counts = build_transformer(num_layers=3), []
    install_method(model, METHOD, RettentionConfig(window_fraction=0.2, refresh_steps=3))
    graphs = compile_blocks(model)
    for steps in (2, 7):
        with torch.no_grad(), denoising(model, steps) as end_step:
            for _ in range(steps):
                for _ in range(2):
                    model(torch.zeros(1, 4, 3, 8, 8), torch.zeros(1), torch.zeros(1, 8, 32))
                end_step()
        counts.append(len(graphs))
    assert counts[0] == 2 and counts[1] <= 3  # of a dense step that remembers nothing yet, and one that does


def test_cost_density_and_memory():
    grid, config = Grid(2, 4, 5), RettentionConfig(window_fraction=0.2)  # 4 of 20 places: 2 on each side
    shape = ModelShape(num_layers=3, num_heads=2, head_dim=8, ffn_dim=64, text_tokens=8)
    pairs = 4 * (20 * 5 - 2 * 3)
    assert config.reach(grid) == 2 and config.pairs(grid) == pairs == reference.window_mask(grid, 2).sum()
    assert METHOD.cost(config, shape, grid) == round((4 * 1600 + 2 * pairs + 4 * 4 * pairs) / 5) * 8 * 2 * 3
    assert METHOD.density(config, grid) == pytest.approx((1 + 4 * pairs / 1600) / 5)
    assert METHOD.memory(config, shape, grid, 2) == 3 * (40 * 2 * 8 * 2 + 40 * 2 * 4)
    assert not METHOD.applies(dataclasses.replace(config, window_fraction=1.0, refresh_steps=1), grid)
    assert not METHOD.applies(config, Grid(8, 1, 1)) and METHOD.applies(config, grid)

    def of(guidance, part, method=METHOD):
        return Remembered.of(method, config, shape, grid, 2, guidance, part).num_bytes

    assert of(5.0, DensePart((), (), 4, 3)) == 2 * of(1.0, DensePart((), (), 4, 3)) == 2 * 3 * 1600
    assert of(1.0, DensePart((), (0, 2), 4, 3)) == 1600 and of(1.0, DensePart(tuple(range(4)), (), 4, 3)) == 0
    assert of(5.0, DensePart((), (), 4, 3), registry.get("sol")) == 0
    assert of(1.0, DensePart((), (), 4, 3), with_delta(METHOD, 16)) == 3 * 1600


def test_plans_tell_of_the_memory():
    """Of Wan 1.3B at 480p about 6 GB, in plan's notes, in its memory, and in a run's first lines."""

    def told(**changes):
        return plan(GenerateConfig("a", model="wan2.1-t2v-1.3b", **{"attention": "rettention", **changes}))

    made, sol = told(), told(attention="sol")
    kept = 60 * (32760 * 1536 * 2 + 32760 * 12 * 4) / 2**30
    said = f"rettention attention keeps {kept:.1f} GiB in memory between steps (30 layers, for both guidance passes)"
    assert any(note.startswith(said) for note in made.notes) and not any("from step to" in note for note in sol.notes)
    activations = [each.memory_gib.stages["denoise"].activations for each in (made, sol)]
    assert activations[0] - activations[1] == pytest.approx(kept)
    assert made.memory_gib.cpu.denoise - sol.memory_gib.cpu.denoise == pytest.approx(kept)
    assert made.settings["dense_steps"] == list(range(15))
    own = told(dense_steps="0%", dense_layers="0-28", guidance_scale=1.0)
    assert "dense_steps" not in own.settings
    assert any("keeps 97.5 MiB in memory between steps (1 layer);" in note for note in own.notes)


def settings(**changes):
    return GenerateConfig(
        "a", **{"seed": 1, "model": "tiny-wan", "device": "cpu", "attention": "rettention", "steps": 20, **changes}
    )


def test_runs_tell_of_it_first_and_need_it(monkeypatch):
    made = make_plan(settings())
    assert made.dense.steps == tuple(range(6)) and "dense_steps" not in made.settings
    assert make_plan(settings(dense_steps="5")).settings == {**made.settings, "dense_steps": "5"}
    (note,) = [note for note in made.notes if "between steps" in note]
    assert "MiB" in note and made.remembered.passes == 2
    monkeypatch.setattr("slagen.generation.memory.memory_left", lambda: (2**28, "this machine's memory"))
    monkeypatch.setattr(Plan, "remembered", Remembered(2**40, 2, 2))
    with pytest.raises(SlagenError, match="denoising 1024"):
        check_memory(made)


def test_a_video_and_its_report(tmp_path, capsys):
    model, video = save_pipeline(tmp_path / "model"), tmp_path / "a.mp4"
    arguments = ["--model", str(model), "--size", "64x64", "--num-frames", "9", "--steps", "4", "--seed", "1"]
    arguments += ["--device", "cpu", "--output", str(video), "--dense-steps", "0", "--window-fraction", "0.2"]
    arguments += ["--attention", "rettention", "--refresh-steps", "2", "--guidance-scale", "3"]
    assert slagen_command(["generate", "a", *arguments]) == 0
    told = " ".join(capsys.readouterr().err.split())
    assert "rettention attention keeps" in told and "window of 3 of 16 positions in each frame -> " in told
    attention = json.loads(video.with_suffix(".json").read_text())["attention"]
    share = RettentionConfig(window_fraction=0.2).pairs(Grid(3, 4, 4)) / 48**2
    # Step 0 is dense and remembers nothing, 1 is the first that does, 2 is a second one, 3 is the first between.
    assert attention["density"] == pytest.approx((3 + share) / 4) and attention["dense_steps"] == [0]


def test_bench_says_that_it_times_no_dense_steps(tmp_path):
    """Its loop left them out silently."""
    size = {"width": 64, "height": 64, "num_frames": 9, "steps": 2, "device": "cpu"}
    config, notes = (
        BenchConfig(model=str(save_pipeline(tmp_path / "model")), methods=("mean", "rettention"), **size),
        [],
    )
    mean, timed = bench(config, lambda event: notes.append(event.text)).models[1:]
    assert (mean.attention, timed.attention) == ("mean", "rettention")
    assert [note for note in notes if "by default" in note] == [
        "rettention is timed in every step and layer, but by default slagen generate uses dense attention in some "
        "steps or layers (dense_steps 30%)"
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["generate", "a", "--window-fraction", "2"], "window_fraction is 2.0, but must be from 0 to 1. Try"),
        (["generate", "a", "--refresh-steps", "0"], "refresh_steps is 0, but must be a whole number from 1 to 1000"),
        (["generate", "a", "--ratio-growth", "-1"], "ratio_growth is -1.0, but must be a finite number of at least 0"),
        (["plan", "--backend", "triton"], "backend is 'triton', but must be one of auto, reference, torch"),
        (["finetune", "--data", "d"], "rettention attention has no backward pass, so it cannot be fine-tuned"),
        (
            ["bench", "--method", "rettention"],
            "rettention attention keeps tensors from one denoising step to the next, so single",
        ),
    ],
    ids=" ".join,
)
def test_one_line_says_what_is_wrong(arguments, said, capsys):
    chosen = [] if arguments[0] == "bench" else ["--attention", "rettention"]
    assert slagen_command([*arguments, *chosen]) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_single_calls_are_refused():
    with pytest.raises(
        UsageError,
        match="rettention attention keeps tensors from one denoising step to the next, which attend\\(\\) cannot do",
    ):
        slagen.attend("rettention", *make_qkv((1, 1, 8, 8)), grid=(2, 2, 2))
    with pytest.raises(ValueError, match="has 8 tokens, but the sequence has 60"):
        run_steps(RettentionConfig(), Grid(2, 2, 2), [draw(Grid(3, 4, 5))])
    loop = BenchConfig(model="tiny-wan", methods=("rettention",))
    assert [method.name for method in loop.loop_methods] == ["rettention"]
