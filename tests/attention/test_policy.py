"""Steps, layers and clips that run dense whatever the attention method."""

import json

import pytest
from compiling import compile_blocks, denoise
from wan_models import build_pipeline, save_pipeline

from slagen.attention import registry
from slagen.attention.policy import AttentionPolicy, DensePart
from slagen.attention.sla.config import SLAConfig
from slagen.batch.forecast import denoising_flops
from slagen.cli.main import run as slagen
from slagen.errors import UsageError
from slagen.generation.config import GenerateConfig
from slagen.generation.estimate import plan
from slagen.generation.generate import generate
from slagen.generation.prompts import read_prompts
from slagen.generation.replay import replay
from slagen.generation.resolve import make_plan
from slagen.wan.processor import install, processors


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("0-2,-1", (0, 1, 2, 9)), ("3", (3,)), ("-3--1", (7, 8, 9)), ("8, 8-9", (8, 9)), ("20%", (0, 1)),
        ("29%", (0, 1, 2)), ("7-", (7, 8, 9)), ("0, -2-", (0, 8, 9)),
        ("0%", ()), ("100 %", tuple(range(10))), ("-10", (0,)), ("0--1", tuple(range(10))), (None, ()),
    ],
)  # fmt: skip
def test_what_a_text_chooses(text, steps):
    assert AttentionPolicy(dense_steps=text).resolve(10, 4, 100) == DensePart(steps, (), 10, 4)
    assert AttentionPolicy(dense_layers=text).resolve(7, 10, 100) == DensePart((), steps, 7, 10)


@pytest.mark.parametrize("text", ["", "a", "1--", "-", "1,,2", "101%", "-5%", "10%,3", "1.5", "99999", "1-2-3", 3])
def test_what_is_no_choice_is_refused(text):
    with pytest.raises(UsageError, match="dense_steps is .*, but must be numbers and ranges, or a percentage. Try"):
        AttentionPolicy(dense_steps=text)


@pytest.mark.parametrize("text", ["10", "-11", "0-10", "5-3", "-1-0"])
def test_what_there_is_not_is_refused(text):
    with pytest.raises(UsageError, match=r"dense_layers is .*, but there are 10 layers: 0 to 9, or -10 to -1 from the"):
        AttentionPolicy(dense_layers=text).resolve(4, 10, 100)


def test_the_share_of_dense_calls():
    assert DensePart((), (), 4, 10).mean(30, 100) == 30 and DensePart((), (), 4, 10).to_dict() == {}
    assert DensePart((0,), (0, 9), 4, 10).share == pytest.approx(1 - 0.75 * 0.8)
    assert DensePart((0, 1), (), 4, 10).mean(30, 100) == 65
    assert AttentionPolicy(min_tokens=101).resolve(4, 3, 100) == DensePart((), (0, 1, 2), 4, 3)
    assert AttentionPolicy(min_tokens=100).resolve(4, 3, 100).share == 0
    with pytest.raises(UsageError, match="min_tokens is -1, but must be a whole number of at least 0"):
        AttentionPolicy(min_tokens=-1)


def settings(model, tmp_path, **changes):
    return GenerateConfig(
        **{"prompt": "a red circle", "model": str(model), "width": 64, "height": 64, "num_frames": 9, "steps": 2,
           "seed": 1, "guidance_scale": 3.0, "dtype": "fp32", "device": "cpu", "block_m": 16, "block_n": 16,
           "allow_untrained": True, "output": str(tmp_path / "a.mp4"), "overwrite": True, **changes}
    )  # fmt: skip


def test_videos_and_reports(tmp_path):
    """With every step or layer dense the video is dense attention's; with some it is neither's."""
    model = save_pipeline(tmp_path / "model")

    def made(**changes):
        return generate(settings(model, tmp_path, **changes)).videos[0].report

    sla = made()
    dense = made(attention="dense", block_m=None, block_n=None)
    assert not {"dense_steps", "dense_layers"} & {*sla["attention"], *sla["settings"]}
    for whole in ({"dense_steps": "0--1"}, {"dense_layers": "100%"}, {"min_tokens": 49}):
        report = made(**whole)
        assert report["latents_hash"] == dense["latents_hash"] != sla["latents_hash"]
        assert report["attention"]["mode"] == "sla" and report["settings"].items() >= whole.items()
        assert report["cost"]["attention_tflop"] == dense["cost"]["attention_tflop"]
    some = made(dense_steps="0", dense_layers="-1")
    assert some["attention"]["dense_steps"] == [0] and some["attention"]["dense_layers"] == [1]
    assert some["latents_hash"] not in (dense["latents_hash"], sla["latents_hash"])
    tflop = [each["cost"]["attention_tflop"] for each in (sla, dense, some)]
    assert tflop[2] == pytest.approx(tflop[0] + 0.75 * (tflop[1] - tflop[0]))
    assert made(min_tokens=48)["latents_hash"] == sla["latents_hash"]
    generate(settings(model, tmp_path, dense_steps="0", dense_layers="-1"))
    assert replay(str(tmp_path / "a.json")).same


def test_plans_count_what_is_dense(tmp_path):
    def told(**changes):
        return plan(GenerateConfig("a", model="wan2.1-t2v-1.3b", steps=50, allow_untrained=True, **changes))

    sla, dense, half = told(), told(attention="dense"), told(dense_steps="50%")
    forward = [each.flops for each in (sla, half)]
    assert forward[1].sla_attention == pytest.approx((forward[0].sla_attention + forward[0].dense_attention) / 2)
    assert half.kept_fraction == pytest.approx((1 + sla.kept_fraction) / 2) and dense.kept_fraction == 1
    assert half.settings["dense_steps"] == list(range(25)) and "dense_steps" not in sla.settings
    assert "25 of 50 steps and 0 of 30 layers use dense attention" in half.notes
    note = "this clip has 32760 tokens, fewer than --min-tokens 40000, so it uses dense attention"
    assert note in told(min_tokens=40000).notes


class Task:
    def __init__(self, plan):
        self.plan = plan


def test_keys_and_forecasts():
    """At its default an option is in no key."""

    def made(**changes):
        return make_plan(GenerateConfig("a", seed=1, model="tiny-wan", device="cpu", **changes))

    assert not {"dense_steps", "dense_layers", "min_tokens"} & made().settings.keys()
    assert made(dense_steps="0", min_tokens=5).settings == {**made().settings, "dense_steps": "0", "min_tokens": 5}
    flops = [denoising_flops(Task(made(**changes))) for changes in ({}, {"dense_layers": "0"}, {"dense_steps": "100%"})]
    assert flops[0] < flops[1] < flops[2] == denoising_flops(Task(made(attention="dense")))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--dense-steps", "16"], "dense_steps is '16', but there are 16 steps: 0 to 15, or -16 to -1 from the end"),
        (["--dense-layers", "0-99"], "dense_layers is '0-99', but there are"),
        (["--dense-steps", "first"], "dense_steps is 'first', but must be numbers and ranges, or a percentage"),
        (["--min-tokens", "-1"], "min_tokens is -1, but must be a whole number of at least 0"),
        (
            ["--attention", "dense", "--dense-steps", "-1"],
            "--dense-steps, --dense-layers, --min-tokens and --delta are not for dense attention. Leave",
        ),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("command", [["generate", "a red circle"], ["plan"]], ids=["generate", "plan"])
def test_one_line_says_what_is_wrong(command, arguments, said, capsys):
    assert slagen([*command, "--model", "tiny-wan", "--steps", "16", "--device", "cpu", *arguments]) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_lines_of_a_prompt_file(tmp_path):
    file = tmp_path / "p.txt"
    file.write_text("a --dense-steps -1 --min-tokens 100\nb --dense-layers 0,-1")
    first, second = read_prompts(str(file))
    assert first.fields == {"dense_steps": "-1", "min_tokens": 100} and second.fields == {"dense_layers": "0,-1"}
    file.write_text("a --dense-steps x")
    with pytest.raises(UsageError, match="p.txt:1: dense_steps is 'x'"):
        read_prompts(str(file))


def test_the_command_line_tells_of_it(tmp_path, capsys):
    model = save_pipeline(tmp_path / "model")
    arguments = ["--model", str(model), "--size", "64x64", "--num-frames", "9", "--steps", "2", "--seed", "1"]
    more = ["--device", "cpu", "--allow-untrained", "--output", str(tmp_path / "a.mp4"), "--block-n", "16"]
    more += ["--dense-steps", "-1", "--dense-layers", "0", "--verbose"]
    assert slagen(["generate", "a red circle", *arguments, *more]) == 0
    told = " ".join(capsys.readouterr().err.split())
    assert "1 of 2 steps and 1 of 2 layers use dense attention" in told
    assert "dense attention in step 1; dense attention in layer 0" in told
    assert json.loads((tmp_path / "a.json").read_text())["settings"]["dense_steps"] == "-1"


def test_steps_compile_two_variants():
    pipe = build_pipeline(num_layers=3)
    install(pipe.transformer, SLAConfig(0.5, block_m=16, block_n=16))
    graphs, counts = compile_blocks(pipe.transformer, fullgraph=False), []
    for dense in (None, DensePart((0, 3), (1,), 5, 3), DensePart((1, 2), (), 5, 3)):
        denoise(pipe, 5, dense)
        counts.append(len(graphs))
        assert not any(processor.runs_dense for processor in processors(pipe.transformer))
    assert 0 < counts[0] < counts[1] == counts[2] <= 2 * counts[0]


def test_every_method_can_run_dense_in_part():
    for name in registry.names():
        if registry.get(name).family != "dense":
            assert GenerateConfig("a", attention=name, dense_steps="20%").policy.dense_steps == "20%"


def test_a_percentage_that_rounds_to_none_is_told():
    """Nothing ran dense, and nothing said so."""
    policy = AttentionPolicy(dense_steps="20%", dense_layers="1%")
    assert policy.note(64, policy.resolve(2, 30, 64)) == (
        "dense_steps 20% of 2 steps rounds to none, and dense_layers 1% of 30 layers rounds to none"
    )
    assert policy.note(64, policy.resolve(10, 30, 64)) == "2 of 10 steps and 0 of 30 layers use dense attention"
    for none in (AttentionPolicy(), AttentionPolicy(dense_steps="0%", dense_layers="0%")):
        assert none.note(64, none.resolve(2, 30, 64)) is None
