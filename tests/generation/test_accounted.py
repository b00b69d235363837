"""The stages of a report add up to the run's own wall time, with every option that adds work of its own."""

import lora_forms
import public_forms as forms
import pytest
from safetensors.torch import save_file
from wan_models import build_transformer, save_pipeline

from slagen.generation import preview
from slagen.generation.config import GenerateConfig
from slagen.generation.generate import generate


def test_the_report_accounts_for_97_percent_with_every_option(tmp_path, monkeypatch):
    pytest.importorskip("peft", reason="a live LoRA needs the extra slagen[lora]")
    monkeypatch.setattr(
        preview, "colours_of", lambda vae: preview.WAN[-1 - vae.config.z_dim :]
    )  # of a toy there are none
    toy, model = save_pipeline(tmp_path / "toy", **forms.SIZES), build_transformer(**forms.SIZES)
    weights, lora = tmp_path / "fp8.safetensors", tmp_path / "style.safetensors"
    state = {name: x.bfloat16() for name, x in model.state_dict().items()}
    save_file({name: x.contiguous() for name, x in forms.scaled_fp8(state).items()}, weights)
    save_file({name: x.contiguous() for name, x in lora_forms.comfy(model).items()}, lora)
    config = GenerateConfig(
        "a red circle", model=str(toy), weights=str(weights), lora=f"{lora}:0.5", lora_merge=False, attention="dense",
        offload="none", vae_tiling="on", vae_dtype="fp32", preview=1, width=64, height=64, num_frames=5, steps=2,
        seed=1, device="cpu", output=str(tmp_path / "v.gif"),
    )  # fmt: skip
    record = generate(config, from_python=True).videos[0].record
    assert 0.97 <= record.stages_s["total"] / record.wall_s <= 1.0 and record.stages_s["preview"] > 0
    assert record.to_dict()["placement"] == {
        "offload": "none", "vae_tiling": True, "reason": "the model runs on the CPU", "expected_gib": None,
    }  # fmt: skip
