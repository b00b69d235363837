"""What a planned run takes of memory: on a card by stage, and of the host's on a CPU. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from slagen.attention.cost import ModelShape
from slagen.errors import SlagenError
from slagen.formats.held import Held, held, transformer_files
from slagen.formats.model_files import read_json
from slagen.generation import memory
from slagen.generation.config import GenerateConfig, vae_bytes
from slagen.generation.memory import GIB
from slagen.generation.run_estimate import CpuMemory, RunMemory, StageMemory
from slagen.wan.folder import ModelSource
from slagen.wan.presets import Preset

# Parameters of the parts that all Wan2.1 models share (diffusers, rounded).
TEXT_ENCODER_PARAMETERS = 5_680_000_000
VAE_PARAMETERS = 126_900_000
IMAGE_ENCODER_PARAMETERS = 630_800_000  # of image-to-video models, in float32 on the CPU
IMAGE_DIM = 1280  # numbers of a token of CLIP's


def transformer_parameters(
    shape: ModelShape, text_dim: int = 4096, channels: int = 16, *, takes_image: bool = False
) -> int:
    """Parameters of a Wan2.1 transformer with (1, 2, 2) patches; 1,418,996,800 for 1.3B."""
    width, ffn, patch = shape.num_heads * shape.head_dim, shape.ffn_dim, channels * 4
    linear = width * width + width
    attention = 4 * linear + 2 * width
    block = 2 * attention + 2 * width + (width * ffn + ffn) + (ffn * width + width) + 6 * width
    time = (256 * width + width) + linear + 6 * linear
    text = (text_dim * width + width) + linear
    count = shape.num_layers * block + (patch * width + width) + time + text + (width * patch + patch) + 2 * width
    if not takes_image:
        return count
    block, taken = 2 * linear + width, (channels + 4) * 4  # keys and values of the image; its latents, and a mask
    embedder = 2 * IMAGE_DIM + IMAGE_DIM * (IMAGE_DIM + 1) + (IMAGE_DIM * width + width) + 2 * width
    return count + shape.num_layers * block + taken * width + embedder


@dataclass(frozen=True)
class PlannedMemory:
    """What a run takes, by sizes and the headers of weight files.

    Args:
        preset: the model, or one made from its folder.
        source: where the model lies; None where it is not on this machine.
        weights: the transformer file that is used instead of its own.
        tokens: of the clip. size: width and height in pixels, frames.
        kept: bytes that the attention remembers from step to step.
    """

    config: GenerateConfig
    preset: Preset
    source: ModelSource | None
    weights: Path | None
    tokens: int
    size: tuple[int, int, int]
    kept: int

    @property
    def _merges(self) -> bool:
        return bool(self.config.lora) and not self.config.live_lora

    def _own(self, item_bytes: int) -> Held:
        """What a transformer takes that is given, or the model's own where it is of 8 bits; nothing of any other."""
        own = None if self.source is None else self.source.folder / "transformer"
        place = self.weights or own
        found = held([] if place is None else transformer_files(place), item_bytes)
        if self.weights is None and not found.in_8_bits:
            return Held()
        return found.full(item_bytes) if self._merges else found

    def _cpu(self) -> memory.Need:
        """Of the host's memory on a CPU, where everything is loaded at once."""
        item_bytes = 2 if self.config.dtype in ("bf16", "fp16") else 4
        if self.source is not None:
            return memory.need(self.source, *self.size, item_bytes, merges=self._merges,
                               vae_bytes=vae_bytes(self.config)).keeping(self.kept)  # fmt: skip
        width, height, num_frames = self.size
        own = self._own(item_bytes)
        transformer = own.held or item_bytes * transformer_parameters(
            self.preset.shape, takes_image=self.preset.takes_image
        )
        weights = item_bytes * TEXT_ENCODER_PARAMETERS + transformer + vae_bytes(self.config) * VAE_PARAMETERS
        weights += self._image_encoder
        stages = memory.activations(
            self.preset.shape,
            self.tokens,
            memory.WAN_VAE,
            width * height,
            num_frames,
            item_bytes,
            vae_bytes(self.config),
        )
        return memory.Need(weights, own.fresh, *stages).keeping(self.kept)

    def to_run_memory(self) -> RunMemory:
        """Estimates for a card, weights (of a folder: its files) and what a stage needs beside them, and for a CPU."""
        shape, item_bytes, cpu = self.preset.shape, self._item_bytes, self._cpu()
        if self.source is None:
            weights = {
                "text": item_bytes * TEXT_ENCODER_PARAMETERS,
                "denoise": item_bytes * transformer_parameters(shape, takes_image=self.preset.takes_image),
                "decode": vae_bytes(self.config) * VAE_PARAMETERS,
            }  # fmt: skip
        else:
            sizes = {part: sum(f.stat().st_size for f in (self.source.folder / part).glob("*.safetensors"))
                     for part in ("text_encoder", "transformer", "vae")}  # fmt: skip
            weights = {"text": sizes["text_encoder"], "denoise": sizes["transformer"], "decode": sizes["vae"]}
        own = self._own(item_bytes)
        weights["denoise"] = own.held or weights["denoise"]
        denoise = memory.denoising(shape, self.tokens, item_bytes) + self.kept
        denoise += memory.multiplying_out(shape, item_bytes) if own.in_8_bits else 0
        activations = {"text": 0, "denoise": denoise, "decode": self._decoding()}
        sizes_gib = (cpu.weights, cpu.denoise, cpu.decode, cpu.likely, max(0, memory.memory_left()[0]))
        return RunMemory(
            stages={stage: StageMemory(weights[stage] / GIB, activations[stage] / GIB) for stage in weights},
            gpu_peak_all_resident=(sum(weights.values()) + max(activations.values())) / GIB,
            gpu_peak_offloaded=max(weights[stage] + activations[stage] for stage in weights) / GIB,
            host=(sum(weights.values()) + self._image_encoder) / GIB,
            estimated=True,
            cpu=CpuMemory(*(size / GIB for size in sizes_gib)),
        )

    @property
    def _image_encoder(self) -> int:
        """Bytes of the image encoder, in float32 on the CPU; 0 for a model that has none."""
        if not self.preset.takes_image:
            return 0
        if self.source is None:
            return 4 * IMAGE_ENCODER_PARAMETERS
        return memory.held_by(self.source, memory.IMAGE_ENCODER, 4).held

    def _decoding(self) -> int:
        """Bytes that decoding takes on a card, beside the weights."""
        width, height, num_frames = self.size
        vae = memory.WAN_VAE
        if self.source is not None:
            vae = read_json(self.source.folder / "vae" / "config.json", self.source.folder)
        return memory.activations(
            self.preset.shape,
            0,
            vae,
            width * height,
            num_frames,
            self._item_bytes,
            vae_bytes(self.config),
            on_card=True,
        )[1]

    @property
    def _item_bytes(self) -> int:
        """Of a number on a card."""
        return 4 if self.config.dtype == "fp32" else 2

    def _lack(self) -> str | None:
        """What `generate` would say of a CPU's memory, a warning or its refusal; None where the run fits."""
        try:
            return memory.check(self._cpu(), *self.size)
        except SlagenError as error:
            return str(error)

    def notes(self, device: str | None) -> list[str]:
        """What is said of a CPU's memory, and of weights that stay in 8 bits; `device` is the kind that it runs on."""
        item_bytes = 4 if device == "cpu" and self.config.dtype == "auto" else self._item_bytes
        own, lack = self._own(item_bytes), self._lack() if device == "cpu" else None
        notes = [] if lack is None else [lack]
        if own.in_8_bits:
            notes.append(
                f"weights in 8 bits stay so: the transformer takes {own.held / GIB:.2f} GiB of memory instead of "
                f"{own.full(item_bytes).held / GIB:.2f}"
            )
        return notes
