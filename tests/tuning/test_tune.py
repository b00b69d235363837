"""slagen tune: the bound holds when the schedule is run, at no more cost than one sparsity; the file; bad input."""

import dataclasses
import json

import pytest
from wan_models import save_pipeline

from slagen.attention.schedule_file import read_schedule
from slagen.cli.main import run as command
from slagen.comparison.config import CompareConfig
from slagen.comparison.run import compare
from slagen.errors import GateError, UsageError
from slagen.generation.config import GenerateConfig
from slagen.tuning import run
from slagen.tuning.config import TuneConfig
from slagen.tuning.measure import Meter
from slagen.tuning.prompts import SCENES, SHAPES, clips_of
from slagen.tuning.run import tune
from slagen.wan.defaults import ModelDefaults
from slagen.wan.folder import bundled_folder, describe_folder


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return str(save_pipeline(tmp_path_factory.mktemp("toy") / "pipe", num_layers=3, num_heads=2, head_dim=16))


@pytest.fixture
def prompts(tmp_path):
    (tmp_path / "p.txt").write_text("a red circle --seed 7\na blue square\n")
    (tmp_path / "h.txt").write_text("a star --seed 9\n")
    return {"prompts": str(tmp_path / "p.txt"), "held_out": str(tmp_path / "h.txt")}


def config(toy, tmp_path, prompts, **changes):
    """3 x 8 x 8 tokens: twelve blocks of 16."""
    fields = {"attention": "mean", "block_m": 16, "block_n": 16, "sparsity": 0.75, **changes.pop("base", {})}
    base = GenerateConfig(
        "-", model=toy, width=128, height=128, num_frames=9, steps=3, device="cpu", guidance_scale=1.0, timing="off",
        overwrite=True, **fields,
    )  # fmt: skip
    given = {"candidates": (0.0, 0.5, 0.75, 0.9), "output": str(tmp_path / "s.json"), "curve": True, **prompts}
    return TuneConfig(base, **{**given, "cache_dir": str(tmp_path / "cache"), **changes})


def error_of(toy, tmp_path, prompts, schedule, method="mean"):
    """The velocity error that `slagen compare` measures of a schedule."""
    base = GenerateConfig(
        "-", model=toy, width=128, height=128, num_frames=9, steps=3, device="cpu", guidance_scale=1.0, seed=0,
        attention="dense", output=str(tmp_path / "compare"), overwrite=True,
    )  # fmt: skip
    options = {"block_m": 16, "block_n": 16, "sparsity_schedule": schedule}
    row = compare(CompareConfig(base, (method,), (), options, True, 1, prompts)).rows[0]
    return row.runs[0].velocity_error


@pytest.mark.slow
def test_the_bound_holds_where_it_is_run(toy, tmp_path, prompts):
    """Its error is the one that `slagen compare` finds with the file, and no candidate everywhere is cheaper."""
    (tmp_path / "one.txt").write_text("a red circle --seed 7\n")
    given = {**prompts, "prompts": str(tmp_path / "one.txt")}
    open_end = tune(config(toy, tmp_path, given))
    errors = {each.sparsity: each.error for each in open_end.uniform}
    assert open_end.max_error == pytest.approx(errors[0.75]) and errors[0] < 1e-5  # all steps are measured here
    assert open_end.chosen.error <= open_end.max_error
    bound = (errors[0.5] + errors[0.75]) / 2
    found = tune(config(toy, tmp_path, given, max_error=bound))
    written = json.loads(found.path.read_text())
    assert written == json.loads(json.dumps(found.to_dict())) and read_schedule(found.path) == found.schedule
    assert found.chosen.error <= bound == written["tuned"]["max_error"]
    assert error_of(toy, tmp_path, given["prompts"], str(found.path)) == pytest.approx(found.chosen.error, rel=1e-5)
    cheaper = [each for each in found.uniform if each.flops < found.chosen.flops]
    assert cheaper and all(each.error > bound for each in cheaper)
    assert found.chosen.flops < next(each.flops for each in found.uniform if each.sparsity == 0.5)
    assert len({*found.schedule.parts[0][1]}) > 1  # the layers differ
    assert [point.uniform.sparsity for point in found.curve if point.uniform] == [0.9, 0.75, 0.5, 0.0]
    assert all(point.tuned.flops <= point.budget for point in found.curve)
    assert {clip for clip in found.held_out} == {("a star", 9)}


def test_parts_of_the_steps_have_their_own(toy, tmp_path, prompts):
    """Errors of other steps do not depend on a step's sparsity, so the parts of one layer add up to it alone."""
    base = {"dense_layers": "1", "dense_steps": "2"}
    found = tune(config(toy, tmp_path, prompts, step_parts=3, curve=False, held_out=None, base=base, max_error=1.0))
    assert [steps for steps, _ in found.schedule.parts] == ["0", "1", "2-"]
    assert {(each["part"], each["layer"]) for each in found.changes} == {(p, n) for p in (0, 1) for n in (0, 2)}
    assert found.measured_steps == [0, 1] and found.curve == []
    assert found.chosen.sparsity == 0.9  # the bound is wide
    text = found.schedule.text
    assert text == "0:0.9/0.75/0.9,1:0.9/0.75/0.9,2-:0.75/0.75/0.75"  # what is dense keeps what is nearest to its own


@pytest.mark.parametrize("name", ["sla", "sparse", "sla2", "vsa"])
def test_every_method_with_a_sparsity(name, toy, tmp_path, prompts):
    given = {"attention": name, "allow_untrained": True}
    base = {**given, **({"block_m": None, "block_n": None} if name == "vsa" else {})}
    found = tune(config(toy, tmp_path, prompts, curve=False, held_out=None, base=base, candidates=(0.4, 0.7),
                        max_error=10.0))  # fmt: skip
    assert found.schedule.method == name and found.chosen.sparsity == 0.7


@pytest.mark.slow
def test_an_interrupted_call_is_resumed(toy, tmp_path, prompts, monkeypatch):
    """What was measured is not measured again, and the result is that of one call."""
    done, notes = [], []
    measure = Meter._measure

    def stop(self, text, *rest):
        if len(done) == 4:
            raise KeyboardInterrupt
        done.append(text)
        return measure(self, text, *rest)

    monkeypatch.setattr(Meter, "_measure", stop)
    (tmp_path / "one.txt").write_text("a red circle --seed 7\n")
    asked = config(toy, tmp_path, {"prompts": str(tmp_path / "one.txt")}, curve=False, candidates=(0.5, 0.9))
    with pytest.raises(KeyboardInterrupt):
        tune(asked, lambda event: notes.append(event.text))
    assert "4 measurements are kept. Run the same command again to resume" in notes
    assert not (tmp_path / "s.json").exists()
    again = []
    monkeypatch.setattr(Meter, "_measure", lambda self, text, *rest: again.append(text) or measure(self, text, *rest))
    found = tune(asked)
    assert not set(done) & set(again) and again
    (file,) = (tmp_path / "cache" / "tuning").iterdir()
    file.write_bytes(file.read_bytes()[:-20] + b"\0 torn\n")
    again.clear()
    once_more = tune(asked)
    assert len(again) == 1  # the torn line
    assert once_more.schedule == found.schedule and once_more.chosen.error == pytest.approx(found.chosen.error)
    again.clear()
    tune(dataclasses.replace(asked, cache_dir=str(tmp_path / "other"), max_error=1.0))
    assert len(again) >= len(done)


def test_a_bound_that_nothing_keeps_fails_with_the_lowest_error(toy, tmp_path, prompts):
    with pytest.raises(GateError, match=r"has a velocity error of at most 1e-06; the lowest found is 0\.\d+. Give a"):
        tune(config(toy, tmp_path, prompts, candidates=(0.5, 0.75), max_error=1e-6, curve=False, held_out=None))
    assert not (tmp_path / "s.json").exists()


def test_prompts_suit_the_model():
    base = GenerateConfig("-", seed=5)
    tiny = describe_folder(bundled_folder(), "tiny-wan").defaults
    assert not any(map(tiny.unknown_words, SHAPES))
    for defaults, known in ((tiny, SHAPES), (ModelDefaults(), SCENES)):
        own, other = (clips_of(base, defaults, None, held_out=held) for held in (False, True))
        assert [clip.prompt for clip in (*own, *other)] == list(known)
        assert [clip.seed for clip in (*own, *other)] == [5, 6, 7, 1005, 1006, 1007]
    closed = ModelDefaults(vocabulary=("fish",), example_prompt="fish")
    assert {clip.prompt for clip in clips_of(base, closed, None, held_out=True)} == {"fish"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--attention", "sol"], "sol attention has no sparsity to tune. Give --attention sla or sparse or sla2"),
        (["--attention", "linear"], "linear attention has no sparsity to tune"),
        (["--attention", "dense"], "dense attention has no sparsity to tune"),
        (["--candidates", "0.5"], "candidates has 1 different sparsities, but there must be from 2 to 6"),
        (["--candidates", "0.5,1"], "candidates is 1.0"), (["--candidates", "a"], "candidates is 'a', but must be one"),
        (["--candidates", "0.96,0.97"], "all candidates keep as many blocks of this clip of 320 tokens"),
        (["--max-error", "-1"], "max_error is -1.0, but must be a number of at least 0. Try --max-error 0.3"),
        (["--step-parts", "0"], "step_parts is 0, but must be from 1 to 8"),
        (["--step-parts", "5", "--steps", "4"], "step_parts is 5, but there are 4 denoising steps"),
        (["--held-out", "p.txt"], "--held-out is a file of prompts for --curve. Give --curve too"),
        (["--output", "a.mp4"], "output is 'a.mp4', but must be a folder, or a file that ends in .json"),
        (["--dense-layers", "100%"], "all steps or layers use dense attention, so there is nothing to tune"),
        (["--prompts", "none.txt"], "none.txt"),
        (["--prompts", "{folder}/size.txt"], "size.txt:1: a prompt file for slagen tune cannot set"),
        (["--curve", "--prompts", "{folder}/p.txt", "--held-out", "{folder}/p.txt"], "'a' with seed 1 is used for tun"),
        (["--output", "{folder}/there.json"], "there.json exists. Choose another --output, or replace it with"),
        (["--sparsity-schedule", "0-:0.5"], "No such option: --sparsity-schedule"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)  # fmt: skip
def test_bad_input_is_one_message_before_anything_is_loaded(arguments, said, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run, "Session", None)
    (tmp_path / "size.txt").write_text("a --steps 3\n")
    (tmp_path / "p.txt").write_text("a --seed 1\n")
    (tmp_path / "there.json").write_text("{}")
    given = [each.format(folder=tmp_path) for each in arguments]
    output = [] if "--output" in given else ["--output", str(tmp_path / "out")]
    assert command(["tune", "--model", "tiny-wan", "--device", "cpu", *given, *output]) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_the_command_prints_the_curve_and_the_path(toy, tmp_path, prompts, capsys):
    words = ["tune", "--model", toy, "--device", "cpu", "--attention", "mean", "--block-m", "16", "--block-n", "16",
             "--size", "128x128", "--num-frames", "9", "--steps", "2", "--candidates", "0.5,0.9", "--max-error", "9",
             "--prompts", prompts["prompts"], "--cache-dir", str(tmp_path / "cache"), "--overwrite", "--curve",
             "--held-out", prompts["held_out"], "-o", str(tmp_path / "s.json")]  # fmt: skip
    assert command(words) == 0
    streams = capsys.readouterr()
    assert streams.out.strip() == str(tmp_path / "s.json")
    told = " ".join(streams.err.split())
    assert "On prompts that were not used for tuning, the schedule's error is below" in told
    assert "of dense attention's FLOPs (computed). Use the file with --sparsity-schedule." in told
    assert command([*words, "--json"]) == 0
    streams = capsys.readouterr()
    assert json.loads(streams.out) == json.loads((tmp_path / "s.json").read_text())
    assert "measuring" not in streams.err  # everything is known already


def test_it_is_an_error_where_nothing_can_be_skipped(toy, tmp_path, prompts):
    with pytest.raises(UsageError, match=r"has nothing to skip in 12 tokens. Give a larger --size or more frames"):
        tune(dataclasses.replace(
            config(toy, tmp_path, prompts, curve=False, held_out=None),
            base=GenerateConfig("-", model=toy, width=32, height=32, num_frames=9, steps=2, device="cpu",
                                attention="mean", block_n=16),
        ))  # fmt: skip
