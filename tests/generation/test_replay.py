"""A video says how it was made, and is made again from that."""

import json
import os

import pytest
from safetensors import safe_open
from wan_models import save_pipeline

from slagen.cli.main import run
from slagen.errors import UsageError, WeightsError
from slagen.generation.config import GenerateConfig
from slagen.generation.generate import generate
from slagen.generation.provenance import Made, describe
from slagen.generation.replay import replay
from slagen.generation.video_report import UsedWeights
from slagen.video import is_mp4, other_kind, read_comment, write_video


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    folder = tmp_path_factory.mktemp("replay")
    toy = save_pipeline(folder / "toy")
    prompt = 'a red circle = 50 % \\ of; #1\nand "more", 圆 🔴'
    config = GenerateConfig(prompt, model=str(toy), width=128, height=128, num_frames=9, steps=2, seed=3, device="cpu",
                            allow_untrained=True, sparsity=0.5, output=str(folder / "x.mp4"))  # fmt: skip
    return generate(config).videos[0]


def test_the_video_itself_says_how_it_was_made(video):
    told = describe(video.path)
    assert told.settings["prompt"] == video.report["settings"]["prompt"]
    assert told.settings.items() <= video.report["settings"].items()
    beside = describe(video.report_path)
    assert beside.settings == video.report["settings"] and beside.versions == told.versions
    assert beside.hashes == video.record.hashes
    assert told.hashes == {name: value for name, value in video.record.hashes.items() if name != "file"}


@pytest.mark.parametrize("source", ["path", "report_path"])
def test_made_again_it_is_the_same(video, source):
    """The model lies beside the video, whose report has no more than its name."""
    result = replay(str(getattr(video, source)))
    assert result.same and not result.versions_changed
    found = {"latents", "frames", "model weights"}
    assert set(result.hashes) == (found if source == "path" else {*found, "file"})


CHANGES = [
    ("", {}),
    ("--seed 5 --steps 1", {"seed": 5, "steps": 1}),
    ("other --sparsity 0.6", {"prompt": "other", "sparsity": 0.6}),
    ("--sla-topk 0.4 --size 64x64", {"sparsity": None, "sla_topk": 0.4, "width": 64, "height": 64}),
    ("--attention dense", {"attention": "dense", "sparsity": None}),
    ("--sampler euler --fps 4", {"sampler": "euler", "fps": 4}),
    ("--sampler rcm", {"sampler": "rcm", "flow_shift": None}),
]


@pytest.mark.parametrize(("line", "changed"), CHANGES, ids=[line for line, _ in CHANGES])
def test_from_a_report_options_change_what_they_say(video, tmp_path, monkeypatch, line, changed):
    """All that makes the latents is taken over, but for what is typed and what only belonged to that."""
    seen = []
    monkeypatch.setattr("slagen.generation.generate.generate", lambda config, on_event: seen.append(config))
    monkeypatch.setattr("slagen.cli.output.generate.show_videos", lambda *given: None)
    output = str(tmp_path / "y.gif")
    assert run(["generate", *line.split(), "--from", str(video.report_path), "-o", output, "--timing", "off"]) == 0
    told = video.report["settings"]
    same = {"prompt": told["prompt"], "model": str(video.path.parent / "toy"), "output": output, "timing": "off",
            "negative_prompt": told["negative_prompt"], "width": 128, "height": 128, "num_frames": 9, "seed": 3,
            "fps": told["fps"], "steps": 2, "sampler": "unipc", "guidance_scale": told["guidance_scale"],
            "flow_shift": told["flow_shift"], "dtype": "fp32", "device": "cpu", "allow_untrained": True,
            "sparsity": 0.5, "backend": told["backend"]}  # fmt: skip
    if "dense" in line:
        del same["backend"]
    assert seen == [GenerateConfig(**{**same, **changed})]


def test_from_a_report_the_latents_are_the_same(video, tmp_path, capsys):
    again = tmp_path / "y.frames"
    assert run(["generate", "--from", str(video.report_path), "-o", str(again), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["latents_hash"] == video.report["latents_hash"]


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({"schema_version": 2}, 5, "was written by a newer version of slagen (format 2). Upgrade slagen."),
        ({"settings": {"prompt": 3}}, 5, '"settings.prompt" is a number, but must be text'),
        ({"settings": {"prompt": "x", "model": "tiny-wan", "size": "64x64"}}, 2, "cannot reproduce: 'attention'"),
        ("{", 5, "it is not valid JSON"),
    ],
    ids=["newer", "wrong", "lacking", "broken"],
)
def test_a_report_that_cannot_be_taken_is_one_message(video, tmp_path, capsys, change, code, words):
    content = change if isinstance(change, str) else json.dumps({**video.report, **change})
    (tmp_path / "x.json").write_text(content)
    assert run(["generate", "--from", str(tmp_path / "x.json"), "-o", str(tmp_path / "y.mp4")]) == code
    told = capsys.readouterr().err
    assert words in " ".join(told.split()) and told.count("error:") == 1
    assert run(["generate", "--from", str(tmp_path / "x.json"), "--prompts", "p.txt"]) == 2


def test_other_metadata_around_the_same_frames_is_no_difference(video, tmp_path, capsys):
    """Another version of slagen may write another comment into the file: every report of before failed."""
    content = json.loads(video.report_path.read_text())
    content["settings"]["model"] = str(video.path.parent / "toy")
    content["video"]["sha256"] = "0" * 64
    (tmp_path / "x.json").write_text(json.dumps(content))
    assert run(["replay", str(tmp_path / "x.json")]) == 0
    assert "same frames, different metadata" in capsys.readouterr().out


def test_what_differs_is_named(video, tmp_path, capsys):
    content = json.loads(video.report_path.read_text())
    content["settings"]["seed"] = 4
    content["settings"]["model"] = str(video.path.parent / "toy")  # as reports told it before
    content["versions"]["torch"] = "1.0"
    other = tmp_path / "x.json"
    other.write_text(json.dumps(content))
    assert run(["replay", str(other), "--output", str(tmp_path / "again.mp4"), "--json"]) == 6
    result = json.loads(capsys.readouterr().out)
    assert not result["same"] and not result["hashes"]["latents"]["same"]
    assert list(result["versions_changed"]) == ["torch"] and (tmp_path / "again.mp4").is_file()
    assert run(["replay", str(video.path)]) == 0
    assert "same" in capsys.readouterr().out


def test_a_long_prompt_is_kept_as_its_hash(tmp_path):
    from slagen.generation import report

    weights = UsedWeights(model="m", used="base")
    text = report.comment({"prompt": "圆" * 20_000, "negative_prompt": "", "seed": 1}, "a", "b", weights=weights)
    assert len(text.encode()) <= 32 * 1024 and "prompt_sha256" in json.loads(text)["settings"]


def test_info_and_foreign_files(video, tmp_path, capsys):
    import numpy as np

    assert run(["info", str(video.path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "video"
    assert run(["info", str(video.report_path)]) == 0
    assert "settings.seed" in capsys.readouterr().out
    foreign = tmp_path / "foreign.mp4"
    write_video(np.zeros((2, 16, 16, 3), np.uint8), foreign, 8)
    assert read_comment(foreign) == ""
    with pytest.raises(WeightsError, match="slagen did not generate it"):
        describe(foreign)
    with pytest.raises(UsageError, match="neither a video"):
        replay(__file__)


def everything(value):
    """All texts in a document."""
    if isinstance(value, dict):
        return [text for key, item in value.items() for text in (key, *everything(item))]
    if isinstance(value, list):
        return [text for item in value for text in everything(item)]
    return [value] if isinstance(value, str) else []


def test_no_path_of_this_machine_is_told(toy_in_a_home, monkeypatch):
    """The user's home travelled in every shared video, in the weights' path."""
    home, output = toy_in_a_home
    monkeypatch.setenv("HOME", str(home))
    options = ["--model", "~/toy", "--vae", str(home / "toy" / "vae"), "--weights", str(home / "toy" / "transformer")]
    options += ["--allow-untrained", "--size", "64x64", "--num-frames", "5", "--steps", "1", "--device", "cpu"]
    assert run(["generate", "a red circle", *options, "--save-latents", "--output", str(output / "x.mp4")]) == 0
    with safe_open(output / "x.latents.safetensors", framework="pt") as handle:
        kept = json.loads(handle.metadata()["slagen_latents"])
    for content in (json.loads((output / "x.json").read_text()), json.loads(read_comment(output / "x.mp4")), kept):
        texts = everything(content)
        assert not [text for text in texts if "/" in text and str(home.parent) in text]
        assert not [text for text in texts if "alice" in text]
    told = json.loads((output / "x.json").read_text())["settings"]
    assert (told["model"], told["vae"], told["weights"], told["output"]) == ("toy", "vae", "transformer", "x.mp4")


@pytest.fixture
def toy_in_a_home(tmp_path):
    home = tmp_path / "home" / "alice"
    home.mkdir(parents=True)
    save_pipeline(home / "toy")
    (tmp_path / "home" / "alice" / "out").mkdir()
    return home, home / "out"


@pytest.mark.parametrize(
    ("typed", "told"),
    [(None, None), ("a/b", "a/b"), ("/home/alice/w.pth", "w.pth"), ("~/w.pth", "w.pth"), ("~bob/x", "x"),
     ("C:\\Users\\alice\\w.pth", "w.pth"), ("Wan-AI/Wan2.1", "Wan-AI/Wan2.1"), ("./w", "./w")],
)  # fmt: skip
def test_what_a_path_is_told_as(typed, told):
    from slagen.generation import report

    assert report.shareable(typed) == told


def test_the_bundled_weights_of_another_installation(monkeypatch, tmp_path):
    """Reports named them where they lay: `weights` of another machine fails, though the same file is here."""
    import hashlib

    from slagen.generation.recorded import _find_weights
    from slagen.wan.folder import bundled_folder

    own = hashlib.sha256((bundled_folder() / "sla.safetensors").read_bytes()).hexdigest()
    elsewhere = "/home/alice/slagen/weights/tiny-wan/sla.safetensors"
    place = tmp_path / "x.json"

    def told(weights, known):
        return Made(place, "report", {"settings": {"weights": weights}, "latents_hash": "", "weights": known})

    for known in ({"sla_hash": own}, {}):
        assert _find_weights(place, told(elsewhere, known), "tiny-wan") is None
    with pytest.raises(UsageError, match="cannot be found. Give them with --weights"):
        _find_weights(place, told(elsewhere, {"sla_hash": "0" * 64}), "tiny-wan")
    (tmp_path / "mine.safetensors").write_bytes(b"mine")
    own = told("mine.safetensors", {"sla_hash": hashlib.sha256(b"mine").hexdigest()})
    assert _find_weights(place, own, "tiny-wan") == str(tmp_path / "mine.safetensors")


def test_a_report_without_its_video_is_replayed(video, tmp_path):
    """It failed after everything was made again."""
    content = json.loads(video.report_path.read_text())
    del content["video"]
    content["settings"]["model"] = str(video.path.parent / "toy")
    (tmp_path / "x.json").write_text(json.dumps(content))
    result = replay(str(tmp_path / "x.json"))
    assert result.same and set(result.hashes) == {"latents", "model weights"}


@pytest.mark.parametrize(
    ("name", "start", "kind"),
    [("a.mkv", b"\x1a\x45\xdf\xa3", "Matroska"), ("a.avi", b"RIFF\0\0\0\0AVI LIST", "AVI"), ("a.gif", b"GIF89a", "GIF"),
     ("a.ts", b"G" + (b"\0" * 187 + b"G") * 2, "transport stream"), ("a.mov", b"\0\0\0\x08wide", "QuickTime")],
)  # fmt: skip
@pytest.mark.parametrize("command", ["info", "replay"])
def test_videos_of_other_kinds_are_named(tmp_path, capsys, command, name, start, kind):
    (tmp_path / name).write_bytes(start + bytes(400))
    assert run([command, str(tmp_path / name)]) == 5
    told = " ".join(capsys.readouterr().err.split())
    assert kind in told and "an MP4 or WebM that slagen generated" in told


@pytest.mark.parametrize("suffix", ["mp4", "json", "safetensors", "gguf", "pth"])
@pytest.mark.parametrize("command", ["info", "replay"])
def test_a_pipe_is_refused_and_not_waited_for(tmp_path, capsys, command, suffix):
    pipe = tmp_path / f"f.{suffix}"
    os.mkfifo(pipe)
    assert run([command, str(pipe)]) == 5
    assert "is a named pipe. Give" in " ".join(capsys.readouterr().err.split())
    assert not is_mp4(pipe) and other_kind(pipe) is None


@pytest.mark.slow
def test_top_k_and_blocks_are_those_of_before(video, tmp_path):
    """0.58 of 50 blocks are 28 as published, where the sparsity of 0.42 leaves 29."""
    toy = str(video.path.parent / "toy")
    config = GenerateConfig("x", model=toy, width=400, height=512, num_frames=1, steps=1,
                            guidance_scale=1, seed=3, device="cpu", allow_untrained=True, sla_topk=0.58, block_m=32,
                            block_n=16, output=str(tmp_path / "x.mp4"))  # fmt: skip
    made = generate(config).videos[0]
    attention, settings = made.report["attention"], made.report["settings"]
    assert (attention["key_blocks"], attention["critical"], attention["block_m"]) == (50, 28, 32)
    assert (settings["sla_topk"], settings["block_m"], settings["block_n"]) == (0.58, 32, 16)
    assert replay(str(made.path), model=toy).same
