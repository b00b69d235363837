"""Which parts of a model are on the GPU at a time, and whether the VAE decodes in tiles: chosen from free memory.

What a run takes is computed, not measured on a card: weights by their sizes, denoising as in `memory.denoising`, and
decoding as it was measured on a CPU (`memory.activations`). No torch here.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from slagen.attention.cost import ModelShape
from slagen.generation import memory
from slagen.generation.memory import GIB
from slagen.generation.planned_memory import TEXT_ENCODER_PARAMETERS, VAE_PARAMETERS, transformer_parameters
from slagen.wan.folder import token_grid

RESERVE = GIB * 3 // 4  # for libraries' workspaces, and what is lost between allocations
EMBEDDING_PARAMETERS = 256384 * 4096  # the largest tensor of the text encoder
TILE = 256  # pixels: height and width of a tile, diffusers' default
BLOCKS = 2  # of the transformer, that are on the GPU together when it is offloaded by block
WAYS = {
    "none": "all parts stay on the GPU",
    "model": "one part on the GPU at a time",
    "group": "one block of the transformer on the GPU at a time",
    "sequential": "one layer on the GPU at a time, which is slow",
}
# The order in which they are tried: first what costs least time. Tiles take 1.65 times the FLOPs of the decoder.
CHOICES = (
    ("none", False), ("model", False), ("none", True), ("model", True), ("group", False), ("group", True),
    ("sequential", False), ("sequential", True),
)  # fmt: skip
STAGES = {"load": "loading", "text": "the text encoder", "image": "encoding the image",
          "denoise": "denoising", "decode": "decoding"}  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """Bytes of a model's parts, and of what the stages take beside them.

    Args:
        text: of the text encoder; 0 where every prompt is known. largest: of its largest tensor, the embedding.
        layers: blocks of the transformer.
        denoise, decode: beside the weights. tiled: the same of decoding in tiles.
    """

    text: int
    largest: int
    transformer: int
    layers: int
    vae: int
    denoise: int
    decode: int
    tiled: int

    def peaks(self, offload: str, tiling: bool, keeps_text: bool) -> dict[str, int]:
        """The most bytes on the GPU in each stage.

        Args:
            keeps_text: the text encoder stays after the prompts are encoded.
        """
        decode = self.tiled if tiling else self.decode
        if offload == "none":
            rest = self.transformer + self.vae + (self.text if keeps_text else 0)
            return {"text": self.text + self.transformer + self.vae, "denoise": rest + self.denoise,
                    "decode": rest + decode}  # fmt: skip
        if offload == "model":
            return {"text": self.text, "denoise": self.transformer + self.denoise, "decode": self.vae + decode}
        blocks = self.transformer * BLOCKS // max(1, self.layers)
        if offload == "group":
            return {"text": self.vae + self.largest, "denoise": self.vae + blocks + self.denoise,
                    "decode": self.vae + decode}  # fmt: skip
        return {"text": self.vae + self.largest, "denoise": self.vae + blocks // 8 + self.denoise,
                "decode": self.vae + decode}  # fmt: skip


@dataclass(frozen=True)
class Placement:
    """Where the parts of a model are during a run, whether the VAE decodes in tiles, and why.

    Args:
        peaks: the most bytes on the GPU that are expected in each stage; empty on a CPU.
    """

    offload: str
    tiling: bool
    reason: str
    peaks: Mapping[str, int] = field(default_factory=dict)

    def to_record(self) -> ReportedPlacement:
        """As the report has it."""
        peaks = {stage: size / GIB for stage, size in self.peaks.items()}
        return ReportedPlacement(self.offload, self.tiling, self.reason, peaks or None)


@dataclass(frozen=True)
class ReportedPlacement:
    """Where the model's parts were, as `--offload` and `--vae-tiling` say it, and why.

    Args:
        expected_gib: the most on the GPU in each stage, as it was expected; None on a CPU.
    """

    offload: str
    vae_tiling: bool
    reason: str
    expected_gib: dict[str, float] | None


def stage_sizes(
    shape: ModelShape,
    tokens: int,
    vae: dict[str, Any],
    size: tuple[int, int, int],
    item_bytes: int,
    vae_bytes: int = 4,
) -> tuple[int, int, int]:
    """Bytes that denoising, decoding, and decoding in tiles take beside the weights.

    Args:
        vae: its config. size: width and height in pixels, frames. item_bytes: of one number of the transformer.
        vae_bytes: of one of the VAE.
    """
    width, height, num_frames = size
    takes = functools.partial(memory.activations, shape, tokens, vae, on_card=True)
    denoise, decode, _ = takes(width * height, num_frames, item_bytes, vae_bytes)
    _, tile, _ = takes(TILE * TILE, 0, item_bytes, vae_bytes)
    return denoise, decode, min(decode, tile + memory.FRAME_BYTES * num_frames * width * height)  # all are there


def of_published(shape: ModelShape, size: tuple[int, int, int], item_bytes: int = 2) -> Sizes:
    """What a video takes with Wan2.1's own text encoder and VAE, by their parameters; `size` as in `stage_sizes`."""
    grid = token_grid(*size)
    return Sizes(
        item_bytes * TEXT_ENCODER_PARAMETERS, item_bytes * EMBEDDING_PARAMETERS,
        item_bytes * transformer_parameters(shape), shape.num_layers, 4 * VAE_PARAMETERS,
        *stage_sizes(shape, grid.num_tokens, memory.WAN_VAE, size, item_bytes),
    )  # fmt: skip


def choose(
    sizes: Sizes, free: int, offload: str = "auto", vae_tiling: str = "auto", *, whole: bool = False
) -> Placement:
    """The first choice that fits into `free` bytes of the GPU's memory; the last one where none does.

    Args:
        offload, vae_tiling: what is asked for; "auto" is chosen here.
        whole: parts are moved as a whole, and the text encoder stays, for runs that exchange the attention.
    """
    modes = ("none", "model") if whole else tuple(WAYS)
    modes = modes if offload == "auto" else (offload,)
    tilings = (False, True) if vae_tiling == "auto" else (vae_tiling == "on",)
    open_choices = [(mode, tiling) for mode, tiling in CHOICES if mode in modes and tiling in tilings]
    refused: list[str] = []
    for mode, tiling in open_choices:
        peaks = sizes.peaks(mode, tiling, whole)
        stage = max(peaks, key=lambda name: peaks[name])
        peak = f"about {peaks[stage] / GIB:.1f} GiB for {STAGES[stage]}"
        if peaks[stage] + RESERVE <= free:
            break
        refused.append(f"{_named(mode, tiling)} would take {peak}")
    way = f"{WAYS[mode]}{', and the VAE decodes in tiles' if tiling else ''}"
    reason = f"offload {_named(mode, tiling)} ({way}) takes {peak}, and {free / GIB:.1f} GiB are free"
    if len(refused) == len(open_choices):
        reason += ", which may not be enough; a smaller --size or a lower --num-frames takes less"
    elif refused:
        reason += f"; {refused[0]}"
    return Placement(mode, tiling, reason, peaks)


def _named(mode: str, tiling: bool) -> str:
    return f"{mode} with VAE tiling" if tiling else mode


def next_setting(stage: str, placement: Placement, *, whole: bool = False) -> str:
    """What takes less memory in a stage than a placement that was too large: options to type.

    Args:
        stage: "load", "text", "denoise" or "decode". whole: as in `choose`; such runs have neither option.
    """
    if whole:
        return "Try a lower --num-frames or a smaller --size."
    if stage == "decode" and not placement.tiling:
        return "Try --vae-tiling on."
    modes = list(WAYS)
    stage = "text" if stage == "load" else stage
    later = modes[modes.index(placement.offload) + 1 :]
    if later and not (stage == "decode" and placement.offload == "group"):
        return f"Try --offload {later[0]}."
    return "Try --device cpu." if stage == "text" else "Try a lower --num-frames or a smaller --size."
