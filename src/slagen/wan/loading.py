"""From a preset, a folder or a hub id to a Wan2.1 text-to-video pipeline that is known to be whole."""

from __future__ import annotations

import difflib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError, safe_open
from transformers.utils import logging as transformers_logging

from slagen.config import ModelDefaults
from slagen.errors import EnvironmentProblem, SlagenError, UsageError, WeightsError

BUNDLED = "tiny-wan"
PRESETS = {
    "wan2.1-1.3b": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    "wan2.1-14b": "Wan-AI/Wan2.1-T2V-14B-Diffusers",
}
HUB_FILES = ["*.json", "*.safetensors", "tokenizer/*", "*.txt", "*.model"]
ACTIVATIONS_GIB = 8  # room to leave on the card beside the weights: a 480p denoising step or VAE decode


@dataclass(frozen=True)
class ModelSource:
    """Where a model lies, what to call it, and the settings it was made for."""

    folder: Path
    name: str
    defaults: ModelDefaults
    spatial_grid: int  # height and width must be multiples of this many pixels
    temporal_factor: int  # video frames a latent frame
    head_dim: int  # of the transformer's attention

    def num_tokens(self, width: int, height: int, num_frames: int) -> int:
        """L, the length of the self-attention sequence; sizes in pixels and video frames."""
        frames = (num_frames - 1) // self.temporal_factor + 1
        return frames * (width // self.spatial_grid) * (height // self.spatial_grid)


def bundled_folder() -> Path:
    """The model that travels with slagen: inside the package when installed, in weights/ in a checkout."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "weights" / BUNDLED, package.parents[1] / "weights" / BUNDLED):
        if (folder / "model_index.json").is_file():
            return folder
    raise EnvironmentProblem(f"the bundled model {BUNDLED} is missing from this installation. Install slagen again.")


def resolve_model(model: str | None, device_type: str) -> ModelSource:
    """Find a model's folder, downloading a hub id, and check that it is a Wan2.1 text-to-video pipeline.

    Args:
        model: a preset, a folder or a hub id; None is Wan2.1-1.3B on CUDA and the bundled model elsewhere.
    Raises: UsageError for a name that is none of these, EnvironmentProblem if the hub does not give it, WeightsError if
        the folder holds something else.
    """
    if model is None:
        model = "wan2.1-1.3b" if device_type == "cuda" else BUNDLED
    if model == BUNDLED:
        return _describe(bundled_folder(), BUNDLED)
    path = Path(model).expanduser()
    if model in PRESETS:
        return _describe(_download(PRESETS[model]), PRESETS[model])
    if path.exists():
        return _describe(path, path.resolve().name)
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", model):
        return _describe(_download(model), model)
    known = [BUNDLED, *PRESETS]
    close = difflib.get_close_matches(model.lower(), known, n=1, cutoff=0.4)
    raise UsageError(
        f"model {model!r} is no preset, folder or hub id. Presets: {', '.join(known)}. "
        f"Try --model {(close or known)[0]}."
    )


def load_pipeline(source: ModelSource, device: torch.device, dtype: torch.dtype) -> WanPipeline:
    """Load a pipeline: transformer and text encoder in `dtype`, the VAE in float32, on the device as memory allows.

    Nothing is ever cast after loading: diffusers keeps norms, time embedding and rotary tables in float32 itself.
    Raises: WeightsError if a file is broken, or a weight is missing.
    """
    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    tensors = {part: _tensor_names(source.folder / part) for part in ("transformer", "vae", "text_encoder")}
    try:
        pipe = WanPipeline.from_pretrained(
            source.folder, dtype={"default": dtype, "vae": torch.float32}, local_files_only=True
        )
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, AttributeError, SafetensorError) as error:
        raise WeightsError(f"{source.folder} cannot be loaded: {_first_line(error)}. Get the model again.") from error
    for part in ("transformer", "vae"):
        expected = set(getattr(pipe, part).state_dict())
        missing, extra = sorted(expected - tensors[part]), sorted(tensors[part] - expected)
        if missing or extra:
            what = f"lacks {missing[0]}" if missing else f"has the unknown {extra[0]}"
            raise WeightsError(
                f"{source.folder / part} {what} ({len(missing)} missing, {len(extra)} unknown tensors), and would make "
                "noise. Get the model again."
            )
    tie_embeddings(pipe.text_encoder, tensors["text_encoder"])
    pipe.set_progress_bar_config(disable=True)
    place(pipe, device)
    return pipe


# Wan2.1 text-to-video (config.json of the public checkpoints); 1.3B and 14B differ in these.
RANDOM_INIT = {
    "wan-1.3b": {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
    "wan-14b": {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40},
}


def random_pipeline(name: str, device: torch.device, dtype: torch.dtype) -> WanPipeline:
    """A Wan of a true size with random weights and nothing else: what it computes is noise, what it costs is real."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            transformer = WanTransformer3DModel(
                attention_head_dim=128, in_channels=16, out_channels=16, text_dim=4096, freq_dim=256,
                cross_attn_norm=True, qk_norm="rms_norm_across_heads", patch_size=(1, 2, 2), **RANDOM_INIT[name],
            )  # fmt: skip
    finally:
        torch.set_default_dtype(before)
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=3.0
    )
    pipe = WanPipeline(tokenizer=None, text_encoder=None, vae=None, transformer=transformer.eval(), scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tie_embeddings(text_encoder: Any, names: set[str]) -> None:
    """Make UMT5's `encoder.embed_tokens` the tensor that was loaded as `shared`, or the other way round.

    Some transformers 5 releases load only one of the two and leave the other random, which turns every prompt to noise.

    Args:
        names: the tensor names in the encoder's files.
    Raises: WeightsError if the files hold neither.
    """
    inner = text_encoder.encoder
    if inner.embed_tokens.weight.data_ptr() == text_encoder.shared.weight.data_ptr():
        if not names & {"shared.weight", "encoder.embed_tokens.weight"}:
            raise WeightsError("the text encoder's files hold no token embedding (shared.weight). Get the model again.")
        return
    if "shared.weight" in names:
        inner.embed_tokens.weight = text_encoder.shared.weight
    elif "encoder.embed_tokens.weight" in names:
        text_encoder.shared.weight = inner.embed_tokens.weight
    else:
        raise WeightsError("the text encoder's files hold no token embedding (shared.weight). Get the model again.")


def place(pipe: WanPipeline, device: torch.device) -> None:
    """Move a pipeline to its device; on a card too small for all of it at once, one component at a time."""
    if device.type != "cuda":
        pipe.to(device)
        return
    parts = [pipe.transformer, pipe.text_encoder, pipe.vae]
    needed = sum(t.numel() * t.element_size() for part in parts for t in part.state_dict().values())
    free, _ = torch.cuda.mem_get_info(device)
    if needed + ACTIVATIONS_GIB * 2**30 <= free:
        pipe.to(device)
    else:
        pipe.enable_model_cpu_offload(device=device)


def set_flow_shift(pipe: WanPipeline, flow_shift: float) -> None:
    """Give the pipeline a UniPC sampler with another flow shift; all else stays as the model's own."""
    pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config, flow_shift=flow_shift)


def decode_latents(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """Latents (1, C, T, h, w), normalised, to video frames (F, H, W, 3) uint8 on the CPU."""
    shape = (1, -1, 1, 1, 1)
    mean = torch.tensor(vae.config.latents_mean, device=latents.device, dtype=torch.float32).view(shape)
    std = torch.tensor(vae.config.latents_std, device=latents.device, dtype=torch.float32).view(shape)
    video = vae.decode((latents.float() * std + mean).to(vae.dtype), return_dict=False)[0][0]
    frames = video.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
    return frames.permute(1, 2, 3, 0).cpu()


def _describe(folder: Path, name: str) -> ModelSource:
    """Read a pipeline folder's small files. Raises WeightsError if it is no Wan2.1 text-to-video pipeline."""
    if not folder.is_dir():
        raise WeightsError(
            f"{folder} is a file, but a model is a folder with a model_index.json in it. "
            "Give a diffusers Wan2.1 folder with --model."
        )
    index = _read_json(folder / "model_index.json", folder)
    kind = index.get("_class_name")
    if kind != "WanPipeline":
        raise WeightsError(f"{folder} holds a {kind}, not a WanPipeline. Give a diffusers Wan2.1 text-to-video folder.")
    if index.get("boundary_ratio") is not None or (index.get("transformer_2") or [None])[0] is not None:
        raise WeightsError(f"{folder} is a Wan2.2 pipeline with two transformers. slagen runs Wan2.1 text-to-video.")
    transformer = _read_json(folder / "transformer" / "config.json", folder)
    vae = _read_json(folder / "vae" / "config.json", folder)
    if transformer.get("image_dim") is not None or transformer.get("in_channels") != transformer.get("out_channels"):
        raise WeightsError(f"{folder} is an image-to-video model. slagen runs Wan2.1 text-to-video.")
    defaults = ModelDefaults()
    if (folder / "slagen.json").is_file():
        try:
            defaults = ModelDefaults.from_dict(_read_json(folder / "slagen.json", folder))
        except SlagenError as error:
            raise WeightsError(f"{folder / 'slagen.json'}: {error}") from error
    _, patch_height, patch_width = transformer.get("patch_size", (1, 2, 2))
    grid = vae.get("scale_factor_spatial", 8) * max(patch_height, patch_width)
    factor = vae.get("scale_factor_temporal", 4)
    return ModelSource(folder, name, defaults, grid, factor, transformer.get("attention_head_dim", 128))


def _read_json(path: Path, folder: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise WeightsError(
            f"{folder} has no {path.relative_to(folder)}, so it is no diffusers pipeline. Give a folder as "
            "WanPipeline.save_pretrained writes it."
        ) from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise WeightsError(f"{path} cannot be read: {_first_line(error)}. Get the model again.") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path} holds no JSON object. Get the model again.")
    return content


def _tensor_names(folder: Path) -> set[str]:
    """Names of all tensors in a component's safetensors files; every header is checked against its file's length."""
    index = next(iter(sorted(folder.glob("*.safetensors.index.json"))), None)
    if index is not None:
        shards = sorted(set(_read_json(index, folder).get("weight_map", {}).values()))
        if not shards or any(Path(shard).name != shard for shard in shards):
            raise WeightsError(f"{index} names no shards, or shards outside its folder. Get the model again.")
        files = [folder / shard for shard in shards]
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = [p.name for p in folder.glob("*.bin")] if folder.is_dir() else []
        why = f" ({pickles[0]} is a pickle, which can run code)" if pickles else ""
        raise WeightsError(f"{folder} holds no safetensors{why}. Get the model's safetensors.")
    names: set[str] = set()
    for file in files:
        try:
            with safe_open(file, framework="pt") as handle:
                names.update(handle.keys())
        except (SafetensorError, OSError) as error:
            raise WeightsError(
                f"{file} is missing, broken or truncated ({error}). Copy or download it again."
            ) from error
    return names


def _download(repo_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(repo_id, allow_patterns=HUB_FILES))
    except RepositoryNotFoundError as error:
        raise UsageError(f"the hub has no model {repo_id!r}, or it wants a login (HF_TOKEN). Check --model.") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, RuntimeError) as error:
        raise EnvironmentProblem(
            f"{repo_id} is not on this machine and the hub cannot be reached ({_first_line(error)}). Try again online, "
            f"give a folder with --model, or try the bundled model with --model {BUNDLED}."
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
