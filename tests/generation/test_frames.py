"""Frames are encoded while the next ones are decoded: the same video, and nothing where it does not end."""

import json

import numpy as np
import pytest
import torch
from wan_models import build_pipeline, save_pipeline

from slagen import video as mp4
from slagen.errors import SlagenError
from slagen.generation.config import GenerateConfig
from slagen.generation.frames import EncodedFrames, Frames
from slagen.generation.generate import generate
from slagen.video import encode_video, read_comment, read_mp4
from slagen.wan.folder import bundled_folder
from slagen.wan.vae import load_vae, num_parts, stream_latents


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return save_pipeline(tmp_path_factory.mktemp("frames") / "toy")


def config(toy, output):
    return GenerateConfig(
        "a red circle", model=str(toy), attention="dense", width=64, height=64, num_frames=9, steps=1, seed=3,
        device="cpu", output=str(output),
    )  # fmt: skip


def on_decoded(call):
    """What takes events, and hands on how many latent frames are decoded."""
    stages = []

    def note(event):
        if event.kind == "stage":
            stages.append(event.text)
        elif event.kind == "part" and stages[-1] == "decode":
            call(event.done)

    return note


@pytest.mark.parametrize("vae", ["plain", "patches", "tiles"])
def test_frames_come_by_latent_frame_and_are_those_of_the_whole(vae):
    """As diffusers decodes all at once; only in tiles they cannot come one by one."""
    model = load_vae(*[bundled_folder() / "vae"] * 2) if vae == "patches" else build_pipeline().vae
    if vae == "tiles":
        model.enable_tiling(32, 32, 24, 24)
    latents = torch.randn(1, model.config.z_dim, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(model.config[name]).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    parts, done = [], []
    with torch.inference_mode():
        stream_latents(model, latents, parts.append, done.append)
        whole = model.decode(latents * std + mean, return_dict=False)[0][0]
    assert done[-1] == num_parts(model, latents) == (3 * 9 if vae == "tiles" else 3)
    assert [len(part) for part in parts] == ([9] if vae == "tiles" else [1, 4, 4])
    expected = whole.float().add(1).mul(127.5).round().clamp(0, 255).byte().permute(1, 2, 3, 0)
    assert torch.equal(torch.cat(parts), expected)


@pytest.mark.parametrize("name", ["v.mp4", "v.webm", "v.gif", "v.frames"])
def test_the_file_is_that_of_all_frames_at_once(toy, tmp_path, name, monkeypatch):
    """Byte for byte, with the hash of all frames in it; each part is on its way before the next one is decoded."""
    order = []
    write = mp4.VideoWriter.write
    monkeypatch.setattr(
        mp4.VideoWriter, "write", lambda self, frames: (order.append(f"encode {len(frames)}"), write(self, frames))
    )

    path = tmp_path / name
    (video,) = generate(config(toy, path), on_decoded(lambda done: order.append("decoded")), from_python=True).videos
    assert order == ["decoded", "encode 1", "decoded", "encode 4", "decoded", "encode 4"]
    again = tmp_path / "again" / name
    again.parent.mkdir()
    encode_video(video.frames, again, 16, "" if name.endswith(("gif", "frames")) else read_comment(path))
    files = sorted(each for each in (again.iterdir() if again.is_dir() else [again]))
    for file in files:
        other = path / file.name if again.is_dir() else path
        if name == "v.webm":  # which has a random id
            assert np.array_equal(read_mp4(file), read_mp4(other))
        else:
            assert file.read_bytes() == other.read_bytes()
    assert len(files) == (9 if again.is_dir() else 1)
    if name.endswith(("mp4", "webm")):
        assert json.loads(read_comment(path))["video"]["frames_hash"] == video.report["video"]["frames_hash"]


def test_only_what_is_asked_for_is_kept_in_memory(tmp_path):
    part = torch.zeros(4, 16, 16, 3).byte()
    with EncodedFrames(tmp_path / "v.mp4", 8, None, keep=False) as held:
        held.take(part)
        assert not held._parts and held.shape == (4, 16, 16, 3) and held.is_plain
    whole = Frames()
    for each in (part, part + 1):
        whole.take(each)
    assert np.array_equal(whole.whole()[3:5, 0, 0, 0], [0, 1]) and not whole.is_plain
    assert held.sha256 != whole.sha256 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SlagenError], ids=["Ctrl-C", "NaN"])
def test_what_stops_in_between_leaves_nothing(toy, tmp_path, stop, monkeypatch):
    """Neither a file under any name nor a process."""
    started = []
    popen = mp4.subprocess.Popen
    monkeypatch.setattr(mp4.subprocess, "Popen", lambda *a, **o: started.append(popen(*a, **o)) or started[-1])

    def halt(done):
        if done == 2:
            raise stop("in between")

    with pytest.raises(stop):
        generate(config(toy, tmp_path / "v.mp4"), on_decoded(halt))
    assert started and all(process.poll() is not None for process in started) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["__init__", "write", "finish"])
def test_a_full_disk_is_told_in_the_end_and_keeps_the_latents(toy, tmp_path, place, monkeypatch):
    def full(*given, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(mp4.VideoWriter, place, full)
    with pytest.raises(SlagenError, match="No space left on device.*latents are saved"):
        generate(config(toy, tmp_path / "v.mp4"))
    assert [path.name for path in tmp_path.iterdir()] == ["v.latents.safetensors"]
