"""LoRA files in the forms that the public ones have, with the true names, for a small Wan transformer."""

import torch

# Layers of a block, and of the rest of the model, in diffusers and in the original names.
BLOCK = {
    **{f"attn1.to_{x}": f"self_attn.{x}" for x in "qkv"}, "attn1.to_out.0": "self_attn.o",
    **{f"attn2.to_{x}": f"cross_attn.{x}" for x in "qkv"}, "attn2.to_out.0": "cross_attn.o",
    "ffn.net.0.proj": "ffn.0", "ffn.net.2": "ffn.2",
}  # fmt: skip
REST = {
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
}


def layers(transformer, rest=False):
    """The linear layers of a transformer, by their names in diffusers, with the original ones."""
    count = transformer.config.num_layers
    blocks = {f"blocks.{i}.{ours}": f"blocks.{i}.{theirs}" for i in range(count) for ours, theirs in BLOCK.items()}
    return {**blocks, **(REST if rest else {})}


def pairs(transformer, names, rank=4, seed=1):
    """Down and up of each layer, large enough to change the video."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name in names:
        outputs, inputs = transformer.get_submodule(name).weight.shape
        made[name] = [torch.randn(size, generator=generator) * 0.2 for size in ((rank, inputs), (outputs, rank))]
    return made


def _named(transformer, form, alpha=None, rest=False, **options):
    """`form`: from a layer's name in diffusers and in the original to what stands before .lora_A; with its sides."""
    names = layers(transformer, rest)
    (stem, sides), tensors = form, {}
    for ours, (down, up) in pairs(transformer, names, **options).items():
        name = stem(ours, names[ours])
        tensors |= {name + sides[0]: down, name + sides[1]: up}
        if alpha is not None:
            tensors[name + ".alpha"] = torch.tensor(float(alpha))
    return tensors


AB, DOWN_UP = (".lora_A.weight", ".lora_B.weight"), (".lora_down.weight", ".lora_up.weight")


def diffusers(transformer, **options):
    """As `save_lora_weights` of diffusers writes it."""
    return _named(transformer, (lambda ours, _: f"transformer.{ours}", AB), **options)


def first_diffusers(transformer, **options):
    """The same with the older names of the two sides."""
    sides = (".lora.down.weight", ".lora.up.weight")
    return _named(transformer, (lambda ours, _: f"transformer.{ours}", sides), **options)


def comfy(transformer, **options):
    """Original names in peft's words, with ComfyUI's prefix: CausVid."""
    return _named(transformer, (lambda _, theirs: f"diffusion_model.{theirs}", AB), **options)


def kijai(transformer, **options):
    """Original names with lora_down, lora_up and alpha, with ComfyUI's prefix: ai-toolkit, Kijai's."""
    return _named(transformer, (lambda _, theirs: f"diffusion_model.{theirs}", DOWN_UP), alpha=2, **options)


def musubi(transformer, **options):
    """musubi-tuner's, which is kohya's: dots became underscores."""
    return _named(transformer, (lambda _, theirs: f"lora_unet_{theirs.replace('.', '_')}", DOWN_UP), alpha=8, **options)


def distilled(transformer, **options):
    """lightx2v's step distillation as Kijai extracted it: all layers, changes of biases, and whole ones of the rest."""
    stem = lambda _, theirs: f"diffusion_model.{theirs}"  # noqa: E731
    tensors = _named(transformer, (stem, DOWN_UP), rest=True, **options)
    generator = torch.Generator().manual_seed(2)
    for theirs in layers(transformer, rest=True).values():
        outputs = tensors[f"diffusion_model.{theirs}.lora_up.weight"].shape[0]
        tensors[f"diffusion_model.{theirs}.diff_b"] = torch.randn(outputs, generator=generator) * 0.1
    head = transformer.proj_out.weight.shape
    tensors["diffusion_model.head.head.diff"] = torch.randn(head, generator=generator) * 0.1
    tensors["diffusion_model.head.head.diff_b"] = torch.randn(head[0], generator=generator) * 0.1
    for name in ("self_attn.norm_q.diff", "norm3.diff", "norm3.diff_b"):
        width = head[1]
        tensors[f"diffusion_model.blocks.0.{name}"] = torch.zeros(width)
    return tensors


def original(transformer, **options):
    """Original names without a prefix, and with the adapter's name: DiffSynth-Studio."""
    sides = (".lora_A.default.weight", ".lora_B.default.weight")
    return _named(transformer, (lambda _, theirs: theirs, sides), **options)


def peft(transformer, **options):
    """As peft saves a model that it wraps."""
    return _named(transformer, (lambda ours, _: f"base_model.model.{ours}", AB), **options)


def bare(transformer, **options):
    """diffusers' names without a prefix."""
    return _named(transformer, (lambda ours, _: ours, AB), **options)


READ_BY_DIFFUSERS = (diffusers, first_diffusers, comfy, kijai, musubi, distilled)
LIKE_DIFFUSERS = (original, peft, bare)
