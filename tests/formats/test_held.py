"""Bytes that weights take in memory, by the headers of their files: as the loaded model has them, and as plans say."""

import dataclasses

import public_forms as forms
import pytest
import torch
from safetensors.torch import save_file
from wan_models import build_transformer, save_pipeline

from slagen.formats.held import held, transformer_files
from slagen.formats.quantised_linear import held_bytes
from slagen.generation.config import GenerateConfig
from slagen.generation.estimate import plan
from slagen.generation.memory import need
from slagen.wan.folder import describe_folder
from slagen.wan.info import info
from slagen.wan.transformer import load_transformer

FP8 = torch.float8_e4m3fn
FORMS = {
    "plain": forms.wan, "int8": lambda s: forms.quantised(forms.wan(s)), "fp8": forms.fp8(FP8),
    "scaled-fp8": forms.scaled_fp8, "rows": forms.lightx2v(torch.int8),
}  # fmt: skip


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return save_pipeline(tmp_path_factory.mktemp("model") / "toy", **forms.SIZES)


@pytest.fixture(scope="module")
def state():
    return {name: x.bfloat16() for name, x in build_transformer(**forms.SIZES).state_dict().items()}


@pytest.mark.parametrize("form", FORMS)
def test_files_take_what_the_loaded_model_takes(form, toy, state, tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file({name: x.contiguous() for name, x in FORMS[form](state).items()}, path)
    source = dataclasses.replace(describe_folder(toy, "toy"), weights=path)
    in_memory, full = held_bytes(load_transformer(source, torch.float32, quantised=True))
    found = held(transformer_files(path), 4)
    assert abs(found.held - in_memory) < 128  # marks and scales for multiplying in 8 bits
    assert abs(found.full(4).held - full) < 0.02 * full  # the scales
    assert bool(found.in_8_bits) is (form != "plain") and transformer_files(toy) != []
    parts = {"parts": ("transformer",)}
    takes = [need(one, 64, 64, 5, 4, **parts, merges=merges) for one, merges in ((source, False), (source, True))]
    assert takes[0].weights == found.held and takes[1].weights == (found.full(4) if form != "plain" else found).held


def test_a_plan_for_a_quantised_file_shows_that_it_takes_less(toy, state, tmp_path):
    paths = {name: tmp_path / f"{name}.pth" for name in ("plain", "int8")}
    for name, path in paths.items():
        torch.save(FORMS[name](state), path)
    torch.save({"a.weight": torch.zeros(1)}, tmp_path / "other.pth")
    assert transformer_files(tmp_path / "other.pth") == [] == transformer_files(tmp_path / "none.safetensors")
    config = dict(prompt="x", model=str(toy), attention="dense", width=64, height=64, num_frames=5, lora=())
    plans = {name: plan(GenerateConfig(**config, weights=str(path))) for name, path in paths.items()}
    weights = {name: made.memory_gib.stages["denoise"].weights for name, made in plans.items()}
    assert weights["int8"] < 0.7 * weights["plain"]  # of a model this small, more is outside of the blocks
    assert any("stay so: the transformer takes" in note for note in plans["int8"].notes)
    assert not any("stay so" in note for note in plans["plain"].notes)
    told = {name: info(str(path)).to_dict().get("memory_gib") for name, path in paths.items()}
    assert told["plain"] is None and told["int8"].keys() == {"held", "bf16"}
