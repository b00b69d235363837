"""Which models there are, and what a model's folder says of itself. No torch and no network, for `slagen plan`."""

from __future__ import annotations

import dataclasses
import difflib
import re
from dataclasses import dataclass
from pathlib import Path

from slagen.attention.cost import ModelShape
from slagen.config import ModelDefaults, SLAConfig, TrainingDefaults
from slagen.errors import EnvironmentProblem, SlagenError, UsageError, WeightsError
from slagen.formats.model_files import SETTINGS_KEY, check_parts, read_header, read_json, read_strings
from slagen.formats.published import TURBO_SLA
from slagen.io.files import kind_of_path
from slagen.io.text import quote

BUNDLED = "tiny-wan"

# The negative prompt of the original Wan2.1 repository (wan/configs/shared_config.py): overexposed, static, blurred
# details, subtitles, worst quality, JPEG artefacts, ugly, extra fingers, deformed, crowded, walking backwards.
WAN_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，"
    "静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
WAN_1_3B = ModelShape(num_layers=30, num_heads=12, head_dim=128, ffn_dim=8960, text_tokens=512)
WAN_14B = ModelShape(num_layers=40, num_heads=40, head_dim=128, ffn_dim=13824, text_tokens=512)


@dataclass(frozen=True)
class Preset:
    """A model by name.

    Args:
        base: hub id of its diffusers folder (text encoder, VAE, and without `weights` the transformer); None: bundled.
        weights: hub id of the repository whose one transformer file replaces the base's; its file names and sizes are
            asked of the hub, as nothing here was able to verify them.
        sla: what its SLA weights were trained with; None where it has none.
    """

    name: str
    about: str
    base: str | None
    weights: str | None
    shape: ModelShape
    defaults: ModelDefaults
    sla: SLAConfig | None = None


_WAN = ModelDefaults(negative_prompt=WAN_NEGATIVE_PROMPT)
_TURBO = ModelDefaults(steps=4, guidance_scale=1.0, sampler="rcm", training=TrainingDefaults(caption_dropout=0.0))
_WAN_720P = dataclasses.replace(_WAN, flow_shift=5.0, width=1280, height=720)
_TURBO_720P = dataclasses.replace(_TURBO, width=1280, height=720)
_BASE_1_3B, _BASE_14B = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "Wan-AI/Wan2.1-T2V-14B-Diffusers"

PRESETS = {
    preset.name: preset
    for preset in (
        Preset("wan2.1-t2v-1.3b", "Wan2.1 1.3B, best at 480p", _BASE_1_3B, None, WAN_1_3B, _WAN),
        Preset("wan2.1-t2v-14b", "Wan2.1 14B, best at 720p", _BASE_14B, None, WAN_14B, _WAN_720P),
        Preset("turbowan2.1-t2v-1.3b-480p", "TurboDiffusion 1.3B: SLA and 4 steps", _BASE_1_3B,
               "TurboDiffusion/TurboWan2.1-T2V-1.3B-480P", WAN_1_3B, _TURBO, TURBO_SLA),
        Preset("turbowan2.1-t2v-14b-480p", "TurboDiffusion 14B: SLA and 4 steps", _BASE_14B,
               "TurboDiffusion/TurboWan2.1-T2V-14B-480P", WAN_14B, _TURBO, TURBO_SLA),
        Preset("turbowan2.1-t2v-14b-720p", "TurboDiffusion 14B for 720p: SLA and 4 steps", _BASE_14B,
               "TurboDiffusion/TurboWan2.1-T2V-14B-720P", WAN_14B, _TURBO_720P, TURBO_SLA),
    )
}  # fmt: skip
CUDA_DEFAULT = "turbowan2.1-t2v-1.3b-480p"  # the only public SLA weights of a size that every card runs


@dataclass(frozen=True)
class ModelSource:
    """Where a model lies, what to call it, and the settings it was made for.

    Args:
        folder: in diffusers layout; its transformer may hold a config alone where `weights` replaces it.
        weights: a transformer file to use instead of the folder's.
        patch_size: latent frames, rows and columns of a token. spatial_factor: pixels a latent row or column.
        spatial_grid: height and width must be multiples of this many pixels.
        temporal_factor: video frames a latent frame.
    """

    folder: Path
    name: str
    defaults: ModelDefaults
    shape: ModelShape
    spatial_grid: int = 16
    temporal_factor: int = 4
    weights: Path | None = None
    patch_size: tuple[int, ...] = (1, 2, 2)
    spatial_factor: int = 8

    @property
    def head_dim(self) -> int:
        return self.shape.head_dim

    def num_tokens(self, width: int, height: int, num_frames: int) -> int:
        """L, the length of the self-attention sequence; sizes in pixels and video frames."""
        return num_tokens(width, height, num_frames, self.spatial_grid, self.temporal_factor)


def num_tokens(width: int, height: int, num_frames: int, spatial_grid: int = 16, temporal_factor: int = 4) -> int:
    """L, the length of the self-attention sequence; sizes in pixels and video frames."""
    frames = (num_frames - 1) // temporal_factor + 1
    return frames * (width // spatial_grid) * (height // spatial_grid)


def bundled_folder() -> Path:
    """The model that travels with slagen: inside the package when installed, in weights/ in a checkout."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "weights" / BUNDLED, package.parents[1] / "weights" / BUNDLED):
        if (folder / "model_index.json").is_file():
            return folder
    raise EnvironmentProblem(f"the bundled model {BUNDLED} is missing from this installation. Install slagen again.")


def is_hub_id(name: str) -> bool:
    """Whether a name has the form owner/name."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name) is not None


def unknown_model(model: str) -> UsageError:
    """The error for a name that is no preset, folder or hub id, with the nearest name there is."""
    known = [BUNDLED, *PRESETS]
    close = difflib.get_close_matches(model.lower(), known, n=1, cutoff=0.4)
    return UsageError(
        f"model {quote(model)} is no preset, folder or hub id. Presets: {', '.join(known)}. "
        f"Try --model {(close or known)[0]}."
    )


def describe_folder(folder: Path, name: str) -> ModelSource:
    """Read a pipeline folder's small files. Raises WeightsError if it is no Wan2.1 text-to-video pipeline."""
    if not folder.is_dir():
        raise WeightsError(
            f"{folder} {kind_of_path(folder)}, but a model is a folder with a model_index.json in it. Give a diffusers "
            "Wan2.1 folder with --model; one transformer file goes with --weights."
        )
    if not (folder / "model_index.json").is_file() and list(folder.glob("models_t5*.pth")):
        raise WeightsError(
            f"{folder} is Wan2.1 in its original layout, whose T5 text encoder diffusers does not read. Give "
            f"--model wan2.1-t2v-1.3b (or -14b), and the transformer in this folder with --weights."
        )
    index = read_json(folder / "model_index.json", folder)
    kind = index["_class_name"]
    if kind != "WanPipeline":
        raise WeightsError(f"{folder} holds a {kind}, not a WanPipeline. Give a diffusers Wan2.1 text-to-video folder.")
    if index.get("expand_timesteps"):
        raise WeightsError(f"{folder} is Wan2.2 TI2V-5B, which has a VAE of its own. slagen runs Wan2.1 text-to-video.")
    if index.get("boundary_ratio") is not None or (index.get("transformer_2") or [None])[0] is not None:
        raise WeightsError(f"{folder} is a Wan2.2 pipeline with two transformers. slagen runs Wan2.1 text-to-video.")
    transformer = read_json(folder / "transformer" / "config.json", folder)
    vae = read_json(folder / "vae" / "config.json", folder)
    check_parts(folder, ("text_encoder", "scheduler"))
    if transformer.get("image_dim") is not None or transformer.get("in_channels") != transformer.get("out_channels"):
        raise WeightsError(f"{folder} is an image-to-video model. slagen runs Wan2.1 text-to-video.")
    defaults, place = ModelDefaults(), folder / "slagen.json"
    own: dict[str, object] = (transformer.get(SETTINGS_KEY) or {}).get("defaults") or {}
    if place.is_file() or own:
        try:
            defaults = ModelDefaults.from_dict(read_json(place, folder) if place.is_file() else own)
        except WeightsError:
            raise
        except SlagenError as error:
            raise WeightsError(f"{place if place.is_file() else folder / 'transformer'}: {error}") from error
    patch = tuple(transformer.get("patch_size", (1, 2, 2)))
    factor = vae.get("scale_factor_spatial", 8)
    shape = ModelShape(
        transformer.get("num_layers", 30), transformer.get("num_attention_heads", 12),
        transformer.get("attention_head_dim", 128), transformer.get("ffn_dim", 8960), defaults.max_sequence_length,
    )  # fmt: skip
    return ModelSource(
        folder, name, defaults, shape, factor * max(patch[1:]), vae.get("scale_factor_temporal", 4),
        patch_size=patch, spatial_factor=factor,
    )  # fmt: skip


def check_sampler(sampler: str, distilled: bool) -> None:
    """Raise WeightsError for a sampler that weights are not made for: rcm for all but those distilled for it."""
    if distilled and sampler != "rcm":
        raise WeightsError(
            f"--sampler is {sampler}, but these weights are distilled for rcm and make noise with any other. "
            "Leave --sampler out."
        )
    if not distilled and sampler == "rcm":
        raise WeightsError(
            "--sampler is rcm, but these weights are not distilled for it and make noise with it. Leave --sampler out."
        )


def never_tuned(name: str) -> WeightsError:
    """The error for SLA asked of a model that has no weights for it."""
    return WeightsError(
        f"{name} was never tuned for SLA: without tuning the attention that SLA leaves out is simply lost, and the "
        "video is poor. Give SLA weights with --weights, run these as they are with --attention dense, or go on with "
        "--allow-untrained."
    )


def read_sla_config(path: Path) -> SLAConfig | None:
    """What SLA weights were trained with: an SLA file's metadata say it, or the config.json in a folder where diffusers
    saved them inside a model; None where neither does."""
    try:
        if path.is_dir():
            inner = path / "transformer"
            told = read_json(inner / "config.json", inner)[SETTINGS_KEY]
        else:
            told = read_strings(path, read_header(path)["__metadata__"]["slagen"], {"config": dict})
        return SLAConfig.from_dict(told["config"])
    except (KeyError, UsageError):
        return None
