"""slagen.generate from Python: what it takes, what it hands back, how it shows and refuses."""

import ast
import base64
import re
from pathlib import Path

import numpy as np
import pytest
from wan_models import save_pipeline

import slagen
from slagen import errors
from slagen.errors import UsageError, WeightsError
from slagen.video import read_mp4

ROOT = Path(__file__).parents[2]
TINY = {"width": 64, "height": 64, "num_frames": 9, "steps": 1, "device": "cpu", "attention": "dense"}


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return save_pipeline(tmp_path_factory.mktemp("toy") / "pipe", num_heads=2, head_dim=16)


@pytest.fixture(autouse=True)
def from_python(monkeypatch):
    monkeypatch.setattr(errors._Reader, "at_command_line", False)


def test_without_output_the_frames_are_in_memory_and_no_file_is_written(toy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = slagen.generate("a <b> circle", model=toy, seed=np.int64(3), num_videos=2, **TINY)
    assert not list(tmp_path.iterdir())
    assert result.frames.shape == (9, 64, 64, 3) and result.frames.dtype == np.uint8
    assert (result.path, result.latents_path, result.report["video"]["file"]) == (None, None, None)
    assert result.report["settings"]["output"] is None and result.report["stages_s"]["start"] == 0
    assert [video.report["settings"]["seed"] for video in result.videos] == [3, 4]
    assert (result.videos[0].frames != result.videos[1].frames).any()
    assert re.fullmatch(
        r"GenerateResult\(\[<Video in memory: 9 frames of 64x64 at 16 fps, seed 3, [\d.]+ s>, <.* seed 4, .*>\]\)",
        repr(result),
    )
    page = result._repr_html_()
    assert page.count("<video") == 2 and "a &lt;b&gt; circle (seed 3)" in page and "<b>" not in page
    (tmp_path / "shown.mp4").write_bytes(base64.b64decode(re.search(r"base64,([^\"]+)", page)[1]))
    assert read_mp4(tmp_path / "shown.mp4").shape == (9, 64, 64, 3)


def test_with_output_it_is_as_at_the_command_line(toy, tmp_path):
    events = []
    settings = {**TINY, "model": toy, "seed": 3}
    written = slagen.generate("a circle", output=tmp_path / "v.mp4", save_latents=True, on_event=events.append,
                              **settings)  # fmt: skip
    assert written.path == tmp_path / "v.mp4" and written.latents_path.is_file()
    assert read_mp4(written.path).shape == written.frames.shape
    assert written.videos[0].report_path.is_file() and "v.mp4" in repr(written)
    assert written.videos[0].mp4() == written.path.read_bytes()
    assert {"stage", "step"} <= {event.kind for event in events}
    again = slagen.generate("a circle", **settings)
    assert (again.frames == written.frames).all()
    assert again.report["latents_hash"] == written.report["latents_hash"]
    with pytest.raises(UsageError, match="Choose another output or seed, or replace it with overwrite=True"):
        slagen.generate("a circle", output=tmp_path / "v.mp4", **settings)


def test_a_notebook_shows_so_many_videos(toy, monkeypatch):
    monkeypatch.setattr("slagen.generation.result.MAX_SHOWN", 1)
    result = slagen.generate("a circle", model=toy, num_videos=2, **TINY)
    assert result._repr_html_().count("<video") == 1 and "and 1 more" in result._repr_html_()


def test_warnings_are_pythons(toy):
    with pytest.warns(UserWarning, match="will not work well for Wan2.1.*need guidance_scale=1, and all"):
        slagen.generate("a circle", model=toy, weights=toy / "transformer", guidance_scale=5, **TINY)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": ""}, 'the prompt is empty. Describe the video, for example "a red circle moving right".'),
        ({"steps": 0}, "steps is 0, but must be at least 1. Try steps=1."),
        ({"num_frames": 80}, "num_frames is 80, but must be a multiple of 4, plus 1. Try num_frames=81."),
        ({"sparsity": 2}, "sparsity is 2.0, but must be a number of at least 0 and below 1. Try sparsity=0.95."),
        ({"width": 832}, "only one of width and height is given. Give both: width=832, height=480."),
        ({"guidance_scale": "5"}, "guidance_scale is '5', but must be a number."),
        ({"ode": 1}, "ode is 1, but must be True or False."),
        ({"steps": True}, "steps is True, but must be a whole number."),
        ({"save_latents": True}, "save_latents writes a file, but there is no output. Give a path with output=."),
        ({"prompt": ["a", "b"]}, "prompt is a list, but must be a string."),
        ({"device": "gpu"}, "device is 'gpu', but must be auto, cpu, cuda or cuda:N. Try device='auto'."),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_in_the_words_of_python(settings, message):
    with pytest.raises(UsageError) as error:
        slagen.generate(**{"prompt": "a circle", **settings})
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("num_inference_steps", "generate() has no argument 'num_inference_steps'. Did you mean steps?"),
        ("guidance_scal", "generate() has no argument 'guidance_scal'. Did you mean guidance_scale?"),
        ("size", "generate() has no argument 'size'. Give width and height."),
        (
            "last_frame",
            "generate() has no argument 'last_frame': only the image that a video begins with "
            "can be given, with image=; FLF2V, with a last image, is not supported.",
        ),
    ],
)
def test_an_argument_that_there_is_not(name, message):
    with pytest.raises(TypeError) as error:
        slagen.generate("a circle", **{name: 1})
    assert str(error.value) == message
    with pytest.raises(TypeError, match="Its arguments are allow_untrained, .*, width"):
        slagen.generate("a circle", zzz=1)


def test_weights_that_are_missing_are_told_in_the_words_of_python(toy):
    said = "attention='sol', which needs no training, or attention='dense'; or give SLA weights with weights=, or run "
    with pytest.raises(WeightsError, match=f"{said}it anyway with allow_untrained=True"):
        slagen.generate("a circle", model=toy, device="cpu")


def test_type_checkers_see_every_public_name():
    source = Path(slagen.__file__).read_text(encoding="utf-8")
    block = next(node for node in ast.parse(source).body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert seen == slagen._HOMES and (Path(slagen.__file__).parent / "py.typed").is_file()
    assert all(getattr(slagen, name) is not None for name in slagen.__all__)
