"""--vae-dtype: the same latents in frames that are nearly the same, recorded, and used again by `slagen decode`."""

import numpy as np
import pytest
import torch
from wan_models import save_pipeline

from slagen.doctor.selftest import _vae_in_bf16
from slagen.errors import UsageError
from slagen.generation import memory
from slagen.generation.config import GenerateConfig
from slagen.generation.decode import decode
from slagen.generation.estimate import plan
from slagen.generation.generate import generate
from slagen.wan.presets import WAN_1_3B


def test_a_vae_in_bf16(tmp_path):
    toy, made = save_pipeline(tmp_path / "toy"), {}
    for name in ("auto", "fp32", "bf16"):
        config = GenerateConfig(
            "a red circle", model=str(toy), attention="dense", width=64, height=64, num_frames=5, steps=1, seed=1,
            device="cpu", vae_dtype=name, save_latents=True, output=str(tmp_path / f"{name}.mp4"),
        )  # fmt: skip
        made[name] = generate(config, from_python=True).videos[0]
    assert len({video.record.latents_hash for video in made.values()}) == 1
    assert np.array_equal(made["auto"].frames, made["fp32"].frames)
    off = np.abs(made["fp32"].frames.astype(int) - made["bf16"].frames).mean()
    assert 0 < off < 3, off  # of 255; the VAE is random
    assert "vae_dtype" not in made["auto"].record.settings and made["bf16"].record.settings["vae_dtype"] == "bf16"
    again = (
        decode(str(made["bf16"].latents_path), str(tmp_path / "again.mp4"), model=str(toy), device="cpu")
        .videos[0]
        .record
    )
    assert again.video.frames_hash == made["bf16"].record.video.frames_hash


def test_bf16_takes_half_of_what_decoding_takes(tmp_path):
    with pytest.raises(UsageError, match="vae_dtype is 'fp16'"):
        GenerateConfig("x", vae_dtype="fp16")
    sizes = [memory.activations(WAN_1_3B, 0, memory.WAN_VAE, 10**6, 0, 2, item) for item in (4, 2)]
    sizes = [decode - memory.DECODER_BYTES for _, decode, _ in sizes]
    assert sizes[0] == 2 * sizes[1]
    assert "PSNR" in _vae_in_bf16(torch.device("cpu"))


def test_a_plan_of_a_model_that_is_not_here_counts_it():
    """Its decoding was counted in float32 all the same."""
    names = ("fp32", "bf16")
    whole, half = (plan(GenerateConfig("x", model="wan2.1-t2v-1.3b", vae_dtype=name)).memory_gib for name in names)
    assert half.stages["decode"].weights == whole.stages["decode"].weights / 2
    assert half.stages["decode"].activations < 0.7 * whole.stages["decode"].activations
    assert half.cpu.decode < 0.7 * whole.cpu.decode
