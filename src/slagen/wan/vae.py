"""The VAE of a Wan model: loaded from any public form, latents to video frames and back."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

from slagen.errors import SlagenError, WeightsError
from slagen.formats.bounds import is_finite
from slagen.formats.checkpoint import Checkpoint
from slagen.formats.checks import check_fit
from slagen.formats.kinds import REFUSALS, identify
from slagen.formats.model_files import read_json
from slagen.formats.tensor_files import read_component, read_tensors
from slagen.formats.vae import rename_vae
from slagen.wan.building import no_random_init, reading_from


def load_vae(path: Path, config: Path | None, dtype: torch.dtype = torch.float32) -> AutoencoderKLWan:
    """A VAE from a file or folder in the original or in diffusers' names, float32 unless asked otherwise.

    Args:
        config: the folder of a VAE whose config.json says its sizes and the statistics of its latents; None: Wan2.1's.
    Raises: WeightsError unless it is one, whole, and of that size.
    """
    tensors = read_component(path) if path.is_dir() else read_tensors(path)
    kind = identify(tensors)
    own = path == config  # a model's own VAE may be of any kind that its config.json describes, as tiny-wan's is
    if kind in ("wan2.2-vae", "tiny-vae") and not own:
        raise WeightsError(f"{path} {REFUSALS[kind]}")
    if kind != "vae" and not own:
        raise WeightsError(
            f"{path} is not a Wan2.1 VAE. Give Wan2.1_VAE.pth, or the vae folder of a diffusers pipeline."
        )
    fields = {} if config is None else read_json(config / "config.json", config)
    with init_empty_weights(), no_random_init(), reading_from(path if config is None else config / "config.json"):
        vae = AutoencoderKLWan.from_config(fields)
    if "conv1.weight" in tensors:
        tensors = rename_vae(tensors, vae.config.num_res_blocks)
    check_fit(Checkpoint(path, "vae", tensors, {}), {name: x.shape for name, x in vae.state_dict().items()}, 0, 0)
    vae.load_state_dict({name: tensor.to(dtype) for name, tensor in tensors.items()}, strict=True, assign=True)
    return vae.eval()


def vae_dtype_of(name: str | None) -> torch.dtype:
    """The dtype of --vae-dtype: float32 unless bf16 is asked for, whose frames nobody has measured on a card yet."""
    return torch.bfloat16 if name == "bf16" else torch.float32


def decode_latents(
    vae: AutoencoderKLWan, latents: torch.Tensor, on_frame: Callable[[int], None] = lambda done: None
) -> torch.Tensor:
    """All frames of a video, (F, H, W, 3) uint8 on the CPU; arguments and errors as of `stream_latents`."""
    parts: list[torch.Tensor] = []
    stream_latents(vae, latents, parts.append, on_frame)
    return torch.cat(parts)


@torch.no_grad()
def stream_latents(
    vae: AutoencoderKLWan,
    latents: torch.Tensor,
    take: Callable[[torch.Tensor], None],
    on_frame: Callable[[int], None] = lambda done: None,
) -> None:
    """Latents (1, C, T, h, w), normalised, to video frames, which are handed on as they are decoded.

    Args:
        take: called with the frames of each latent frame, (f, H, W, 3) uint8 on the CPU; with all of them at once where
            the VAE decodes in tiles.
        on_frame: called with the number of `num_parts` that are decoded, after each.
    Raises: SlagenError for values that are not finite, WeightsError for a video without any content, but for a black
        or white one, which a prompt may ask for.
    """
    mean, std = (x.to(latents.device) for x in _statistics(vae))
    done, patch = 0, vae.config.patch_size
    converted = _Frames(latents.shape[-1], take)

    def decoded(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor | None:
        nonlocal done
        done += 1
        on_frame(done)
        if vae.use_tiling:
            return None
        values = output if patch is None else unpatchify(output, patch)
        converted.add(values.clamp(-1, 1))
        return output[..., :0, :0]  # of which diffusers makes a video without any pixels

    handle = vae.decoder.register_forward_hook(decoded)  # which decodes one latent frame after the other
    try:
        video = vae.decode((latents.float() * std + mean).to(vae.dtype), return_dict=False)[0]
    finally:
        handle.remove()
    if vae.use_tiling:
        converted.add(video)
    converted.check()


def num_parts(vae: AutoencoderKLWan, latents: torch.Tensor) -> int:
    """How often the decoder runs for latents (1, C, T, h, w): once a latent frame, or a latent frame of each tile."""
    num_frames, *sides = latents.shape[2:]
    ratio = vae.spatial_compression_ratio
    least = [size // ratio for size in (vae.tile_sample_min_height, vae.tile_sample_min_width)]
    if not vae.use_tiling or all(side <= size for side, size in zip(sides, least, strict=True)):
        return num_frames
    strides = [size // ratio for size in (vae.tile_sample_stride_height, vae.tile_sample_stride_width)]
    return num_frames * math.prod(-(-side // stride) for side, stride in zip(sides, strides, strict=True))


class _Frames:
    """Decoded values to frames, checked.

    Args: columns: of the latents. take: as in `stream_latents`.
    """

    def __init__(self, columns: int, take: Callable[[torch.Tensor], None]) -> None:
        self.columns, self.take = columns, take
        self.first: torch.Tensor | None = None  # the first square of pixels that a latent stands for
        self.alike = True

    def add(self, video: torch.Tensor) -> None:
        """Values (1, 3, f, H, W) from -1 to 1. Raises SlagenError for those that are not finite."""
        video = video[0].float()
        if not is_finite(video):
            raise SlagenError(
                "the VAE produced NaN or Inf from these latents, so there is no video. Try other settings, or "
                "another VAE with --vae."
            )
        if self.alike:
            side = video.shape[-1] // self.columns
            squares = video.unflatten(3, (-1, side)).unflatten(2, (-1, side))  # (3, f, h, side, w, side)
            self.first = squares[:, :1, :1, :, :1].clone() if self.first is None else self.first
            self.alike = bool((squares == self.first).all())
        frames = video.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
        self.take(frames.permute(1, 2, 3, 0).cpu())

    def check(self) -> None:
        """Raise WeightsError for a video of one colour, unless that is black or white."""
        if self.first is not None and self.alike and (self.first.abs() < 1).any():
            raise WeightsError(
                "the decoded video is one constant colour in every frame, so the weights of the VAE or the "
                "transformer are damaged or do not fit together. Download the model again."
            )


def encode_video(vae: AutoencoderKLWan, frames: torch.Tensor) -> torch.Tensor:
    """Video frames (F, H, W, 3) uint8, F = 4k + 1, to latents (C, T, h, w) float32 on the CPU, normalised."""
    video = frames.to(vae.device).permute(3, 0, 1, 2)[None].float().div(127.5).sub(1)
    mean, std = _statistics(vae)
    latents = vae.encode(video.to(vae.dtype)).latent_dist.mode().float().cpu()
    return ((latents - mean) / std)[0]


def _statistics(vae: AutoencoderKLWan) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of a VAE's latents, each (1, C, 1, 1, 1) float32."""
    mean, std = (torch.tensor(x, dtype=torch.float32) for x in (vae.config.latents_mean, vae.config.latents_std))
    return mean.view(1, -1, 1, 1, 1), std.view(1, -1, 1, 1, 1)
