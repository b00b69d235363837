"""--trace: a file that Chrome and Perfetto load, whose events lie within each other as stages, steps and layers do."""

import json

import pytest
from wan_models import save_pipeline

from slagen.batch.config import BatchConfig
from slagen.cli.main import run
from slagen.errors import SlagenError, UsageError
from slagen.generation import trace
from slagen.generation.config import GenerateConfig
from slagen.generation.generate import generate
from slagen.generation.preflight import check_run


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return str(save_pipeline(tmp_path_factory.mktemp("toy") / "pipe", num_heads=2, head_dim=16))


def config(toy, folder, **changes):
    return GenerateConfig(
        **{"prompt": "a circle", "width": 128, "height": 128, "num_frames": 9, "steps": 3, "seed": 3, "device": "cpu",
           "allow_untrained": True, "model": toy, "output": str(folder / "a.mp4"), "trace": str(folder / "t.json"),
           **changes}
    )  # fmt: skip


def events_of(path):
    """The complete events of a trace, by their kind."""
    content = json.loads(path.read_text())
    assert content["displayTimeUnit"] == "ms"
    found = {}
    for event in content["traceEvents"]:
        assert event["ph"] in ("X", "M") and event["pid"] == 1
        if event["ph"] == "X":
            assert event["ts"] >= 0 and event["dur"] >= 0
            found.setdefault(event["cat"], []).append(event)
    return found


def within(inner, outer):
    return outer["ts"] <= inner["ts"] and inner["ts"] + inner["dur"] <= outer["ts"] + outer["dur"] + 0.002


def test_events_lie_within_each_other(toy, tmp_path):
    video = generate(config(toy, tmp_path, timing="part", measure_dense=2)).videos[0]
    found = events_of(tmp_path / "t.json")
    stages = found["stage"]
    assert [event["name"] for event in stages] == ["start", "prepare", "load", "text", "denoise", "decode", "write"]
    for one, other in zip(stages, stages[1:], strict=False):  # no time lies between them
        assert other["ts"] == pytest.approx(one["ts"] + one["dur"], abs=0.01)
    assert stages[-1]["ts"] + stages[-1]["dur"] <= 1e6 * video.record.wall_s + 0.01
    steps, layers, parts, measured = (found[kind] for kind in ("step", "layer", "part", "measure"))
    assert [step["name"] for step in steps] == ["step 1", "step 2", "step 3"]
    assert all(within(step, stages[4]) for step in steps)
    assert [step["args"]["timestep"] for step in steps] == [step.timestep for step in video.record.steps]
    assert len(layers) == 3 * 2 * 2  # steps, passes, layers
    assert all(within(event, steps[event["args"]["step"] - 1]) for event in (*layers, *parts, *measured))
    for part in parts:
        assert sum(within(part, layer) for layer in layers if layer["args"] == part["args"]) == 1
    for step, row in zip(steps, video.record.steps, strict=True):
        own = [layer["dur"] for layer in layers if layer["args"]["step"] == row.step + 1]
        assert sum(own) == pytest.approx(1e3 * row.attention_ms, abs=0.1)
        if row.step not in (1, 2):  # those that were run with dense attention too
            assert step["dur"] == pytest.approx(1e3 * row.latency_ms, abs=0.01)
    names = [event["name"] for event in measured]
    assert (names.count("dense pass"), names.count("dense pass, not counted"), names.count("forward pass")) == (4, 1, 4)


def test_without_times_there_are_stages_only(toy, tmp_path):
    generate(config(toy, tmp_path, timing="off"))
    assert set(events_of(tmp_path / "t.json")) == {"stage"}


def test_what_cannot_be_written_costs_no_video(toy, tmp_path, monkeypatch):
    def fail(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trace, "write_text", fail)
    with pytest.raises(SlagenError, match="the video was written, but its trace could not be written to .*t.json"):
        generate(config(toy, tmp_path))
    assert (tmp_path / "a.mp4").exists() and not (tmp_path / "t.json").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"trace": "t.txt"}, "must be a file that ends in .json"), ({"trace": ""}, "must be a file that ends in .json"),
     ({"output": "out", "num_videos": 2}, "--trace writes one file, but --num-videos is 2"),
     ({"trace": "o/a.json", "output": "./o/a.mp4"}, "which is the report of")],
)  # fmt: skip
def test_what_is_refused(toy, tmp_path, changes, words):
    with pytest.raises(UsageError, match=words):
        config(toy, tmp_path, **changes)


def test_what_is_there_stays_unless_it_is_to_be_replaced(toy, tmp_path):
    (tmp_path / "t.json").write_text("mine")
    with pytest.raises(UsageError, match=r"t\.json exists\. Choose another --trace"):
        check_run(config(toy, tmp_path))
    with pytest.raises(UsageError, match=r"t\.json exists\. Choose another --trace"):
        generate(config(toy, tmp_path))
    assert (tmp_path / "t.json").read_text() == "mine" and not (tmp_path / "a.mp4").exists()
    generate(config(toy, tmp_path, overwrite=True))
    assert events_of(tmp_path / "t.json")


def test_a_batch_has_none(toy, tmp_path, capsys):
    with pytest.raises(UsageError, match="a batch generates many"):
        BatchConfig("prompts.txt", config(toy, tmp_path))
    assert run(["batch", "prompts.txt", "--trace", "t.json"]) == 2
    assert "--trace" in capsys.readouterr().err
