"""The VAE of a Wan model: loaded from any public form, latents to video frames and back."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLWan

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
    """Latents (1, C, T, h, w), normalised, to video frames (F, H, W, 3) uint8 on the CPU.

    Args:
        on_frame: called with the number of latent frames that are decoded, after each.
    Raises: SlagenError for values that are not finite, WeightsError for a video without any content, but for a black
        or white one, which a prompt may ask for.
    """
    mean, std = (x.to(latents.device) for x in _statistics(vae))
    done = 0

    def count(*_: Any) -> None:
        nonlocal done
        done += 1
        on_frame(done)

    handle = vae.decoder.register_forward_hook(count)  # which decodes one latent frame after the other
    try:
        video = vae.decode((latents.float() * std + mean).to(vae.dtype), return_dict=False)[0][0].float()
    finally:
        handle.remove()
    if not is_finite(video):
        raise SlagenError(
            "the VAE produced NaN or Inf from these latents, so there is no video. Try other settings, or "
            "another VAE with --vae."
        )
    side = video.shape[-1] // latents.shape[-1]  # of the square of pixels that a latent stands for
    squares = video.unflatten(3, (-1, side)).unflatten(2, (-1, side))  # (3, F, h, side, w, side)
    first = squares[:, :1, :1, :, :1]
    if (squares == first).all() and (first.abs() < 1).any():
        raise WeightsError(
            "the decoded video is one constant colour in every frame, so the weights of the VAE or the "
            "transformer are damaged or do not fit together. Download the model again."
        )
    frames = video.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
    return frames.permute(1, 2, 3, 0).cpu()


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
