"""Put a pipeline's parts on a GPU, all at once or in turns, by diffusers' own functions."""

from __future__ import annotations

import torch
from diffusers import WanPipeline
from diffusers.hooks import apply_group_offloading

CPU = torch.device("cpu")


def place(pipe: WanPipeline, device: torch.device, offload: str) -> None:
    """Move a pipeline that is on the CPU to a device. Attention is installed before, for hooks forbid it afterwards.

    Args:
        offload: "none" moves all parts. With "model" each is there while it runs. With "group" the VAE stays there,
            and the transformer's blocks and the text encoder's layers are moved one by one. With "sequential" the
            transformer's layers are.
    """
    if offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif offload == "sequential":
        pipe._exclude_from_cpu_offload = [*pipe._exclude_from_cpu_offload, "vae"]  # it is small, and hashed afterwards
        pipe.enable_sequential_cpu_offload(device=device)
    elif offload == "group":
        if pipe.text_encoder is not None:  # whose blocks lie deeper than diffusers looks for them
            apply_group_offloading(
                pipe.text_encoder, onload_device=device, offload_device=CPU, offload_type="leaf_level"
            )
        pipe.transformer.enable_group_offload(
            onload_device=device, offload_device=CPU, offload_type="block_level", num_blocks_per_group=1
        )
        pipe.vae.to(device)
    else:
        pipe.to(device)


def release_text_encoder(pipe: WanPipeline) -> None:
    """Forget the text encoder and its tokenizer; where parts are moved one at a time, among these too."""
    pipe.text_encoder = pipe.tokenizer = None
    pipe.maybe_free_model_hooks()


def part_bytes(pipe: WanPipeline) -> tuple[int, int, int]:
    """Bytes of the weights of text encoder, transformer and VAE; 0 for a part that is not there."""
    parts = (pipe.text_encoder, pipe.transformer, pipe.vae)
    text, transformer, vae = (
        0 if part is None else sum(x.numel() * x.element_size() for x in part.state_dict().values()) for part in parts
    )
    return text, transformer, vae


def largest_tensor(part: torch.nn.Module | None) -> int:
    """Bytes of a part's largest weight; 0 for a part that is not there."""
    return 0 if part is None else max(x.numel() * x.element_size() for x in part.parameters())
