"""Latents that were kept become their video: the same file, the same metadata, nothing sampled; and ffmpeg is tried
before anything is loaded."""

import hashlib
import json
import shlex

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from wan_models import save_pipeline

from slagen import video as mp4
from slagen.cli.main import run
from slagen.errors import SlagenError, WeightsError, of_memory
from slagen.generation import latents as kept
from slagen.generation.config import GenerateConfig
from slagen.generation.generate import generate
from slagen.generation.provenance import describe
from slagen.video import check_ffmpeg, read_comment


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return save_pipeline(tmp_path_factory.mktemp("decode") / "toy")


def config(toy, output, **changes):
    settings = {"width": 128, "height": 128, "num_frames": 9, "steps": 1, "seed": 3, "device": "cpu"}
    settings |= {"guidance_scale": 1.0, "allow_untrained": True, "model": str(toy), "output": str(output)}
    return GenerateConfig("a red circle", **settings, **changes)


@pytest.fixture(scope="module")
def video(toy, tmp_path_factory):
    return generate(config(toy, tmp_path_factory.mktemp("video") / "v.mp4", save_latents=True)).videos[0]


def test_latents_become_the_same_video(toy, video, tmp_path, capsys):
    output = tmp_path / "again.mp4"
    assert run(["decode", str(video.latents_path), "--model", str(toy), "-o", str(output)]) == 0
    assert capsys.readouterr().out.split() == [str(output)]
    assert output.read_bytes() == video.path.read_bytes()
    report = json.loads(output.with_suffix(".json").read_text())
    assert report["settings"] == video.report["settings"] and report["weights"] == video.report["weights"]
    assert report["video"] == {**video.report["video"], "file": "again.mp4"}
    assert read_comment(output) == read_comment(video.path)


def test_latents_become_a_folder_of_frames(toy, video, tmp_path, capsys):
    """Of the report's hash; what is no frame in the folder stops --overwrite, and its report stands for metadata."""
    output = tmp_path / "a.frames"
    output.mkdir()
    (output / "0012.png").touch()  # of a longer video
    command = ["decode", str(video.latents_path), "--model", str(toy), "-o", f"{output}/", "--overwrite"]
    assert run(command) == 0
    names = sorted(path.name for path in output.iterdir())
    assert names == [f"{number:04d}.png" for number in range(1, 10)]
    frames = np.stack([np.asarray(Image.open(output / name)) for name in names])
    report = json.loads((tmp_path / "a.json").read_text())
    assert report["video"]["frames_hash"] == hashlib.sha256(frames.tobytes()).hexdigest()
    assert report["video"]["file"] == "a.frames" and "sha256" not in report["video"]
    capsys.readouterr()
    assert run(["info", str(output)]) == 5 and "Give its report, a.json" in capsys.readouterr().err
    (output / "holiday.jpg").touch()
    assert run(command) == 2 and len(list(output.iterdir())) == 10
    assert "folder of other files, which slagen does not replace" in " ".join(capsys.readouterr().err.split())


def test_a_video_without_metadata(toy, video, tmp_path, capsys):
    output = tmp_path / "a.webm"
    command = ["decode", str(video.latents_path), "--model", str(toy), "-o", str(output)]
    assert run([*command, "--no-metadata", "--crf", "40"]) == 0 and read_comment(output) == ""
    assert b"red circle" not in output.read_bytes() and "a red circle" in (tmp_path / "a.json").read_text()
    capsys.readouterr()
    assert run(["info", str(output)]) == 5 and "Give its report, a.json" in capsys.readouterr().err


def test_a_black_video_is_told_as_generate_tells_it(toy, video, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        "slagen.generation.frames.stream_latents",
        lambda vae, latents, take, on_frame: take(torch.zeros(9, 128, 128, 3).byte()),
    )
    assert run(["decode", str(video.latents_path), "--model", str(toy), "-o", str(tmp_path / "v.mp4")]) == 0
    assert "every pixel of the video with seed 3 has the same colour, RGB 0, 0, 0" in capsys.readouterr().err


def test_what_takes_less_memory_is_what_decode_has(toy, video, tmp_path, monkeypatch, capsys):
    """It advised --size and --num-frames, which decode has not."""
    monkeypatch.setattr("slagen.generation.memory.memory_left", lambda: (0, "this machine's memory"))
    assert run(["decode", str(video.latents_path), "--model", str(toy), "-o", str(tmp_path / "v.mp4")]) == 1
    told = " ".join(capsys.readouterr().err.split())
    assert "Close other programs, or use --device cuda" in told and "--size" not in told and "--num-frames" not in told
    assert of_memory(MemoryError(), "decode") == "out of memory. Try closing other programs."


def test_info_shows_latents_and_how_to_decode_them(video, capsys):
    """It called them "neither" with a hint of weights."""
    assert run(["info", str(video.latents_path), "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert about["kind"] == "latents" and about["decode"] == f"slagen decode {video.latents_path}"
    assert about["settings"]["prompt"] == "a red circle" and about["latents_hash"] == video.report["latents_hash"]


@pytest.fixture
def broken_encoder(monkeypatch):
    def fail(*given):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(mp4.VideoWriter, "finish", fail)
    return monkeypatch


def test_a_video_that_cannot_be_written_leaves_its_latents(toy, video, tmp_path, broken_encoder, capsys):
    """The message names the command, and that makes the video, with its hashes."""
    output = tmp_path / "a video.mp4"
    with pytest.raises(SlagenError, match="No space left on device.*Free some space on the disk of") as told:
        generate(config(toy, output))
    broken_encoder.undo()
    command = shlex.split(str(told.value).partition(": slagen ")[2])
    assert command == ["decode", str(tmp_path / f"a video{kept.SUFFIX}"), "--model", str(toy)]
    assert run([*command, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["latents_hash"] == video.report["latents_hash"]
    assert report["video"]["sha256"] == video.report["video"]["sha256"]
    assert describe(output).settings["prompt"] == "a red circle"


def test_an_encoder_that_dies_is_not_blamed_on_the_disk(tmp_path):
    told = str(mp4.not_written(tmp_path / "v.mp4", OSError("ffmpeg exited with code -9")))
    assert "ffmpeg exited with code -9" in told and "space on the disk" not in told


def test_where_the_folder_takes_nothing_latents_are_kept_elsewhere(toy, tmp_path, broken_encoder):
    """And never over a file that is there."""
    full, other = tmp_path / "full", tmp_path / "other"
    other.mkdir()
    (other / f"v{kept.SUFFIX}").write_text("mine")
    broken_encoder.setattr(kept.tempfile, "gettempdir", lambda: str(other))
    write = kept.write_latents

    def on_a_full_disk(path, *arguments, **options):
        if path.parent == full:
            raise OSError(28, "No space left on device")
        write(path, *arguments, **options)

    broken_encoder.setattr(kept, "write_latents", on_a_full_disk)
    with pytest.raises(SlagenError) as told:
        generate(config(toy, full / "v.mp4"))
    command = shlex.split(str(told.value).partition(": slagen ")[2])
    assert command[:4] == ["decode", str(other / f"v-2{kept.SUFFIX}"), "--output", str(full / "v.mp4")]
    assert kept.read_latents(other / f"v-2{kept.SUFFIX}") and (other / f"v{kept.SUFFIX}").read_text() == "mine"


def test_latents_that_cannot_be_written_cost_no_report(toy, tmp_path, monkeypatch):
    """Both were lost, and the old report too, and no file was named."""
    output, other = tmp_path / "v" / "v.mp4", tmp_path / "other"
    other.mkdir()
    generate(config(toy, output, save_latents=True))
    write = kept.write_latents

    def on_a_full_disk(path, *arguments, **options):
        if path.parent != other:
            raise OSError(27, "File too large")
        write(path, *arguments, **options)

    monkeypatch.setattr(kept.tempfile, "gettempdir", lambda: str(other))
    monkeypatch.setattr(kept, "write_latents", on_a_full_disk)
    monkeypatch.setattr("slagen.generation.generate.write_latents", on_a_full_disk)
    file = other / f"v{kept.SUFFIX}"
    with pytest.raises(SlagenError) as told:
        generate(config(toy, output, save_latents=True, overwrite=True, fps=9))
    assert f"{output} was written, but {output.with_suffix(kept.SUFFIX)} could not be" in str(told.value)
    assert str(told.value).endswith(f"The latents are kept in {file}.")
    assert json.loads(output.with_suffix(".json").read_text())["video"]["fps"] == 9
    assert kept.read_latents(file)[1].report.video.fps == 9
    assert sorted(path.name for path in output.parent.iterdir()) == ["v.json", "v.mp4"]


def test_the_latents_of_a_video_go_with_it(toy, video, tmp_path):
    """`decode` made the first one's video of what lay beside the second."""
    output = tmp_path / "v.mp4"
    latents = output.with_suffix(kept.SUFFIX)
    latents.write_text("mine")
    output.write_bytes(b"before")
    generate(config(toy, output, overwrite=True))
    assert latents.read_text() == "mine"  # slagen did not write it
    for command in ("generate", "decode"):
        latents.write_bytes(video.latents_path.read_bytes())
        if command == "generate":
            generate(config(toy, output, overwrite=True))
        else:
            assert run(["decode", str(video.latents_path), "--model", str(toy), "-o", str(output), "--overwrite"]) == 0
        assert sorted(path.name for path in tmp_path.iterdir()) == ["v.json", "v.mp4"], command
    latents.write_bytes(video.latents_path.read_bytes())
    assert run(["decode", str(latents), "--model", str(toy), "--overwrite"]) == 0
    assert latents.is_file()  # whose video was made


@pytest.mark.parametrize("command", ["decode", "replay"])
def test_a_hub_model_that_only_a_file_names_is_not_fetched(video, tmp_path, capsys, monkeypatch, command):
    """Whoever made the file chose what was downloaded."""
    fetched = []

    def fetch(repo_id, **options):
        fetched.append((repo_id, options["local_files_only"]))
        raise SlagenError("fetched")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("slagen.wan.models.fetch_pipeline", fetch)
    if command == "decode":
        path = changed(
            video, tmp_path / "x.safetensors", about=lambda c: c["report"]["settings"].update(model="evil/m")
        )
    else:
        path = tmp_path / "x.json"
        path.write_text(json.dumps({**video.report, "settings": {**video.report["settings"], "model": "evil/m"}}))
    assert run([command, str(path), "--local-files-only"]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "was made with the Hugging Face model evil/m. Give --model evil/m to download it" in told and not fetched
    assert run([command, str(path), "--model", "evil/m", "--local-files-only"]) == 1
    monkeypatch.setattr("slagen.wan.models.is_cached", lambda repo_id: True)
    assert run([command, str(path)]) == 1
    assert fetched == [("evil/m", True), ("evil/m", False)]


def changed(video, path, *, tensor=lambda x: x, about=lambda content: None, names=("latents",), metadata=True):
    """The latents' file with a change."""
    latents = load_file(video.latents_path)["latents"]
    with safe_open(video.latents_path, framework="pt") as handle:
        content = json.loads(handle.metadata()[kept.METADATA])
    about(content)
    save_file({name: tensor(latents).clone() for name in names}, path,
              metadata={kept.METADATA: json.dumps(content)} if metadata else None)  # fmt: skip
    return path


NAN = torch.tensor(float("nan"))
DAMAGED = {
    "a-bit": ({"tensor": lambda x: x + 1e-3}, "changed or damaged"),
    "not-finite": ({"tensor": lambda x: x * NAN}, "NaN or Inf"),
    "half": ({"tensor": lambda x: x.half()}, "contains F16"),
    "shape": ({"tensor": lambda x: x[0]}, "but must contain float32 latents of one video"),
    "cut": ({"tensor": lambda x: x[:, :, :1]}, "changed or damaged"),
    "other-tensors": ({"names": ("latents", "x")}, "does not contain the latents"),
    "no-word": ({"metadata": False}, "not the settings that they were generated with"),
    "newer": ({"about": lambda c: c.update(version=2)}, "newer version of slagen"),
    "settings": ({"about": lambda c: c["report"].pop("settings")}, '"report" has no "settings"'),
    "size": ({"about": lambda c: c["report"]["settings"].update(size="64x128")}, "contains latents of"),
    "fps": ({"about": lambda c: c["report"]["settings"].update(fps=0)}, "fps"),
    "vae": ({"about": lambda c: c.update(vae_hash="0" * 64)}, "a different VAE"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_latents_are_refused(toy, video, tmp_path, capsys, name):
    change, words = DAMAGED[name]
    path = changed(video, tmp_path / "v.latents.safetensors", **change)
    assert run(["decode", str(path), "--model", str(toy)]) == 5
    assert words in " ".join(capsys.readouterr().err.split())
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


SECTIONS = {
    "attention": [{}, {"mode": "sla"}, {"mode": "sla", "tokens": "x"}, {"mode": "sla", "tokens": 1, "critical": 1}],
    "cost": [{}, {"amdahl_ceiling": "text"}],
    "timing": [{}, {"level": 1, "overhead_share": 0.0}],
    "steps": [[{}], [{"step": "x"}]],
    "weights": [{}, {"model_hash": ["x"], "used": {}}],
    "other": [float("nan"), float("inf"), {"a": [float("-inf")]}],
}  # fmt: skip


def test_a_report_that_cannot_be_shown_is_refused_before_decoding(video, tmp_path):
    """It came up when the video was there."""
    kept.read_latents(video.latents_path)
    for name, values in SECTIONS.items():
        for value in values:
            path = changed(video, tmp_path / "v.latents.safetensors",
                           about=lambda c, name=name, value=value: c["report"].update({name: value}))  # fmt: skip
            with pytest.raises(WeightsError, match="NaN or Inf" if name == "other" else f"report.{name}"):
                kept.read_latents(path)


def test_a_dangling_link_is_found_before_decoding(toy, video, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("slagen.generation.decode.load_pipeline", lambda *a, **k: pytest.fail("a model is loaded"))
    (tmp_path / "v.mp4").symlink_to(tmp_path / "nowhere")
    assert run(["decode", str(video.latents_path), "--model", str(toy), "-o", str(tmp_path / "v.mp4")]) == 2
    assert "exists. Choose another --output" in " ".join(capsys.readouterr().err.split())


def test_what_decode_is_not_given(toy, video, tmp_path, capsys):
    path, model = str(video.latents_path), ["--model", str(toy)]
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(video.latents_path.read_bytes()[:-9])
    for arguments, code, words in (
        ([str(cut)], 5, "corrupt or incomplete"),
        ([str(tmp_path / "none")], 2, "does not exist"),
        ([path], 2, "cannot be found. Give it with --model"),
        ([path, *model], 2, "exists. Choose another --output, or replace it with --overwrite"),
        (
            [path, *model, "-o", "x.mov"],
            2,
            "must be a file that ends in .mp4, .webm or .gif, or, for a folder of PNG frames",
        ),
        ([path, *model, "-o", "x.gif", "--crf", "20"], 2, "--crf is for .mp4 and .webm, but the output is 'x.gif'"),
        ([path, *model, "-o", "x.webm", "--crf", "64"], 2, "crf is 64, but must be a whole number from 0 to 63"),
    ):
        assert run(["decode", *arguments]) == code, arguments
        assert words in " ".join(capsys.readouterr().err.split())


@pytest.fixture
def ffmpeg(monkeypatch):
    """Sets the program that is called ffmpeg, and forgets what was found out about another."""
    yield lambda program: (monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", program), check_ffmpeg.cache_clear())
    monkeypatch.undo()
    check_ffmpeg.cache_clear()


@pytest.mark.parametrize("program", ["/nowhere/ffmpeg", "/bin/false", "/bin/true", "/", "ffmpeg-of-nobody"])
def test_a_broken_ffmpeg_is_found_before_anything_is_loaded(toy, video, tmp_path, capsys, monkeypatch, ffmpeg, program):
    """It came up after sampling, was blamed on the disk's free space, and nothing was kept."""
    for place in ("generation.sharing.Session", "generation.decode.load_pipeline", "training.setup.find_weights",
                  "batch.worker.find_weights"):  # fmt: skip
        monkeypatch.setattr(f"slagen.{place}", lambda *a, **k: pytest.fail("a model is looked for"))
    (tmp_path / "p.txt").write_text("a red circle")
    ffmpeg(program)
    for command in (
        ["generate", "a red circle", "--model", str(toy), "--output", str(tmp_path / "o")],
        ["batch", str(tmp_path / "p.txt"), "--model", str(toy), "--output", str(tmp_path / "o")],
        ["finetune", "--from-dense", "--self-generate", str(tmp_path / "p.txt"), "--output", str(tmp_path / "o")],
        ["replay", str(video.report_path), "--model", str(toy)],
        ["replay", str(video.path), "--model", str(toy)],
        ["info", str(video.path)],
        ["decode", str(video.latents_path), "-o", str(tmp_path / "x.mp4")],
    ):
        assert run(command) == 4, command
        told = capsys.readouterr().err
        assert "IMAGEIO_FFMPEG_EXE" in told and program in told and "libx264" in told
    assert not (tmp_path / "o").exists()


def test_ffmpeg_is_tried_once(monkeypatch, ffmpeg):
    """Not again for every video of a batch."""
    check_ffmpeg.cache_clear()
    calls = []
    true = mp4.subprocess.run
    monkeypatch.setattr(mp4.subprocess, "run", lambda *a, **k: (calls.append(a), true(*a, **k))[1])
    for _ in range(3):
        check_ffmpeg()
    assert len(calls) == 1
