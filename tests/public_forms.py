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
