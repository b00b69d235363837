"""Put a loaded model on its device: chosen from the free memory of a GPU, told with the reason, and done."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from slagen.attention.cost import ModelShape
from slagen.formats.quantised_linear import largest_product
from slagen.generation.offload import Placement, Sizes, choose, stage_sizes
from slagen.wan.placement import largest_tensor, part_bytes, place


def sizes_of(
    pipe: Any, shape: ModelShape, tokens: int, size: tuple[int, int, int], item_bytes: int, *, vae_bytes: int = 4,
    remembered: int = 0,
) -> Sizes:  # fmt: skip
    """What the largest video takes on a card, with the parts of a pipeline that are loaded.

    Args:
        tokens: of self-attention; 0 where nothing is denoised. size: width and height in pixels, frames.
        item_bytes, vae_bytes: of a number of the transformer and of the VAE.
        remembered: bytes that the attention keeps from step to step.
    """
    text, transformer, vae = part_bytes(pipe)
    config = {} if pipe.vae is None else dict(pipe.vae.config)
    denoise, decode, tiled = stage_sizes(shape, tokens, config, size, item_bytes, vae_bytes)
    denoise += remembered + (0 if pipe.transformer is None else largest_product(pipe.transformer))
    return Sizes(text, largest_tensor(pipe.text_encoder), transformer, shape.num_layers, vae, denoise, decode, tiled)


def choose_placement(
    device: torch.device, sizes: Callable[[], Sizes], on_note: Callable[[str], None], offload: str = "auto",
    vae_tiling: str = "auto", *, whole: bool = False,
) -> Placement:  # fmt: skip
    """Where a model's parts are to be, which a note tells of a GPU; arguments as of `choose`."""
    if device.type != "cuda":
        return Placement("none", vae_tiling == "on", f"the model runs on the {device.type.upper()}")
    free, _ = torch.cuda.mem_get_info(device)
    placement = choose(sizes(), free, offload, vae_tiling, whole=whole)
    on_note(placement.reason)
    return placement


def move(pipe: Any, device: torch.device, placement: Placement) -> None:
    """Put a pipeline that is on the CPU where it is to be."""
    if placement.tiling:
        pipe.vae.enable_tiling()
    place(pipe, device, placement.offload)
