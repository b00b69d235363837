"""Weights of int8 and fp8 stay so in memory: bytes counted, and what they compute is that of the weights multiplied
out."""

import dataclasses

import lora_forms
import public_forms as forms
import pytest
import torch
from accelerate import init_empty_weights
from diffusers import WanPipeline, WanTransformer3DModel
from safetensors.torch import save_file
from wan_models import build_transformer, save_pipeline

from slagen.attention.sla.config import SLAConfig
from slagen.formats.layouts import LINEARS_OF_A_BLOCK
from slagen.formats.lora import check_lora, read_lora
from slagen.formats.quantised import FP8, Codes
from slagen.formats.quantised_linear import describe, held_bytes, keep_quantised, quantised_layers
from slagen.formats.sla import weights_hash
from slagen.generation.config import GenerateConfig
from slagen.generation.generate import generate
from slagen.wan.building import no_random_init
from slagen.wan.fill import fill
from slagen.wan.folder import describe_folder
from slagen.wan.lora import Loras
from slagen.wan.presets import WAN_1_3B
from slagen.wan.processor import install, remove
from slagen.wan.transformer import load_transformer, wan_config

FORMS = {
    "turbo-int8": lambda s: forms.quantised(forms.turbo(s, forms.projections())),
    "fp8-e4m3fn": forms.fp8(FP8[0]), "fp8-e5m2": forms.fp8(FP8[1]), "scaled-fp8": forms.scaled_fp8,
    "comfy-quant": forms.comfy_quant, "row-int8": forms.lightx2v(torch.int8), "scale-inv": forms.scale_inv,
}  # fmt: skip


@pytest.fixture(scope="module")
def state():
    return {name: x.bfloat16() for name, x in build_transformer(**forms.SIZES).state_dict().items()}


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return save_pipeline(tmp_path_factory.mktemp("model") / "toy", **forms.SIZES)


@pytest.fixture
def sources(toy, state, tmp_path):
    def of(form):
        path = tmp_path / "weights.safetensors"
        save_file({name: x.contiguous() for name, x in FORMS[form](state).items()}, path)
        return dataclasses.replace(describe_folder(toy, "toy"), weights=path)

    return of


def output(model, dtype):
    draw = lambda seed, *shape: torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)  # noqa: E731
    with torch.no_grad():
        return model(draw(0, 1, 4, 2, 4, 4), torch.tensor([500.0]), draw(1, 1, 8, 32), return_dict=False)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("form", FORMS)
def test_what_stays_quantised_computes_what_its_product_does(form, dtype, sources):
    source = sources(form)
    plain, kept = load_transformer(source, dtype), load_transformer(source, dtype, quantised=True)
    assert len(quantised_layers(kept)) == (10 if form == "comfy-quant" else 20) and not quantised_layers(plain)
    assert torch.equal(output(plain, dtype), output(kept, dtype))
    assert weights_hash(kept) == weights_hash(plain)
    held, full = held_bytes(kept)
    assert full == held_bytes(plain)[1] == held_bytes(plain)[0] > held
    assert (
        f"{held / 2**30:.2f} GiB of memory instead of {full / 2**30:.2f}" in describe(kept) and describe(plain) is None
    )
    assert kept.to(torch.float64).blocks[0].attn1.to_q.weight.element_size() == 1  # a cast leaves the codes alone


@pytest.mark.parametrize(("form", "block"), [(torch.int8, 128), (torch.float8_e4m3fn, 0)], ids=["int8", "fp8"])
def test_a_true_1_3b_takes_at_most_055_of_the_bytes_of_bf16(form, block):
    with init_empty_weights(include_buffers=True), no_random_init():
        model = WanTransformer3DModel(**wan_config(WAN_1_3B)).to(torch.bfloat16)
    before = held_bytes(model)[0]
    kept = {}
    for name, x in model.state_dict().items():
        if LINEARS_OF_A_BLOCK.fullmatch(name):
            shape = tuple(-(-size // block) for size in x.shape) if block else ()
            kept[name] = Codes(x.to(form), torch.empty(shape, device="meta"), block)
    keep_quantised(model, kept, torch.bfloat16)
    held = sum(x.numel() * x.element_size() for x in (*model.parameters(), *model.buffers()))
    assert len(kept) == 300 and held <= 0.55 * before, held / before


def test_a_video_of_a_quant_file_is_that_of_its_product(toy, sources, tmp_path, monkeypatch):
    source, notes = sources("turbo-int8"), []
    config = GenerateConfig(
        "a red circle", model=str(toy), weights=str(source.weights), device="cpu", dtype="bf16", seed=1, steps=1,
        width=64, height=64, num_frames=1, output=str(tmp_path / "v.mp4"),
    )  # fmt: skip
    kept = generate(config, lambda event: notes.append(event.text), write=False).videos[0].record
    assert any("the weights of 20 layers stay in int8" in note for note in notes)
    monkeypatch.setattr(
        "slagen.wan.loading.load_transformer", lambda source, dtype, quantised: load_transformer(source, dtype)
    )
    full = generate(config, write=False).videos[0].record
    assert kept.latents_hash == full.latents_hash and kept.weights.model_hash == full.weights.model_hash


@pytest.mark.parametrize("merge", [True, False], ids=["merged", "live"])
def test_a_lora_on_quantised_weights_changes_what_it_would_change_of_their_product(merge, sources, state, tmp_path):
    pytest.importorskip("peft", reason="a live LoRA needs the extra slagen[lora]")
    source, file = sources("scaled-fp8"), tmp_path / "style.safetensors"
    save_file({name: x.contiguous() for name, x in lora_forms.comfy(build_transformer(**forms.SIZES)).items()}, file)
    models = [load_transformer(source, torch.float32, quantised=quantised) for quantised in (False, True)]
    before, found = output(models[0], torch.float32), []
    for model in models:
        pipe = WanPipeline(None, None, None, None, transformer=model)
        loras = Loras(pipe, [check_lora(read_lora(file), source.shape, "toy")], merge=merge, keep=True)
        loras.set_scales([1.0])
        found.append(output(model, torch.float32))
    assert torch.equal(*found) and not torch.equal(found[0], before)
    assert bool(quantised_layers(models[1])) is not merge
    assert ("--no-lora-merge leaves them in 8 bits" in (loras.describe() or "")) is merge
    loras.remove()
    assert torch.equal(output(models[1], torch.float32), before)


def test_a_file_of_slagens_that_changes_quantised_weights_holds_these_in_full(sources, tmp_path):
    model = load_transformer(sources("turbo-int8"), torch.float32, quantised=True)
    before, found = output(model, torch.float32), weights_hash(model)
    install(model, SLAConfig())
    name = "blocks.1.ffn.net.2.weight"
    projections = {key: x for key, x in model.state_dict().items() if "proj_l" in key}
    fill(model, {**projections, name: torch.zeros(128, 64)}, "x", True, [])
    assert len(quantised_layers(model)) == 19 and not model.blocks[1].ffn.net[2].weight.any()
    remove(model)
    install(model, None)
    assert torch.equal(output(model, torch.float32), before) and weights_hash(model) == found
