"""LoRA files in every public form: what they change is what diffusers' own loader changes."""

import copy
import json

import lora_forms as forms
import peft
import pytest
import torch
from public_forms import LORA_PAIRS, lora
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from wan_models import build_pipeline

import slagen
from slagen.attention.cost import ModelShape
from slagen.attention.sla.config import SLAConfig
from slagen.benchmark import loop
from slagen.benchmark.config import BenchConfig
from slagen.errors import WeightsError
from slagen.formats.lora import check_lora, read_lora
from slagen.generation.lora import AskedLora
from slagen.generation.lora_files import describe_loras, lora_file
from slagen.wan.info import info
from slagen.wan.lora import Loras
from slagen.wan.processor import processors

SHAPE = ModelShape(2, 2, 16, 64, 8)


@pytest.fixture(scope="module")
def pipe():
    return build_pipeline()


@torch.no_grad()
def velocity(pipe):
    """What the transformer computes for one step."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(size, generator=generator) for size in ((1, 4, 2, 8, 8), (1, 8, 32))]
    return pipe.transformer(inputs[0], torch.tensor([500]), inputs[1], return_dict=False)[0]


def written(tmp_path, tensors, name="style.safetensors"):
    save_file({key: tensor.contiguous().clone() for key, tensor in tensors.items()}, tmp_path / name)
    return tmp_path / name


def with_loras(pipe, *paths, merge=True, keep=False):
    made = copy.deepcopy(pipe)
    files = [check_lora(read_lora(path), SHAPE, "toy") for path in paths]
    return made, Loras(made, files, merge=merge, keep=keep)


def by_diffusers(pipe, path, scale=1.0):
    made = copy.deepcopy(pipe)
    made.load_lora_weights(path.parent, weight_name=path.name, adapter_name="style")
    made.set_adapters(["style"], [scale])
    return velocity(made)


@pytest.mark.parametrize("form", forms.READ_BY_DIFFUSERS, ids=lambda form: form.__name__)
def test_a_lora_changes_the_video_as_diffusers_own_loader_does(pipe, tmp_path, form):
    path = written(tmp_path, form(pipe.transformer))
    expected = by_diffusers(pipe, path, 0.7)
    assert (expected - velocity(pipe)).abs().max() > 0.01 * expected.abs().max()
    for merge in (True, False):
        made, loras = with_loras(pipe, path, merge=merge)
        assert not loras.files[0].unmatched
        loras.set_scales([0.7])
        torch.testing.assert_close(velocity(made), expected, atol=2e-5, rtol=2e-4)


@pytest.mark.parametrize("form", forms.LIKE_DIFFUSERS, ids=lambda form: form.__name__)
def test_forms_that_diffusers_passes_over_mean_the_same(pipe, tmp_path, form):
    """Without a prefix its loader warns and loads nothing."""
    expected = by_diffusers(pipe, written(tmp_path, forms.diffusers(pipe.transformer), "known.safetensors"))
    made, loras = with_loras(pipe, written(tmp_path, form(pipe.transformer)))
    loras.set_scales([1.0])
    torch.testing.assert_close(velocity(made), expected, atol=2e-5, rtol=2e-4)


FLAT = {
    "lora_unet_blocks_0_cross_attn_o": "blocks.0.attn2.to_out.0",
    "lora_unet_blocks_1_ffn_2": "blocks.1.ffn.net.2",
    "lora_unet_time_projection_1": "condition_embedder.time_proj",
    "lora_unet_head_head": "proj_out",
    "lycoris_blocks_1_ffn_net_0_proj": "blocks.1.ffn.net.0.proj",
    "lycoris_blocks_0_attn1_to_out_0": "blocks.0.attn1.to_out.0",
    "lora_transformer_condition_embedder_text_embedder_linear_2": "condition_embedder.text_embedder.linear_2",
}


def test_every_name_of_a_pair_is_read(tmp_path):
    wanted = [(pair, "blocks.0.attn1.to_q") for pair in LORA_PAIRS]
    wanted += [(f"{name}.lora_{{}}.weight:down up", layer) for name, layer in FLAT.items()]
    for number, (pair, layer) in enumerate(wanted):
        found = read_lora(written(tmp_path, lora(pair), f"{number}.safetensors"))
        assert {name: set(roles) for name, roles in found.layers.items()} == {layer: {"down", "up"}}


def test_several_loras_whose_scales_change(pipe, tmp_path):
    """What was merged before is taken out to the bit, and a scale of 0 is no LoRA."""
    one = written(tmp_path, forms.distilled(pipe.transformer), "one.safetensors")
    two = written(tmp_path, forms.musubi(pipe.transformer, rank=2, seed=5), "two.safetensors")
    plain = velocity(pipe)
    merged, loras = with_loras(pipe, one, two, keep=True)
    live, beside = with_loras(pipe, one, two, merge=False)
    for scales in ((0.5, -0.4), (0.0, 1.0), (1.0, 0.0), (0.0, 0.0)):
        loras.set_scales(scales)
        beside.set_scales(scales)
        found = velocity(merged)
        torch.testing.assert_close(velocity(live), found, atol=2e-5, rtol=2e-4)
        only = [path for path, scale in zip((one, two), scales, strict=True) if scale]
        if len(only) == 1:
            torch.testing.assert_close(found, by_diffusers(pipe, only[0]), atol=2e-5, rtol=2e-4)
    assert torch.equal(found, plain) and torch.equal(velocity(live), plain)
    loras.set_scales((1.0, 1.0))
    for each in (loras, beside):
        each.remove()
    names = pipe.transformer.state_dict().keys()
    assert torch.equal(velocity(merged), plain) and torch.equal(velocity(live), plain)
    assert live.transformer.state_dict().keys() == names


def test_what_sla_learned_is_untouched(pipe, tmp_path):
    """Every linear layer of self-attention has a LoRA, but `proj_l` has none."""
    made = copy.deepcopy(pipe)
    slagen.apply_sla(made, SLAConfig(0.5, block_m=16, block_n=16))
    for processor in processors(made.transformer):
        torch.nn.init.normal_(processor.proj_l.weight)
    before = {name: x.clone() for name, x in made.transformer.state_dict().items() if "proj_l" in name}
    path = written(tmp_path, forms.distilled(pipe.transformer))
    plain, found = velocity(made), []
    for merge in (True, False):
        loras = Loras(made, [check_lora(read_lora(path), SHAPE, "toy")], merge=merge, keep=True)
        loras.set_scales([1.0])
        after = made.transformer.state_dict()
        assert before and all(torch.equal(after[name], tensor) for name, tensor in before.items())
        found.append(velocity(made))
        loras.remove()
    torch.testing.assert_close(found[0], found[1], atol=5e-5, rtol=5e-4)
    assert torch.equal(velocity(made), plain) and not torch.allclose(found[0], plain, atol=1e-3)


def refused(tmp_path, tensors, words, shape=SHAPE):
    with pytest.raises(WeightsError, match=words):
        check_lora(read_lora(written(tmp_path, tensors, f"{len(list(tmp_path.iterdir()))}.safetensors")), shape, "toy")


def test_what_is_no_lora_for_the_model_is_refused(pipe, tmp_path):
    tensors = forms.kijai(pipe.transformer)
    wide = ModelShape(2, 40, 128, 13824, 512)
    refused(tmp_path, tensors, "for a transformer of width 32, but toy has width 5120. Give a LoRA for this", wide)
    large = {name: torch.zeros(4, 5120) if "down" in name else torch.zeros(5120, 4) for name in tensors}
    refused(tmp_path, large, "width 5120, but toy has width 32. Give a LoRA for this model, or --model wan2.1-t2v-14b")
    half = {name: tensor for name, tensor in tensors.items() if "ffn.0.lora_up" not in name}
    refused(tmp_path, half, "blocks.0.ffn.net.0.proj lacks one of its two matrices")
    other = {**tensors, "diffusion_model.blocks.1.ffn.0.lora_up.weight": torch.zeros(63, 4)}
    refused(tmp_path, other, r"changes a weight by \(63, 4\) times \(4, 32\), but the model's is \(64, 32\)")
    other = {**tensors, "diffusion_model.blocks.1.ffn.0.alpha": torch.zeros(2)}
    refused(tmp_path, other, r"the alpha of blocks.1.ffn.net.0.proj has the shape \(2,\), but must be one number")
    text = {"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.zeros(4, 8)}
    refused(tmp_path, text, "none of its 1 tensor changes a layer, such as lora_te_text_model")
    later = {name.replace("blocks.0", "blocks.7"): x for name, x in tensors.items() if "blocks.0" in name}
    refused(tmp_path, later, "changes no layer of toy, which has only 2 blocks")
    two = forms.diffusers(pipe.transformer)
    two |= {name.replace("transformer.", "transformer_2."): tensor for name, tensor in two.items()}
    refused(tmp_path, two, "changes a layer twice")
    refused(tmp_path, pipe.transformer.state_dict(), "holds a transformer, not a LoRA. Give it with --weights")
    dora = {**tensors, "diffusion_model.blocks.0.self_attn.q.dora_scale": torch.zeros(32, 1)}
    refused(tmp_path, dora, "is a DoRA")
    refused(tmp_path, {"lycoris_blocks_0_self_attn_q.lokr_w1": torch.zeros(2, 2)}, "is a LoKr adapter")


def test_nan_is_refused_before_anything_is_changed(pipe, tmp_path):
    tensors = forms.comfy(pipe.transformer)
    next(iter(tensors.values()))[0, 0] = torch.nan
    with pytest.raises(WeightsError, match="contains NaN or Inf in diffusion_model.blocks.0.self_attn.q.lora_A.weight"):
        with_loras(pipe, written(tmp_path, tensors))


def test_tensors_without_effect_are_named(pipe, tmp_path):
    """Of an image branch, and of further blocks."""
    tensors = forms.comfy(pipe.transformer)
    tensors["diffusion_model.blocks.0.cross_attn.k_img.lora_A.weight"] = torch.zeros(4, 32)
    tensors["diffusion_model.blocks.2.self_attn.q.lora_A.weight"] = torch.zeros(4, 32)
    file = check_lora(read_lora(written(tmp_path, tensors)), SHAPE, "toy")
    notes, warnings = describe_loras([file], [AskedLora("style.safetensors", 0.5)])
    assert notes == ["LoRA style.safetensors at scale 0.5: 40 tensors for 20 layers of this model"]
    assert warnings == [
        "2 of 42 tensors in style.safetensors match no layer of this model and are not used: "
        "diffusion_model.blocks.0.cross_attn.k_img.lora_A.weight, diffusion_model.blocks.2.self_attn.q.lora_A.weight"
    ]


@pytest.mark.parametrize("rslora", [False, True])
def test_alpha_in_the_settings_of_peft(pipe, tmp_path, rslora):
    """diffusers writes them into the file's metadata, and reads them there; peft beside the file."""
    made = copy.deepcopy(pipe)
    config = peft.LoraConfig(
        r=4, lora_alpha=12, target_modules=["to_q", "ffn.net.2"], init_lora_weights=False, use_rslora=rslora,
        alpha_pattern={"blocks.1.ffn.net.2": 3},
    )  # fmt: skip
    torch.manual_seed(0)
    made.transformer.add_adapter(config)
    expected = velocity(made)
    made.transformer.save_lora_adapter(tmp_path, weight_name="adapter_model.safetensors")
    tensors = {f"base_model.model.{name}": x for name, x in load_file(tmp_path / "adapter_model.safetensors").items()}
    of_diffusers = {f"transformer.{name}": x for name, x in json.loads(metadata_of(tmp_path)).items()}
    save_file(tensors, tmp_path / "own.safetensors", {"lora_adapter_metadata": json.dumps(of_diffusers)})
    (tmp_path / "peft").mkdir()
    save_file(tensors, tmp_path / "peft" / "adapter_model.safetensors")
    config.save_pretrained(tmp_path / "peft")
    for path in (tmp_path / "own.safetensors", lora_file(tmp_path / "peft")):
        merged, loras = with_loras(pipe, path)
        loras.set_scales([1.0])
        torch.testing.assert_close(velocity(merged), expected, atol=2e-5, rtol=2e-4)


def metadata_of(folder):
    with safe_open(folder / "adapter_model.safetensors", "pt") as handle:
        return handle.metadata()["lora_adapter_metadata"]


def test_info_of_a_lora(pipe, tmp_path):
    about = info(str(written(tmp_path, forms.kijai(pipe.transformer)))).to_dict()
    found = {name: about[name] for name in ("kind", "tensors", "changed", "width", "ranks", "unmatched")}
    assert found == {"kind": "lora", "tensors": 60, "changed": 20, "width": 32, "ranks": [4], "unmatched": []}
    other = info(str(written(tmp_path, {"unet.conv.lora_A.weight": torch.zeros(2, 2)}, "other.safetensors")))
    assert "none of its 1 tensor changes a layer" in other.meaning


def test_the_denoising_loop_of_bench_has_the_lora(pipe, tmp_path):
    path = written(tmp_path, forms.kijai(pipe.transformer))
    for merge, told in ((None, "merged"), (False, "not merged")):
        made, notes = copy.deepcopy(pipe), []
        config = BenchConfig(model="toy", lora=f"{path}:0.7", lora_merge=merge)
        assert loop._add_loras(made, config, "toy", notes.append) == f"{path}:0.7 ({told})"
        torch.testing.assert_close(velocity(made), by_diffusers(pipe, path, 0.7), atol=2e-5, rtol=2e-4)
        (note,) = notes
        assert note.text == "LoRA style.safetensors at scale 0.7: 60 tensors for 20 layers of this model"


def test_whole_differences_beside_the_settings_of_peft(pipe, tmp_path):
    """A layer without a pair of matrices has no rank, by which alpha was divided."""
    tensors = {name: x.clone() for name, x in forms.distilled(pipe.transformer).items()}
    settings = json.dumps({"transformer.r": 4, "transformer.lora_alpha": 4})
    save_file(tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": settings})
    made, loras = with_loras(pipe, tmp_path / "a.safetensors")
    loras.set_scales([1.0])
    plain, expected = with_loras(pipe, written(tmp_path, tensors))
    expected.set_scales([1.0])
    assert torch.equal(velocity(made), velocity(plain))
