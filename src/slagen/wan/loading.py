"""From a preset, a folder or a hub id to a Wan2.1 text-to-video pipeline that is known to be whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import (
    AutoencoderKLWan,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    GGUFQuantizationConfig,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.utils import logging as diffusers_logging
from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers import UMT5Config, UMT5EncoderModel
from transformers.utils import logging as transformers_logging

from slagen.attention.cost import ModelShape
from slagen.config import Sampler
from slagen.errors import SlagenError, UsageError, WeightsError
from slagen.formats.bounds import is_finite
from slagen.formats.gguf_files import check_values
from slagen.formats.kinds import REFUSALS, identify
from slagen.formats.model_files import check_parts, read_json
from slagen.formats.names import rename_vae
from slagen.formats.reading import component_files, read_component, read_tensors
from slagen.formats.transformer import Checkpoint, check_fit, read_checkpoint
from slagen.io.files import scratch
from slagen.io.paths import check_utf8, user_path
from slagen.wan.hub import OnNote, closed_hub, fetch_pipeline, fetch_weights, is_cached
from slagen.wan.presets import (
    BUNDLED,
    CUDA_DEFAULT,
    PRESETS,
    WAN_1_3B,
    WAN_14B,
    ModelSource,
    bundled_folder,
    describe_folder,
    is_hub_id,
    unknown_model,
)
from slagen.wan.rcm import RCMScheduler

ACTIVATIONS_GIB = 8  # room to leave on the card beside the weights: a 480p denoising step or VAE decode


def resolve_model(
    model: str | None,
    device_type: str,
    *,
    own_transformer: bool = True,
    local_files_only: bool = False,
    on_note: OnNote = lambda text: None,
) -> ModelSource:
    """Find a model's folder, downloading a hub id, and check that it is a Wan2.1 text-to-video pipeline.

    Args:
        model: a preset, a folder or a hub id; None is TurboWan 1.3B on CUDA and the bundled model elsewhere.
        own_transformer: False where another transformer will be used: its weights are not downloaded.
        local_files_only: download nothing.
        on_note: told of downloads.
    Raises: UsageError for a name that is none of these, EnvironmentProblem if the hub does not give it, WeightsError if
        the folder holds something else.
    """
    if model is None:
        model = CUDA_DEFAULT if device_type == "cuda" else BUNDLED
    if model == BUNDLED:
        return describe_folder(bundled_folder(), BUNDLED)
    options: dict[str, Any] = {"local_files_only": local_files_only, "on_note": on_note}
    preset = PRESETS.get(model)
    if preset is not None and preset.base is not None:
        weights = None
        if preset.weights is not None and own_transformer:
            weights = fetch_weights(preset.weights, **options)
        folder = fetch_pipeline(preset.base, transformer=own_transformer and weights is None, **options)
        source = describe_folder(folder, preset.name)
        return dataclasses.replace(source, defaults=preset.defaults, weights=weights)
    path = user_path(model)
    if path.exists():
        return describe_folder(path, path.resolve().name)
    if is_hub_id(model):
        return describe_folder(fetch_pipeline(model, transformer=own_transformer, **options), model)
    raise unknown_model(model)


def check_told_model(path: Path, model: str) -> None:
    """Raises UsageError for a model that a file names, which may be anybody's, and that would be downloaded for it."""
    known = model in (BUNDLED, *PRESETS) or user_path(model).exists()
    if not known and is_hub_id(model) and not is_cached(model):
        raise UsageError(f"{path} was made with the hub model {model}; give --model {model} to fetch it.")


def load_pipeline(
    source: ModelSource,
    device: torch.device,
    dtype: torch.dtype,
    vae: Path | None = None,
    *,
    text_encoder: bool = True,
    transformer: bool = True,
) -> WanPipeline:
    """Load a pipeline: transformer and text encoder in `dtype`, the VAE in float32, on the device as memory allows.

    Nothing is ever cast after loading: norms, time embedding and rotary tables are float32 from the first.

    Args:
        vae: a file or folder of another VAE, in the original or in diffusers' names.
        text_encoder: False leaves text encoder and tokenizer out. transformer: False leaves it out.
    Raises: WeightsError if a file is broken, or a component's tensors are not its model's: one is missing or one too
        many, or has another shape, another kind of number, or values that are not finite.
    """
    check_utf8(source.folder)
    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    read_json(source.folder / "scheduler" / "scheduler_config.json", source.folder)
    check_parts(source.folder, ("tokenizer",) if text_encoder else ())
    parts: dict[str, Any] = {
        "transformer": load_transformer(source, dtype) if transformer else None,
        "vae": load_vae(vae or source.folder / "vae", source.folder / "vae"),
        "text_encoder": load_text_encoder(source.folder / "text_encoder", dtype) if text_encoder else None,
    }
    if not text_encoder:
        parts["tokenizer"] = None
    with closed_hub(), _made_of(f"the tokenizer or scheduler of {source.folder}"):
        pipe = WanPipeline.from_pretrained(source.folder, local_files_only=True, **parts)
    if text_encoder:
        known, words = pipe.text_encoder.config.vocab_size, len(pipe.tokenizer)
        if words > known or pipe.tokenizer.pad_token is None:
            what = f"knows {words} words, but the text encoder {known}" if words > known else "has no padding token"
            raise WeightsError(f"{source.folder / 'tokenizer'} {what}. Get the model again.")
    pipe.set_progress_bar_config(disable=True)
    place(pipe, device)
    return pipe


@contextmanager
def _made_of(what: str | Path) -> Iterator[None]:
    """In here other libraries make something of a file; what they raise over its content becomes WeightsError."""
    try:
        yield
    except (SlagenError, ImportError, MemoryError, UnicodeEncodeError):
        raise  # a package is not there, or a path is none that a library takes
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # that is Rust's
            raise
        said = " ".join(str(error).split()) or type(error).__name__
        raise WeightsError(f"{what} is broken: {said[:300].rstrip('.')}. Get the model again.") from error


@contextmanager
def _no_drawing() -> Iterator[None]:
    """Layers made in here draw no random weights, which for the meta device takes time, and torch's compiler."""
    layers: tuple[Any, ...] = (nn.Embedding, nn.Linear, _ConvNd)
    draw = [layer.reset_parameters for layer in layers]
    for layer in layers:
        layer.reset_parameters = lambda self: None
    try:
        yield
    finally:
        for layer, former in zip(layers, draw, strict=True):
            layer.reset_parameters = former


def load_transformer(source: ModelSource, dtype: torch.dtype) -> WanTransformer3DModel:
    """The transformer of a model, from its folder or from the file that replaces it; on the CPU, in eval mode.

    Raises: WeightsError unless every tensor is there, once, in the right shape.
    """
    config = source.folder / "transformer"
    if source.weights is None:
        component_files(config)
    checkpoint = read_checkpoint(source.weights or config, dtype)
    if not isinstance(checkpoint, Checkpoint):
        raise WeightsError(f"{source.weights} holds SLA weights alone, not a transformer. Give it with --weights.")
    return build_transformer(checkpoint, read_json(config / "config.json", source.folder), dtype)


def build_transformer(checkpoint: Checkpoint, config: dict[str, Any], dtype: torch.dtype) -> WanTransformer3DModel:
    """A transformer with a checkpoint's weights in `dtype`, but for what diffusers keeps in float32.

    Args:
        config: as in a transformer's config.json.
    Raises: WeightsError with the list of what does not fit.
    """
    made_of = _made_of(f"the config.json of the transformer for {checkpoint.path}")
    with init_empty_weights(), _no_drawing(), made_of:
        model = WanTransformer3DModel.from_config(config)
    state = model.state_dict()
    heads = model.config
    check_fit(
        checkpoint, {name: tensor.shape for name, tensor in state.items()}, heads.num_layers, heads.attention_head_dim
    )
    if checkpoint.path.suffix == ".gguf":  # stays quantised, multiplied out by diffusers as it is used
        check_values(checkpoint.path)
        with scratch() as folder, closed_hub(), _made_of(str(checkpoint.path)):
            model.save_config(folder)
            return WanTransformer3DModel.from_single_file(
                str(checkpoint.path),
                config=str(folder),
                quantization_config=GGUFQuantizationConfig(compute_dtype=dtype),
            ).eval()
    kept = set(WanTransformer3DModel._keep_in_fp32_modules)
    model.load_state_dict(_cast(checkpoint.tensors, dtype, kept, checkpoint.path), strict=True, assign=True)
    return model.requires_grad_(True).eval()


def _cast(tensors: dict[str, torch.Tensor], dtype: torch.dtype, kept: set[str], path: Path) -> dict[str, torch.Tensor]:
    """Tensors in `dtype`, but in float32 where a part of the name is in `kept`. Raises WeightsError beyond float16."""
    cast = {name: x.to(torch.float32 if kept & set(name.split(".")) else dtype) for name, x in tensors.items()}
    for name, tensor in cast.items():
        if tensor.dtype == torch.float16 != tensors[name].dtype and not is_finite(tensor):
            raise WeightsError(f"{name} in {path} has values beyond float16. Try --dtype bf16, or fp32.")
    return cast


def load_vae(path: Path, config: Path | None) -> AutoencoderKLWan:
    """A VAE from a file or folder in the original or in diffusers' names, float32.

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
        raise WeightsError(f"{path} is no Wan2.1 VAE. Give Wan2.1_VAE.pth, or the vae folder of a diffusers pipeline.")
    fields = {} if config is None else read_json(config / "config.json", config)
    with init_empty_weights(), _no_drawing(), _made_of(path if config is None else config / "config.json"):
        vae = AutoencoderKLWan.from_config(fields)
    if "conv1.weight" in tensors:
        tensors = rename_vae(tensors, vae.config.num_res_blocks)
    check_fit(Checkpoint(path, "vae", tensors, {}), {name: x.shape for name, x in vae.state_dict().items()}, 0, 0)
    vae.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, strict=True, assign=True)
    return vae.eval()


EMBEDDINGS = ("shared.weight", "encoder.embed_tokens.weight")  # one tensor of the text encoder, by either name or both
UNUSED = ("decoder.", "lm_head.")  # of the whole UMT5, whose encoder alone runs


def load_text_encoder(folder: Path, dtype: torch.dtype) -> UMT5EncoderModel:
    """The text encoder of a pipeline, from its folder, on the CPU and in eval mode.

    Raises: WeightsError unless it is a UMT5 encoder, whole, and of its config's size.
    """
    fields = read_json(folder / "config.json", folder)
    if fields.get("model_type") != "umt5":
        raise WeightsError(f"{folder} holds a {fields.get('model_type')}, but Wan2.1's text encoder is a umt5.")
    tensors = {name: x for name, x in read_component(folder).items() if not name.startswith(UNUSED)}
    with torch.device("meta"), _no_drawing(), _made_of(folder / "config.json"):
        model = UMT5EncoderModel(UMT5Config.from_dict(fields))
    found = [tensors[name] for name in EMBEDDINGS if name in tensors]
    if len(found) == 2 and (found[0].shape != found[1].shape or not torch.equal(*found)):
        raise WeightsError(f"{folder} has one token embedding by two names that differ. Get the model again.")
    tensors |= {name: found[0] for name in EMBEDDINGS if found}
    check_fit(Checkpoint(folder, "umt5", tensors, {}), {name: x.shape for name, x in model.state_dict().items()}, 0, 0)
    kept = set(model._keep_in_fp32_modules) if dtype == torch.float16 else set()  # they overflow in float16
    model.load_state_dict(_cast(tensors, dtype, kept, folder), strict=True, assign=True)
    model.encoder.embed_tokens.weight = model.shared.weight
    model.config.dtype = dtype
    return model.eval()


RANDOM_INIT = {"wan-1.3b": WAN_1_3B, "wan-14b": WAN_14B}


def wan_config(shape: ModelShape) -> dict[str, Any]:
    """The transformer config of the public Wan2.1 text-to-video models, which differ in these sizes alone."""
    return {
        "num_layers": shape.num_layers, "num_attention_heads": shape.num_heads, "attention_head_dim": shape.head_dim,
        "ffn_dim": shape.ffn_dim, "in_channels": 16, "out_channels": 16, "text_dim": 4096, "freq_dim": 256,
        "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "patch_size": (1, 2, 2), "eps": 1e-6,
        "rope_max_seq_len": 1024,
    }  # fmt: skip


def random_pipeline(name: str, device: torch.device, dtype: torch.dtype) -> WanPipeline:
    """A Wan of a true size with random weights and nothing else: what it computes is noise, what it costs is real."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            transformer = WanTransformer3DModel(**wan_config(RANDOM_INIT[name]))
    finally:
        torch.set_default_dtype(before)
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=3.0
    )
    pipe = WanPipeline(tokenizer=None, text_encoder=None, vae=None, transformer=transformer.eval(), scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def place(pipe: WanPipeline, device: torch.device) -> None:
    """Move a pipeline to its device; on a card too small for all of it at once, one component at a time."""
    if device.type != "cuda":
        pipe.to(device)
        return
    parts = [part for part in (pipe.transformer, pipe.text_encoder, pipe.vae) if part is not None]
    needed = sum(t.numel() * t.element_size() for part in parts for t in part.state_dict().values())
    free, _ = torch.cuda.mem_get_info(device)
    if len(parts) == 1 or needed + ACTIVATIONS_GIB * 2**30 <= free:
        pipe.to(device)
    else:
        pipe.enable_model_cpu_offload(device=device)


def set_sampler(
    pipe: WanPipeline, sampler: Sampler, flow_shift: float, *, sigma_max: float = 80.0, stochastic: bool = True
) -> None:
    """Give a pipeline a sampler; UniPC keeps what else the model's own scheduler says.

    Args:
        flow_shift: of all but rCM, whose noise levels `sigma_max` sets. stochastic: rCM only.
    """
    flow: dict[str, Any] = {"num_train_timesteps": 1000}
    if sampler == "rcm":
        pipe.scheduler = RCMScheduler(sigma_max=sigma_max, stochastic=stochastic)
    elif sampler == "euler":
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=flow_shift, **flow)
    elif sampler == "dpm++":
        pipe.scheduler = DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=flow_shift, **flow
        )
    else:
        pipe.scheduler = UniPCMultistepScheduler.from_config(
            pipe.scheduler.config, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=flow_shift
        )


def decode_latents(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """Latents (1, C, T, h, w), normalised, to video frames (F, H, W, 3) uint8 on the CPU.

    Raises: SlagenError for values that are not finite, WeightsError for a video without any content, but for a black
        or white one, which a prompt may ask for.
    """
    mean, std = (x.to(latents.device) for x in _statistics(vae))
    video = vae.decode((latents.float() * std + mean).to(vae.dtype), return_dict=False)[0][0].float()
    if not is_finite(video):
        raise SlagenError(
            "the VAE made values of these latents that are not finite, so there is no video. Try other settings, or "
            "another VAE with --vae."
        )
    side = video.shape[-1] // latents.shape[-1]  # of the square of pixels that a latent stands for
    squares = video.unflatten(3, (-1, side)).unflatten(2, (-1, side))  # (3, F, h, side, w, side)
    first = squares[:, :1, :1, :, :1]
    if (squares == first).all() and (first.abs() < 1).any():
        raise WeightsError(
            "the decoded video is the same everywhere and at all times, so the weights of the VAE or the transformer "
            "are damaged or do not fit together. Get the model again."
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
