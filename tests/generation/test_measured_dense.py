"""--measure-dense: steps run with dense attention too, beside their own, and what that says."""

import dataclasses

import pytest
import torch
from wan_models import save_pipeline

from slagen import timing
from slagen.attention.policy import AttentionPolicy
from slagen.cli.main import run
from slagen.errors import UsageError
from slagen.generation.config import GenerateConfig
from slagen.generation.generate import generate
from slagen.generation.measured_dense import dense_section, describe_dense, measured_steps
from slagen.generation.video_report import FORM, VideoReport
from slagen.io.documents import read_json
from slagen.timing import DenseTimes, StepTimes
from slagen.wan.processor import processors


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return str(save_pipeline(tmp_path_factory.mktemp("toy") / "pipe", num_heads=2, head_dim=16))


def config(toy, folder, **changes):
    return GenerateConfig(
        **{"prompt": "a circle", "width": 128, "height": 128, "num_frames": 9, "steps": 4, "seed": 3, "device": "cpu",
           "allow_untrained": True, "model": toy, "output": str(folder), "overwrite": True, **changes}
    )  # fmt: skip


@pytest.mark.parametrize(
    ("count", "steps", "dense", "chosen"),
    [(1, 1, None, (0,)), (2, 2, None, (0, 1)), (1, 3, None, (2,)), (3, 16, None, (3, 8, 13)),
     (2, 6, "0-2", (4, 5)), (3, 6, "0-2", (3, 4, 5)), (4, 16, None, (2, 6, 10, 14))],
)  # fmt: skip
def test_steps_are_spread_without_the_first_and_without_dense_ones(count, steps, dense, chosen):
    part = AttentionPolicy(dense_steps=dense).resolve(steps, 2, 100)
    assert measured_steps(count, part) == chosen
    assert measured_steps(None, part) == ()


def test_the_video_stays_the_same_and_its_time_too(toy, tmp_path):
    plain = generate(config(toy, tmp_path)).videos[0]
    assert "measured_dense" not in plain.report and "measure" not in plain.report["stages_s"]
    video = generate(config(toy, tmp_path, measure_dense=2, report=True)).videos[0]
    report = video.report
    assert report["latents_hash"] == plain.report["latents_hash"]
    assert report["attention"] == plain.report["attention"]  # the density among it
    assert next(iter(report)) == "measured_dense" and "measure_dense" not in report["settings"]
    assert [step["step"] for step in report["measured_dense"]["steps"]] == [1, 3]
    stages = report["stages_s"]
    assert stages["measure"] > 0
    assert stages["total"] == pytest.approx(sum(s for name, s in stages.items() if name not in ("measure", "total")))
    assert sum(step["latency_ms"] for step in report["steps"]) <= 1e3 * stages["denoise"]
    assert VideoReport.from_dict(read_json(video.report_path, FORM)) == video.record
    page = video.path.with_suffix(".html").read_text()
    said = describe_dense(video.record.measured_dense)
    assert page.index(said[1:]) < page.index("<video") and "measuring dense attention" in page


def test_both_ways_take_turns_on_the_same_inputs(toy, tmp_path, monkeypatch):
    """After one pass that is not counted, which comes before all others."""
    from diffusers import WanTransformer3DModel

    seen, forward = [], WanTransformer3DModel.forward

    def note(self, hidden_states, *args, **kwargs):
        seen.append((processors(self)[0].runs_dense, kwargs["timestep"].item(), hidden_states.clone()))
        return forward(self, hidden_states, *args, **kwargs)

    def first(self, *args, **kwargs):
        hidden_states = kwargs.pop("hidden_states")
        return note(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(WanTransformer3DModel, "forward", first)
    generate(config(toy, tmp_path, guidance_scale=1.0, measure_dense=3))
    ways = [dense for dense, *_ in seen]
    assert ways == [False, False, True, True, True, False, False, True]
    for group in (seen[1:4], seen[4:6], seen[6:8]):
        assert all(time == group[0][1] and torch.equal(x, group[0][2]) for _, time, x in group)
    assert len({time for _, time, _ in seen}) == 4


def test_speed_ups_are_of_what_was_measured(monkeypatch):
    """A recorder whose clock moves by hand: 10 ms of own attention in a pass of 30, 40 dense in one of 60."""
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    recorder = timing.StepRecorder("cpu", "layer")

    def one_pass(attention_s, other_s):
        with recorder.attention(0):
            now[0] += attention_s
        now[0] += other_s

    recorder.begin_step()
    recorder.begin_pass()
    began = recorder.clock.mark()
    one_pass(0.010, 0.020)
    recorder.clock.add("pass", began, recorder.clock.mark())
    with recorder.dense_pass(counted=False):
        one_pass(5.0, 5.0)
    with recorder.dense_pass():
        one_pass(0.040, 0.020)
    now[0] += 0.070  # the sampler
    step = recorder.end_step(1.0)
    assert step.latency_ms == pytest.approx(100) and step.attention_ms == pytest.approx([10])
    assert step.layers_ms == pytest.approx([10]) and step.num_spans == 1
    assert step.dense.extra_ms == pytest.approx(10_060)
    measured = dense_section([StepTimes(0, 1.0, 5.0, [1.0]), step])
    assert [row.step for row in measured.steps] == [0]
    assert measured.attention_speedup.median == pytest.approx(4) and measured.step_speedup.median == pytest.approx(1.3)
    assert describe_dense(measured) == (
        "measured speed-up over dense attention: attention 4.00x, the whole step 1.30x (one step, run both ways)"
    )
    slower = dataclasses.replace(step, index=1, dense=DenseTimes(30.0, 130.0, 80.0, 130.0))
    assert "attention 6.00x (4.00 to 8.00), the whole step 1.65x (1.30 to 2.00) (medians and ranges of 2 steps" in (
        describe_dense(dense_section([step, slower]))
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"attention": "dense"}, "which this run uses already"), ({"timing": "off"}, "--timing off takes none"),
     ({"measure_dense": 5}, "only 4 steps. Try --measure-dense 3"), ({"measure_dense": 0}, "must be at least 1"),
     ({"measure_dense": True}, "must be a whole number")],
)  # fmt: skip
def test_what_says_nothing_is_refused(toy, tmp_path, changes, words):
    with pytest.raises(UsageError, match=words):
        config(toy, tmp_path, **{"measure_dense": 2, **changes})


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"dense_steps": "0-2"}, "only 4 steps, of which 3 have dense attention already. Try --measure-dense 1"),
     ({"min_tokens": 10_000}, "every step of this clip uses dense attention already"),
     ({"width": 16, "height": 16, "num_frames": 1}, "so there is nothing to compare with it")],
)  # fmt: skip
def test_what_only_the_model_tells(toy, tmp_path, changes, words):
    with pytest.raises(UsageError, match=words):
        generate(config(toy, tmp_path, **{"measure_dense": 2, **changes}))


def test_command(toy, tmp_path, capsys):
    line = ["generate", "a circle", "--model", toy, "--size", "128x128", "--num-frames", "9", "--steps", "2",
            "--device", "cpu", "--allow-untrained", "--measure-dense", "2", "-o", str(tmp_path / "a.mp4")]  # fmt: skip
    assert run(line) == 0
    told = capsys.readouterr().err
    assert told.index("measured speed-up over dense attention") < told.index("denoise ") < told.index("Details: ")
    assert run([*line, "--overwrite", "--steps", "1"]) == 2
    assert "measure_dense is 2, but the run has only 1 step. Try --measure-dense 1." in " ".join(
        capsys.readouterr().err.split()
    )
