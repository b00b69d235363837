"""The original Wan2.1 VAE's tensor names, and what they are in diffusers."""

import re

from torch import Tensor

_VAE_PARTS = {
    "residual.0": "norm1", "residual.2": "conv1", "residual.3": "norm2", "residual.6": "conv2",
    "shortcut": "conv_shortcut", "conv1": "conv_in", "head.0": "norm_out", "head.2": "conv_out",
    "middle.0": "mid_block.resnets.0", "middle.1": "mid_block.attentions.0", "middle.2": "mid_block.resnets.1",
}  # fmt: skip


def rename_vae(tensors: dict[str, Tensor], num_res_blocks: int) -> dict[str, Tensor]:
    """The original Wan2.1 VAE under diffusers' names: its decoder is one list of blocks there, cut by levels here."""
    return {_vae_name(name, num_res_blocks): tensor for name, tensor in tensors.items()}


def _vae_name(name: str, num_res_blocks: int) -> str:
    if name.startswith(("conv1.", "conv2.")):
        return name.replace("conv1.", "quant_conv.").replace("conv2.", "post_quant_conv.")
    side, _, rest = name.partition(".")
    block = re.match(r"(down|up)samples\.(\d+)\.(.*)", rest)
    prefix = side
    if block and block[1] == "down":
        prefix, rest = f"{side}.down_blocks.{block[2]}", block[3]
    elif block:
        level, place = divmod(int(block[2]), num_res_blocks + 2)  # its residual blocks, one more, and an upsampler
        part = "upsamplers.0" if place == num_res_blocks + 1 else f"resnets.{place}"
        prefix, rest = f"{side}.up_blocks.{level}.{part}", block[3]
    elif rest.startswith("middle."):
        middle, rest = ".".join(rest.split(".")[:2]), ".".join(rest.split(".")[2:])
        prefix = f"{side}.{_VAE_PARTS.get(middle, middle)}"
    stem, _, kind = rest.rpartition(".")
    return f"{prefix}.{_VAE_PARTS.get(stem, stem)}.{kind}"
