"""A sparsity of its own for each denoising step, whatever the attention method."""

import dataclasses
import json
import warnings

import pytest
import torch
from compiling import compile_blocks, denoise
from wan_models import build_pipeline, save_pipeline

import slagen
from slagen.attention import registry
from slagen.attention.choices import as_ranges, scheduled
from slagen.attention.cost import ModelShape, dense_attention_flops
from slagen.attention.delta.method import with_delta
from slagen.attention.policy import AttentionPolicy, DensePart
from slagen.attention.protocol import Grid
from slagen.attention.schedule import Schedule
from slagen.attention.schedule_file import LayerSchedule
from slagen.attention.sla.config import SLAConfig
from slagen.batch.forecast import denoising_flops
from slagen.cli.main import run as slagen_command
from slagen.errors import UsageError
from slagen.generation.config import GenerateConfig
from slagen.generation.estimate import plan
from slagen.generation.generate import generate
from slagen.generation.prompts import apply, read_prompts
from slagen.generation.replay import replay
from slagen.generation.resolve import make_plan
from slagen.wan.processor import install_method, processors

WITH_SPARSITY = registry.with_option("sparsity")
SHAPE = ModelShape(2, 2, 16, 64, 8)
GRID = Grid(5, 8, 8)  # 320 tokens: 20 blocks of 16


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0-2:0.8,3-:0.95", (0.8, 0.8, 0.8, 0.95, 0.95)),
        ("3-:.5", (None, None, None, 0.5, 0.5)),
        ("-1:0 , 1 : 0.25", (None, 0.25, None, None, 0.0)),
        ("-2--1:0.5,40%:0.1", (0.1, 0.1, None, 0.5, 0.5)),
        ("0--1:0.9", (0.9,) * 5),
        ("0%:0.9", (None,) * 5),
        (None, (None,) * 5),
    ],
)
def test_what_a_text_says_of_each_step(text, expected):
    assert AttentionPolicy(sparsity_schedule=text).sparsities(5) == expected == scheduled(text, 5)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0-9",
        "0.8",
        ":0.8",
        "0-9:",
        "0-9:x",
        "a:0.5",
        "0-9:0.8,",
        "0:0.5:0.5",
        "1--:0.5",
        "101%:0.5",
        "0:0.5/",
        "0:/0.5",
        0.5,
    ],
)
def test_a_malformed_pair_is_refused(text):
    with pytest.raises(UsageError, match=r"must be pairs STEPS:SPARSITY, separated by commas. Try --sparsity-schedule"):
        AttentionPolicy(sparsity_schedule=text)


@pytest.mark.parametrize("number", ["1", "1.0", "-0.1", "95", "1.5"])
def test_a_sparsity_out_of_range_is_refused(number):
    with pytest.raises(UsageError, match=f"a sparsity must be at least 0 and below 1, not {number}. Try"):
        AttentionPolicy(sparsity_schedule=f"0-3:0.5,4-:{number}")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0-5:0.5", "but there are 5 steps: 0 to 4, or -5 to -1 from the end"),
        ("-6:0.5", "but there are 5 steps"), ("5-:0.5", "but there are 5 steps"), ("3-1:0.5", "but there are 5 steps"),
        ("0-2:0.5,2:0.5", "gives step 2 two sparsities"), ("0-:0.5,-1:0.6", "gives step 4 two sparsities"),
        ("20%:0.5,0:0.6", "gives step 0 two sparsities"),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_steps_is_refused(text, said):
    with pytest.raises(UsageError, match=said):
        AttentionPolicy(sparsity_schedule=text).sparsities(5)


def test_ranges_are_told_as_they_are_typed():
    assert as_ranges([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8" and as_ranges([]) == ""


def configs_of(name, grid):
    """The config of a method at each of three sparsities that keep other numbers of its blocks of a grid."""
    method = registry.get(name)
    options = method.own({"block_m": 16, "block_n": 16})
    return [method.configure(method.config(), {**options, "sparsity": each}, grid) for each in (0.3, 0.6, 0.8)]


@pytest.mark.parametrize("name", WITH_SPARSITY)
def test_each_step_runs_at_its_own(name):
    """Where all steps but one are dense, it is as if that one's sparsity were that of the clip."""
    method, grid = registry.get(name), Grid(3, 16, 16)  # 12 cubes
    low, middle, high = configs_of(name, grid)
    if name in ("linear", "sla2"):
        middle = low if name == "linear" else middle  # all tokens are summed, whatever the sparsity
    pipe = build_pipeline()
    install_method(pipe.transformer, method, high)
    for processor in processors(pipe.transformer):
        with torch.no_grad():
            for value in processor.parameters():
                value.normal_(std=0.1, generator=torch.Generator().manual_seed(1))

    def video(dense_steps, configs):
        return denoise(pipe, 2, DensePart(dense_steps, (), 2, 2), 256, configs)

    first = video((1,), (low, high))
    assert torch.equal(first, video((1,), (low, low)))
    assert torch.equal(video((0,), (high, low)), video((0,), (low, low)))
    assert torch.equal(first, video((1,), (high, high))) == (name == "linear")
    both = video((), (low, high))
    assert torch.equal(both, video((), (high, high))) == (name == "linear")
    assert all(processor.config == high for processor in processors(pipe.transformer))


def schedule(text, name="sla", steps=4, layers=2, *, dense_steps=None, dense_layers=None, delta=None, **options):
    method = with_delta(registry.get(name), delta)
    policy = AttentionPolicy(dense_steps, dense_layers, None, delta, text)
    config = method.configure(method.config(), {"block_m": 16, "block_n": 16, **options}, GRID)
    return Schedule.of(method, config, GRID, policy, steps, layers)


@pytest.mark.parametrize("name", ["sla", "sparse", "sla2", "mean"])
def test_costs_and_densities_are_those_of_each_step(name):
    """Ten of 20 blocks in one step, one in the other two, beside a dense one; and dense where nothing is left out."""
    told = schedule("0:0.5,1:0.9,3:0", name, dense_steps="1", dense_layers="-1", sparsity=0.95)
    full = dense_attention_flops(SHAPE, 320)
    costs = [told.method.cost(config, SHAPE, GRID) for config in told.configs]
    if name == "sla2":
        costs[3] = full  # all blocks kept: its layers run dense
    half = [round((own + full) / 2) for own in costs]
    assert told.flops(SHAPE) == [half[0], full, half[2], half[3]]
    assert told.dense.mean(told.mean_flops(SHAPE), full) == pytest.approx(sum(told.flops(SHAPE)) / 4)
    assert told.densities() == pytest.approx([0.75, 1, 0.525, 1])
    assert told.mean_density == pytest.approx((0.5 + 0.05 + 1) / 3)
    counted = told.densities([[0.4, None], [None, None], [0.1, None], [1.0, None]])
    assert counted == pytest.approx([0.7, 1, 0.55, 1])


def test_a_correction_counts_in_each_step():
    told = schedule("0-1:0.5", delta=16)
    assert told.densities() == pytest.approx([(1 + 15 * share) / 16 for share in (0.5, 0.5, 0.05, 0.05)])
    assert told.densities([[0.5]])[0] == pytest.approx((1 + 15 * 0.5) / 16)
    assert told.notes({})[1] == (
        "steps 2-3: sparsity 0.95 -> 1 of 20 key blocks per query block; "
        "delta 16 -> 20 of 320 query rows computed exactly"
    )


def test_steps_that_keep_as_many_blocks_share_a_config():
    told = schedule("0:0.9,1:0.901,2:0.94", steps=5, sparsity=0.95)
    assert [config.sparsity for config in told.configs] == [0.9, 0.95, 0.95, 0.95, 0.95]  # 0.901 keeps one of 20
    assert told.sparsities == (0.9, 0.901, 0.94, 0.95, 0.95)
    assert schedule(None).by_step is None and schedule(None).sparsities is None


def test_every_sparsity_has_a_note():
    told = schedule("0-2:0.5,-1:0.8", steps=6, dense_steps="1", selector="random")
    assert told.notes({}) == [
        "steps 0,2: sparsity 0.5 -> 10 of 20 key blocks per query block, random selector",
        "steps 3-4: sparsity 0.95 -> 1 of 20 key blocks per query block, random selector",
        "step 5: sparsity 0.8 -> 4 of 20 key blocks per query block, random selector",
    ]
    many = schedule("0:0.1,1:0.2,2:0.3,3:0.4,4:0.5", steps=6).notes({})
    assert len(many) == 4 and many[3] == "3 more steps: sparsities from 0.4 to 0.95"


def test_weights_of_one_sparsity_say_in_how_many_steps_it_is_another():
    trained = SLAConfig(0.95, block_m=16, block_n=16)
    told = schedule("0-1:0.8,2:0.9", dense_steps="0", block_n=32)
    assert told.differences(trained) == [
        "the weights were trained at sparsity 0.95, but 2 of 4 steps run with sparsities from 0.8 to 0.9",
        "the weights were trained with blocks of 16x16 tokens, but this run uses 16x32",
    ]
    assert schedule("0-:0.95", sparsity=0.5).differences(trained) == []
    assert schedule("0:0.5", dense_steps="0").differences(trained) == []
    assert schedule(None, sparsity=0.5).differences(trained) == [
        "the weights were trained at sparsity 0.95, but this run uses 0.5"
    ]


def test_a_sparsity_for_each_layer():
    """Each layer of a step runs at its own, and costs, densities and notes are means over the layers."""
    text = "0-1:0.5/0.95,2:0.9"
    assert scheduled(text, 4) == ((0.5, 0.95), (0.5, 0.95), 0.9, None)
    told = schedule(text, "mean", sparsity=0.8)
    sparsities = [[each.sparsity for each in own] if isinstance(own, tuple) else own.sparsity for own in told.configs]
    assert sparsities == [[0.5, 0.95], [0.5, 0.95], 0.9, 0.8]
    cost = {each: told.method.cost(schedule(None, "mean", sparsity=each).configs[0], SHAPE, GRID)
            for each in (0.5, 0.95, 0.9, 0.8)}  # fmt: skip
    mixed = round((cost[0.5] + cost[0.95]) / 2)
    assert told.flops(SHAPE) == [mixed, mixed, cost[0.9], cost[0.8]]
    assert told.densities() == pytest.approx([0.275, 0.275, 0.1, 0.2])
    assert told.notes({})[0] == "steps 0-1: sparsities from 0.5 to 0.95 by layer -> 27.5% of all query-key pairs"
    part = schedule(text, "mean", sparsity=0.8, dense_layers="0", dense_steps="3")  # the first layer's does not count
    full = dense_attention_flops(SHAPE, 320)
    assert part.flops(SHAPE)[0] == round((cost[0.95] + full) / 2) and part.flops(SHAPE)[3] == full
    assert part.densities() == pytest.approx([0.525, 0.525, 0.55, 1])
    assert part.mean_flops(SHAPE) == pytest.approx((2 * cost[0.95] + cost[0.9]) / 3, abs=1)
    trained = SLAConfig(0.95, block_m=16, block_n=16)
    assert schedule("0-:0.95/0.5", sparsity=0.8).differences(trained) == [
        "the weights were trained at sparsity 0.95, but 4 of 4 steps run with sparsity 0.5"
    ]
    assert schedule("0-:0.95/0.5", dense_layers="1").differences(trained) == []


def test_each_layer_runs_at_its_own():
    """As if the other layer's were that of the clip, where that one is dense; equal ones are a plain sparsity."""
    method, grid = registry.get("sparse"), Grid(3, 16, 16)
    low, middle, high = configs_of("sparse", grid)
    pipe = build_pipeline()
    install_method(pipe.transformer, method, middle)

    def video(dense_layers, *configs):
        return denoise(pipe, 2, DensePart((), dense_layers, 2, 2), 256, configs)

    assert torch.equal(video((1,), (low, high), (low, high)), video((1,), low, low))
    assert torch.equal(video((0,), (low, high), (low, high)), video((0,), high, high))
    assert torch.equal(video((), (low, low), low), video((), low, low))
    mixed = video((), (low, high), (low, high))
    assert not torch.equal(mixed, video((), low, low)) and not torch.equal(mixed, video((), (high, low), (high, low)))
    assert all(processor.config == middle for processor in processors(pipe.transformer))


def written(path, **changes):
    """A file of a schedule for two layers."""
    content = LayerSchedule("sparse", 2, (("0-1", (0.0, 0.3)), ("2-", (0.7, 0.3)))).to_dict()
    path.write_text(json.dumps({**content, "tuned": {"anything": 1}, **changes}))
    return str(path)


def test_a_file_is_what_it_holds(tmp_path):
    """The config, and so the key of a batch and the record of a video, hold its content, wherever it lies."""
    model = save_pipeline(tmp_path / "model")
    text = "0-1:0/0.3,2-:0.7/0.3"
    configs = [
        settings(model, tmp_path, attention="sparse", sparsity_schedule=each)
        for each in (written(tmp_path / "a.json"), written(tmp_path / "b.JSON"), text)
    ]
    assert configs[0] == configs[1] == configs[2] and configs[0].sparsity_schedule == text
    made = generate(configs[0]).videos[0].report
    assert made["settings"]["sparsity_schedule"] == text
    about = made["attention"]
    assert about["step_densities"] == pytest.approx([5 / 6, 5 / 6, 1 / 2])
    assert {"sparsity", "critical", "fractions"} < set(about["averaged"])
    means = (about["sparsity"], about["critical"], about["fractions"]["critical"])
    assert means == pytest.approx((0.8 / 3, 6.5 / 3, 6.5 / 9)) and about["key_blocks"] == 3
    (tmp_path / "a.json").unlink(missing_ok=True)
    assert replay(str(tmp_path / "a.mp4")).same
    lines = tmp_path / "p.txt"
    lines.write_text(f"a --sparsity-schedule {tmp_path / 'b.JSON'}\n")
    base = settings(model, tmp_path, attention="sparse")
    assert apply(base, read_prompts(str(lines))[0]).sparsity_schedule == text
    with pytest.raises(UsageError, match="b.JSON was tuned for sparse attention, but this is mean attention"):
        apply(dataclasses.replace(base, attention="mean"), read_prompts(str(lines))[0])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"schema_version": 2}, "schema version 2, but this version of slagen reads only 1. Make it again with slagen"),
        ({"kind": "report"}, '"kind" is \'report\', but must be one of sparsity schedule'),
        ({"num_layers": 3}, "is for 3 layers, but has 2 sparsities in a part"),
        ({"schedule": []}, "is not a sparsity schedule: sparsity_schedule is ''"),
        ({"schedule": [{"steps": "0-", "sparsities": [0.5, 1.0]}]}, "must be a number of at least 0 and below 1"),
        ({"schedule": [{"steps": "-", "sparsities": [0.5, 0.5]}]}, "is not a sparsity schedule: sparsity_schedule is"),
        ({"schedule": [{"steps": "0-"}]}, 'has no "sparsities"'),
        ({"method": "mean"}, "was tuned for mean attention, but this is sla attention. Give --attention mean, or make"),
        ({"method": "sla", "num_layers": 1, "schedule": [{"steps": "9-", "sparsities": [0.5]}]}, "there are 3 steps"),
        ({"method": "sla"}, "has sparsities for 2 layers, but this model has 6. Give one sparsity, or make a schedule"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)  # fmt: skip
def test_a_file_that_does_not_fit_is_one_line(changes, said, tmp_path, capsys):
    path = written(tmp_path / "a.json", **changes)
    assert slagen_command(["generate", "a", "--model", "tiny-wan", "--steps", "3", "--sparsity-schedule", path]) == 2
    assert said in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("content", ["", "[]", "{", "\0", '{"schema_version": 1}'])
def test_a_broken_file_is_one_line(content, tmp_path, capsys):
    (tmp_path / "a.json").write_text(content)
    for path in (tmp_path / "a.json", tmp_path / "none.json", tmp_path):
        named = path if path.suffix else path / "folder.json"
        (tmp_path / "folder.json").mkdir(exist_ok=True)
        assert slagen_command(["plan", "a", "--model", "tiny-wan", "--sparsity-schedule", str(named)]) == 2
        told = " ".join(capsys.readouterr().err.split())
        assert named.name in told and "Give a file that slagen tune wrote, or pairs STEPS:SPARSITY." in told


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sla", "mean"])
def test_a_graph_for_each_density(name):
    pipe, counts = build_pipeline(num_layers=3), []
    method, grid = registry.get(name), Grid(3, 8, 8)  # 12 blocks
    config = method.configure(method.config(), {"block_m": 16, "block_n": 16, "sparsity": 0.5}, grid)
    install_method(pipe.transformer, method, config)
    graphs = compile_blocks(pipe.transformer, fullgraph=False)
    for text in (None, "0:0.8,2:0.8", "0:0.8,1:0.81,2:0.82,3:0.5", "0-:0.8", "0-2:0.8/0.5/0.81,3:0.5/0.8/0.5"):
        told = Schedule.of(method, config, grid, AttentionPolicy(sparsity_schedule=text), 4, 3)
        denoise(pipe, 4, size=128, configs=told.by_step)
        counts.append(len(graphs))
    assert 0 < counts[0] < counts[1] == counts[2] == counts[3] == counts[4] <= 2 * counts[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the card there, which bench checks")
def test_the_kernels_take_it():
    """In Triton's interpreter the final latents are those of PyTorch, at every step's own number of blocks."""
    latents, grid = [], Grid(3, 4, 4)
    low, _, high = (dataclasses.replace(each, sparsity=x) for each, x in
                    zip(configs_of("sla", grid), (0.3, 0.6, 0.7), strict=True))  # fmt: skip
    for backend in ("torch", "triton"):
        pipe = build_pipeline(num_layers=1)
        install_method(pipe.transformer, registry.get("sla"), high, backend=backend)
        latents.append(denoise(pipe, 2, configs=(low, high)))
    torch.testing.assert_close(latents[0], latents[1], atol=1e-4, rtol=1e-4)
    assert not torch.equal(latents[0], denoise(pipe, 2))


def settings(model, tmp_path, **changes):
    return GenerateConfig(
        **{"prompt": "a red circle", "model": str(model), "width": 64, "height": 64, "num_frames": 9, "steps": 3,
           "seed": 1, "guidance_scale": 3.0, "dtype": "fp32", "device": "cpu", "block_m": 16, "block_n": 16,
           "allow_untrained": True, "output": str(tmp_path / "a.mp4"), "overwrite": True, **changes}
    )  # fmt: skip


def test_videos_and_reports(tmp_path):
    """3 blocks of 16 tokens, of which sparsity 0.3 keeps two."""
    model = save_pipeline(tmp_path / "model")

    def made(**changes):
        return generate(settings(model, tmp_path, attention="mean", **changes)).videos[0].report

    plain, other = made(sparsity=0.7), made(sparsity=0.3)
    same = made(sparsity=0.3, sparsity_schedule="0-:0.7")
    assert same["latents_hash"] == plain["latents_hash"] != other["latents_hash"]
    assert same["attention"]["step_densities"] == pytest.approx([1 / 3] * 3)
    assert same["attention"].items() >= {**plain["attention"], "density": same["attention"]["density"]}.items()
    assert same["cost"] == {**plain["cost"], **{name: same["cost"][name] for name in same["cost"] if "measured" in name
                                                or "remaining" in name}}  # fmt: skip
    assert not {"step_densities", "sparsity_schedule"} & {*plain["attention"], *plain["settings"]}
    some = made(sparsity=0.7, sparsity_schedule="0-1:0.3", dense_steps="0", dense_layers="1")
    assert some["attention"]["step_densities"] == pytest.approx([1, 5 / 6, 4 / 6])
    assert some["attention"]["density"] == pytest.approx((1 + 5 / 6 + 4 / 6) / 3)
    assert some["settings"]["sparsity_schedule"] == "0-1:0.3" and some["settings"]["sparsity"] == 0.7
    tflop = [each["cost"]["attention_tflop"] for each in (plain, other, some)]
    full = plain["cost"]["dense_attention_tflop"]
    assert tflop[2] == pytest.approx((full + (tflop[1] + full) / 2 + (tflop[0] + full) / 2) / 3)
    assert replay(str(tmp_path / "a.json")).same and replay(str(tmp_path / "a.mp4")).same


def test_from_python(tmp_path):
    model = str(save_pipeline(tmp_path / "model"))
    given = {"model": model, "width": 64, "height": 64, "num_frames": 9, "steps": 2, "seed": 1, "device": "cpu"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = slagen.generate(
            "a red circle", attention="sparse", allow_untrained=True, block_m=16, block_n=16, sparsity=0.7,
            sparsity_schedule="1:0.3", **given,
        )  # fmt: skip
    assert made.report["attention"]["step_densities"] == pytest.approx([1 / 3, 2 / 3])
    with pytest.raises(UsageError, match="sparsity_schedule is 0.5, but must be a string"):
        slagen.generate("a red circle", sparsity_schedule=0.5, **given)


def test_plans_count_each_step():
    def told(**changes):
        return plan(GenerateConfig("a", model="wan2.1-t2v-1.3b", steps=50, allow_untrained=True, **changes))

    low, high, some = told(sparsity=0.8), told(sparsity=0.95), told(sparsity=0.95, sparsity_schedule="0-9:0.8")
    steps = [each.flops.sla_attention for each in (low, high)]
    assert some.step_attention_flops == [steps[0]] * 10 + [steps[1]] * 40
    assert some.total_flops.sla == pytest.approx((10 * low.total_flops.sla + 40 * high.total_flops.sla) / 50)
    assert some.kept_fraction == pytest.approx((low.kept_fraction + 4 * high.kept_fraction) / 5)
    assert some.step_densities == pytest.approx([low.kept_fraction] * 10 + [high.kept_fraction] * 40)
    assert some.settings["sparsity_schedule"] == "0-9:0.8" and "sparsity_schedule" not in low.settings
    assert not {"step_densities", "step_attention_flops"} & low.to_dict().keys()
    assert "steps 10-49: sparsity 0.95 -> 25 of 512 key blocks per query block" in some.notes
    tuned = plan(GenerateConfig("a", model="tiny-wan", sparsity_schedule="0-3:0.8"))
    assert "the weights were trained at sparsity 0.95, but 4 of 16 steps run with sparsity 0.8" in tuned.notes


class Task:
    def __init__(self, plan):
        self.plan = plan


def test_keys_and_forecasts():
    """At its default it is in no key; two schedules have two."""

    def made(**changes):
        return make_plan(GenerateConfig("a", seed=1, model="tiny-wan", device="cpu", **changes))

    low, none, mixed = made(sparsity=0.5), made(), made(sparsity_schedule="0-7:0.5")
    assert "sparsity_schedule" not in none.settings
    assert mixed.settings == {**none.settings, "sparsity_schedule": "0-7:0.5"}
    assert made(sparsity_schedule="0-8:0.5").settings != mixed.settings
    flops = [denoising_flops(Task(each)) for each in (none, mixed, low)]
    assert flops[1] == pytest.approx((flops[0] + flops[2]) / 2)
    assert "the weights were trained at sparsity 0.95, but 8 of 16 steps run with sparsity 0.5" in mixed.warnings


def test_a_clip_in_which_no_step_leaves_anything_out_is_dense():
    made = make_plan(
        GenerateConfig("a", seed=1, model="tiny-wan", device="cpu", attention="sla2", allow_untrained=True,
                       sparsity_schedule="0-:0")
    )  # fmt: skip
    assert made.method.name == "dense" and made.config.sparsity_schedule is None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--sparsity-schedule", "0-16:0.8"], "sparsity_schedule is '0-16:0.8', but there are 16 steps: 0 to 15"),
        (["--sparsity-schedule", "0-9:0.8,5:0.9"], "gives step 5 two sparsities. Give each step once. Try"),
        (["--sparsity-schedule", "half:0.8"], "but must be pairs STEPS:SPARSITY, separated by commas. Try"),
        (["--sparsity-schedule", "0-9:1"], "but a sparsity must be at least 0 and below 1, not 1. Try"),
        (["--attention", "sol", "--sparsity-schedule", "0:0.8"], "sparsity_schedule is not an option of sol attention"),
        (["--attention", "dense", "--sparsity-schedule", "0:0.8"], "dense attention has no sparsity. Leave"),
    ],
    ids=" ".join,
)  # fmt: skip
@pytest.mark.parametrize("command", [["generate", "a red circle"], ["plan"]], ids=["generate", "plan"])
def test_one_line_says_what_is_wrong(command, arguments, said, capsys):
    assert slagen_command([*command, "--model", "tiny-wan", "--device", "cpu", *arguments]) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_lines_of_a_prompt_file(tmp_path):
    for name, text in (
        ("p.txt", "a --sparsity-schedule 0-3:0.8,4-:0.9"),
        ("p.jsonl", json.dumps({"prompt": "a", "sparsity_schedule": "0-3:0.8,4-:0.9"})),
        ("p.yaml", "- prompt: a\n  sparsity_schedule: 0-3:0.8,4-:0.9"),
        ("p.csv", 'prompt,sparsity_schedule\na,"0-3:0.8,4-:0.9"'),
    ):
        (tmp_path / name).write_text(text)
        assert read_prompts(str(tmp_path / name))[0].fields == {"sparsity_schedule": "0-3:0.8,4-:0.9"}
    (tmp_path / "p.yaml").write_text("- prompt: a\n  sparsity_schedule: 0:0.8")  # no number of base 60
    assert read_prompts(str(tmp_path / "p.yaml"))[0].fields == {"sparsity_schedule": "0:0.8"}
    (tmp_path / "p.txt").write_text("a\nb --sparsity-schedule x")
    with pytest.raises(UsageError, match="p.txt:2: sparsity_schedule is 'x'"):
        read_prompts(str(tmp_path / "p.txt"))


def test_the_command_line_tells_of_it(tmp_path, capsys):
    model = save_pipeline(tmp_path / "model")
    arguments = ["--model", str(model), "--size", "64x64", "--num-frames", "9", "--steps", "3", "--seed", "1"]
    more = ["--device", "cpu", "--allow-untrained", "--output", str(tmp_path / "a.mp4"), "--block-n", "16"]
    chosen = ["--sparsity", "0.3", "--sparsity-schedule", "0:0.7", "--dense-steps", "-1"]
    assert slagen_command(["generate", "a red circle", *arguments, *more, *chosen, "--verbose"]) == 0
    told = " ".join(capsys.readouterr().err.split())
    assert "note: step 0: sparsity 0.7 -> 1 of 3 key blocks per query block" in told
    assert "33.3% in step 0, 66.7% in step 1, 100.0% in step 2 of all query-key pairs exactly" in told
    report = json.loads((tmp_path / "a.json").read_text())
    assert report["attention"]["step_densities"] == pytest.approx([1 / 3, 2 / 3, 1])
    assert slagen_command(["plan", "--model", "tiny-wan", "--sparsity-schedule", "0-7:0.5"]) == 0
    assert "5.00% to 50.00% of all query-key pairs attended exactly in each step, 27.50%" in capsys.readouterr().out
