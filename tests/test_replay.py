"""A video says how it was made, and is made again from that."""

import json

import pytest
from wan_models import save_pipeline

from slagen.cli import run
from slagen.config import GenerateConfig
from slagen.errors import UsageError, WeightsError
from slagen.generate import generate
from slagen.replay import describe, replay
from slagen.video import read_comment, write_mp4


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
    assert told["settings"]["prompt"] == video.report["settings"]["prompt"]
    assert told["settings"].items() <= video.report["settings"].items()
    assert told["latents_hash"] == video.report["latents_hash"]
    assert describe(video.report_path)["settings"] == video.report["settings"]


@pytest.mark.parametrize("source", ["path", "report_path"])
def test_made_again_it_is_the_same(video, source):
    result = replay(str(getattr(video, source)))
    assert result["same"] and not result["versions_changed"]
    assert set(result["hashes"]) == ({"latents", "frames"} if source == "path" else {"latents", "frames", "file"})


def test_what_differs_is_named(video, tmp_path, capsys):
    content = json.loads(video.report_path.read_text())
    content["settings"]["seed"] = 4
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
    from slagen import report

    text = report.comment({"prompt": "圆" * 20_000, "negative_prompt": "", "seed": 1}, "a", "b")
    assert len(text.encode()) <= 32 * 1024 and "prompt_sha256" in json.loads(text)["settings"]


def test_info_and_foreign_files(video, tmp_path, capsys):
    import numpy as np

    assert run(["info", str(video.path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "video"
    assert run(["info", str(video.report_path)]) == 0
    assert "settings.seed" in capsys.readouterr().out
    foreign = tmp_path / "foreign.mp4"
    write_mp4(np.zeros((2, 16, 16, 3), np.uint8), foreign, 8)
    assert read_comment(foreign) == ""
    with pytest.raises(WeightsError, match="not one that slagen made"):
        describe(foreign)
    with pytest.raises(UsageError, match="neither a video"):
        replay(__file__)
