"""--preview: pictures of the latents beside the video while it is made, in the colours that it will have."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from wan_models import save_pipeline

from slagen.cli.main import run
from slagen.errors import UsageError
from slagen.generation import preview
from slagen.generation.config import GenerateConfig
from slagen.wan.folder import bundled_folder
from slagen.wan.vae import decode_latents, load_vae

TOY = [
    "--size", "128x128", "--num-frames", "9", "--steps", "3", "--seed", "3", "--guidance-scale", "1",
    "--allow-untrained", "--device", "cpu",
]  # fmt: skip


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return str(save_pipeline(tmp_path_factory.mktemp("preview") / "toy"))


def test_pictures_are_written_and_go(toy, tmp_path, monkeypatch, capsys):
    """After each N-th step, whole; their time is a stage of its own, and the stages are still all of the time."""
    seen = []
    write = preview.write_bytes
    monkeypatch.setattr(preview, "write_bytes", lambda path, data: (write(path, data), seen.append(path.read_bytes())))
    monkeypatch.setattr(preview, "colours_of", lambda vae: preview.WAN[-1 - vae.config.z_dim :])
    video = tmp_path / "v.mp4"
    assert run(["generate", "x", "--model", toy, *TOY, "--preview", "2", "-o", str(video), "--json"]) == 0
    assert len(seen) == 1 and Image.open(io.BytesIO(seen[0])).size == (2 * 128, 128)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["v.json", "v.mp4"]
    report = json.loads(capsys.readouterr().out)
    stages = report["stages_s"]
    assert stages["preview"] > 0 and stages["total"] == pytest.approx(report["wall_s"], rel=0.03)
    assert stages["denoise"] * 1e3 >= sum(step["latency_ms"] for step in report["steps"]) * 0.97


def test_a_file_of_that_name_that_is_no_preview_stays(toy, tmp_path, capsys):
    (tmp_path / "v.preview.png").write_bytes(b"mine")
    command = ["generate", "x", "--model", toy, *TOY, "--preview", "2", "-o", str(tmp_path / "v.mp4")]
    assert run(command) == 2 and "v.preview.png exists" in " ".join(capsys.readouterr().err.split())
    assert run(["generate", "x", "--preview", "0"]) == 2 and "preview is 0" in capsys.readouterr().err


def test_a_vae_whose_colours_are_not_known_has_no_preview(tmp_path):
    told = []
    vae = type("Vae", (), {"config": type("Config", (), {"base_dim": 8, "patch_size": None, "z_dim": 16})})
    shown = preview.Preview(tmp_path / "v.mp4", 1, vae, told.append)
    assert not shown.take(None, 0, torch.zeros(1, 16, 1, 2, 2)) and not list(tmp_path.iterdir())
    assert [event.kind for event in told] == ["warning"]


def test_the_colours_of_the_bundled_model_are_those_of_its_decoder():
    """Of plain latents of a video: grey ones scaled towards the colour that one channel stands for would not do."""
    folder = bundled_folder() / "vae"
    vae = load_vae(folder, folder)
    assert preview.colours_of(vae) is preview.TINY
    red = np.array([0.9, 0.1, 0.1])
    with torch.inference_mode():
        mean, std = (torch.tensor(vae.config[name]).view(1, 16, 1, 1, 1) for name in ("latents_mean", "latents_std"))
        pixels = torch.tensor(red * 2 - 1).float().view(1, 3, 1, 1, 1).expand(1, 3, 5, 32, 32)
        latents = (vae.encode(pixels).latent_dist.mode() - mean) / std
        decoded = decode_latents(vae, latents).float()[1:].mean((0, 1, 2)).numpy()
    shown = np.asarray(Image.open(io.BytesIO(preview.picture(latents, preview.TINY))), np.float32).mean((0, 1))
    assert np.abs(shown - decoded).max() < 60 and shown[0] - shown[1:].max() > 60


def test_a_batch_and_a_result_in_memory_have_none(monkeypatch):
    from slagen import generate
    from slagen.batch.config import BatchConfig

    with pytest.raises(UsageError, match="a batch generates many"):
        BatchConfig("p.txt", GenerateConfig("x", preview=2))
    with pytest.raises(UsageError, match="there is no output"):
        generate("x", preview=2)
