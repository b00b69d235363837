"""Writes small Wan transformers in every public form, key by key as the original projects name them."""

import re

import torch

SIZES = dict(num_heads=2, head_dim=64, num_layers=2)  # width 128: int8 blocks of 128 are whole, and cut in the ffn

TOP = {
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "proj_out": "head.head",
}
IN_BLOCK = {
    "attn1.to_out.0": "self_attn.o", "attn1.to_q": "self_attn.q", "attn1.to_k": "self_attn.k",
    "attn1.to_v": "self_attn.v", "attn1.norm_q": "self_attn.norm_q", "attn1.norm_k": "self_attn.norm_k",
    "attn2.to_out.0": "cross_attn.o", "attn2.to_q": "cross_attn.q", "attn2.to_k": "cross_attn.k",
    "attn2.to_v": "cross_attn.v", "attn2.norm_q": "cross_attn.norm_q", "attn2.norm_k": "cross_attn.norm_k",
    "norm2": "norm3", "ffn.net.0.proj": "ffn.0", "ffn.net.2": "ffn.2",
}  # fmt: skip
FAST_TOP = {
    "condition_embedder.time_embedder.linear_1": "condition_embedder.time_embedder.mlp.fc_in",
    "condition_embedder.time_embedder.linear_2": "condition_embedder.time_embedder.mlp.fc_out",
    "condition_embedder.text_embedder.linear_1": "condition_embedder.text_embedder.fc_in",
    "condition_embedder.text_embedder.linear_2": "condition_embedder.text_embedder.fc_out",
    "condition_embedder.time_proj": "condition_embedder.time_modulation.linear",
    "patch_embedding": "patch_embedding.proj",
}
FAST_BLOCK = {
    "attn1.to_q": "to_q", "attn1.to_k": "to_k", "attn1.to_v": "to_v", "attn1.to_out.0": "to_out",
    "attn1.norm_q": "norm_q", "attn1.norm_k": "norm_k", "attn2.to_out.0": "attn2.to_out",
    "ffn.net.0.proj": "ffn.fc_in", "ffn.net.2": "ffn.fc_out", "norm2": "self_attn_residual_norm.norm",
}  # fmt: skip


def _rename(state, top, in_block):
    renamed = {}
    for name, tensor in state.items():
        stem, _, kind = name.rpartition(".")
        block = re.match(r"blocks\.(\d+)\.(.*)", stem)
        stem = f"blocks.{block[1]}.{in_block.get(block[2], block[2])}" if block else top.get(stem, stem)
        renamed[f"{stem}.{kind}" if stem else kind] = tensor.clone()
    return renamed


def wan(state):
    """The original repository's names."""
    renamed = _rename(state, TOP, IN_BLOCK)
    renamed["head.modulation"] = renamed.pop("scale_shift_table")
    for name in [name for name in renamed if name.endswith(".scale_shift_table")]:
        renamed[name.replace("scale_shift_table", "modulation")] = renamed.pop(name)
    return renamed


IMAGE = {"add_k_proj": "k_img", "add_v_proj": "v_img", "norm_added_k": "norm_k_img"}
EMBEDDER = {"norm1": "proj.0", "ff.net.0.proj": "proj.1", "ff.net.2": "proj.3", "norm2": "proj.4"}


def wan_image(state):
    """The original repository's names of an image-to-video transformer."""
    own, top = {}, "condition_embedder.image_embedder."
    for name in [*state]:
        place, _, kind = name.rpartition(".")
        if name.startswith(top):
            own[f"img_emb.{EMBEDDER[place.removeprefix(top)]}.{kind}"] = state[name]
        elif place.rpartition(".")[2] in IMAGE:
            layer = place.split(".")[1]
            own[f"blocks.{layer}.cross_attn.{IMAGE[place.rpartition('.')[2]]}.{kind}"] = state[name]
    rest = {name: x for name, x in state.items() if not name.startswith(top) and not any(n in name for n in IMAGE)}
    return {**wan(rest), **own}


def fastvideo(state):
    return _rename(state, FAST_TOP, FAST_BLOCK)


def projections(num_layers=2, head_dim=64, seed=5):
    """A trained proj_l for every layer: {layer: (weight, bias)}."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: (torch.randn(shape, generator=generator) * 0.05).bfloat16().float()  # noqa: E731
    return {layer: (draw(head_dim, head_dim), draw(head_dim)) for layer in range(num_layers)}


def spell(pairs, spelling):
    return {
        f"blocks.{layer}.{spelling}.proj_l.{kind}": tensor.clone()
        for layer, pair in pairs.items()
        for kind, tensor in zip(("weight", "bias"), pair, strict=True)
    }


def turbo(state, pairs):
    """TurboDiffusion's .pth: original names, a patch embedding with two dimensions, proj_l under local_attn."""
    renamed = wan(state)
    renamed["patch_embedding.weight"] = renamed["patch_embedding.weight"].flatten(1)
    return {**renamed, **spell(pairs, "self_attn.attn_op.local_attn")}


def quantised(checkpoint):
    """The -quant form: int8 with a scale for each 128 x 128, scale = largest / 128."""
    out = {}
    for name, tensor in checkpoint.items():
        linear = re.fullmatch(r"blocks\.\d+\.((self|cross)_attn\.[qkvo]|ffn\.[02])\.weight", name)
        if not linear:
            out[name] = tensor
            continue
        rows, columns = tensor.shape
        scale = torch.empty(-(-rows // 128), -(-columns // 128))
        codes = torch.empty(rows, columns, dtype=torch.int8)
        for i in range(scale.shape[0]):
            for j in range(scale.shape[1]):
                part = (slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128))
                scale[i, j] = tensor[part].abs().max() / 128
                codes[part] = (tensor[part] / scale[i, j]).round().clamp(-128, 127).to(torch.int8)
        out[name.removesuffix("weight") + "int8_weight"], out[name.removesuffix("weight") + "scale"] = codes, scale
    return out


def _scaled(checkpoint, quantise, wanted=r"blocks\.\d+\.((self|cross)_attn\.[qkvo]|ffn\.[02])\.weight"):
    """{name: tensor} with the matrices of the blocks as `quantise(stem, tensor)` gives them."""
    out = {}
    for name, tensor in checkpoint.items():
        out |= quantise(name.removesuffix("weight"), tensor) if re.fullmatch(wanted, name) else {name: tensor}
    return out


def fp8(dtype):
    """Kijai's and Comfy's fp8 without scales: all matrices cast, biases, norms and modulation in half precision."""
    return lambda checkpoint: {
        name: tensor.to(dtype if tensor.ndim == 2 and "modulation" not in name else torch.float16)
        for name, tensor in wan(checkpoint).items()
    }


def _per_tensor(tensor, dtype):
    scale = tensor.abs().max().float() / torch.finfo(dtype).max
    return (tensor / scale).to(dtype), scale


def scaled_fp8(checkpoint, dtype=torch.float8_e4m3fn):
    """Comfy's first scaled fp8, and Kijai's: a mark, and scale_weight and scale_input by every weight."""

    def quantise(stem, tensor):
        codes, scale = _per_tensor(tensor, dtype)
        return {stem + "weight": codes, stem + "scale_weight": scale, stem + "scale_input": torch.tensor(1.0)}

    kept = {name: x.bfloat16() if x.ndim == 1 else x for name, x in wan(checkpoint).items()}
    return {**_scaled(kept, quantise), "scaled_fp8": torch.empty(2, dtype=dtype)}


def comfy_quant(checkpoint):
    """Comfy's mixed precision: weight_scale, input_scale and JSON as bytes by every weight; the last block is bf16."""

    def quantise(stem, tensor):
        codes, scale = _per_tensor(tensor, torch.float8_e4m3fn)
        mark = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
        extra = {stem + "input_scale": torch.tensor(1.0), stem + "comfy_quant": mark}
        return {stem + "weight": codes, stem + "weight_scale": scale, **extra}

    kept = {name: tensor.bfloat16() for name, tensor in wan(checkpoint).items()}
    return _scaled(kept, quantise, r"blocks\.0\.((self|cross)_attn\.[qkvo]|ffn\.[02])\.weight")


def lightx2v(dtype):
    """lightx2v's converter: a float32 scale for every row, (out, 1); fp8 e4m3fn or int8."""

    def quantise(stem, tensor):
        scale = tensor.float().abs().amax(1, keepdim=True) / (127 if dtype == torch.int8 else 448)
        codes = tensor / scale
        return {
            stem + "weight": (codes.round() if dtype == torch.int8 else codes).to(dtype), stem + "weight_scale": scale
        }  # fmt: skip

    return lambda checkpoint: _scaled({name: x.bfloat16() for name, x in wan(checkpoint).items()}, quantise)


def scale_inv(checkpoint):
    """TurboDiffusion's int8 as IPostYellow converts it: weight and weight_scale_inv, a scale a block."""
    return {
        name.replace(".int8_weight", ".weight").replace(".scale", ".weight_scale_inv"): tensor
        for name, tensor in quantised(wan(checkpoint)).items()
    }


def all_in_one(checkpoint):
    """Comfy's CheckpointSave: the transformer, UMT5, CLIP vision and the VAE in one file."""
    out = {"model.diffusion_model." + name: tensor for name, tensor in wan(checkpoint).items()}
    others = (
        "text_encoders.umt5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.weight",
        "text_encoders.umt5xxl.transformer.shared.weight", "vae.decoder.conv1.weight", "vae.encoder.conv1.weight",
        "first_stage_model.decoder.head.0.gamma", "clip_vision.visual.conv1.weight",
    )  # fmt: skip
    return {**out, **{name: torch.zeros(2, 2) for name in others}}


LORA_PAIRS = (
    "diffusion_model.blocks.0.self_attn.q.lora_{}.weight:A B",  # peft in Comfy's names; CausVid, lightx2v
    "diffusion_model.blocks.0.self_attn.q.lora_{}.weight:down up",
    "transformer.blocks.0.attn1.to_q.lora_{}.weight:A B",  # diffusers
    "base_model.model.blocks.0.attn1.to_q.lora_{}.default.weight:A B",  # peft as it trains
    "lora_unet_blocks_0_self_attn_q.lora_{}.weight:down up",  # kohya, musubi
    "blocks.0.attn1.to_q.lora.{}.weight:down up",
    "blocks.0.attn1.processor.to_q_lora.{}.weight:down up",  # the first diffusers
    "blocks.0.attn1.to_q.lora_linear_layer.{}.weight:down up",
    "blocks.0.attn1.to_q.lora_{}:A B",  # Mochi's
)


def lora(pair):
    name, _, sides = pair.partition(":")
    return {name.format(side): torch.zeros(2, 2) for side in sides.split()}


def with_channels(checkpoint, taken, given=None):
    """The same transformer for other numbers of latent channels, as Wan2.2's I2V-A14B and TI2V-5B are."""
    out = wan(checkpoint)
    patch, head = out["patch_embedding.weight"], out["head.head.weight"]
    out["patch_embedding.weight"] = torch.zeros(patch.shape[0], taken, 1, 2, 2)
    if given is not None:
        out["head.head.weight"], out["head.head.bias"] = torch.zeros(4 * given, head.shape[1]), torch.zeros(4 * given)
    return out


VARIANTS = {  # kind: tensors that tell it, of the public files
    "vace": ("vace_patch_embedding.weight", "vace_blocks.0.self_attn.q.weight", "vace_blocks.0.after_proj.weight"),
    "skyreels": ("fps_embedding.weight", "fps_projection.0.weight", "fps_projection.2.bias"),
    "speech": ("casual_audio_encoder.encoder.final_linear.weight", "audio_injector.injector.0.q.weight"),
    "animate": ("face_adapter.fuser_blocks.0.k_norm.weight", "motion_encoder.dec.direction.weight"),
    "control": ("control_adapter.conv.weight", "control_adapter.residual_blocks.0.conv1.weight"),
    "first-last": ("img_emb.emb_pos", "img_emb.proj.0.weight", "blocks.0.cross_attn.k_img.weight"),
}
