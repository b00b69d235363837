"""The models that have a name: where their files are on the hub, their sizes and default settings. No torch here."""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass
from pathlib import Path

from slagen.attention.cost import ModelShape
from slagen.attention.learned import label
from slagen.attention.policy import AttentionPolicy
from slagen.attention.protocol import Method
from slagen.attention.sla.config import SLAConfig
from slagen.errors import UsageError, WeightsError
from slagen.formats.published import TURBO_SLA
from slagen.io.paths import user_path
from slagen.io.text import quote_path
from slagen.wan.defaults import ModelDefaults, TrainingDefaults
from slagen.wan.folder import BUNDLED, IMAGE_TOKENS, bundled_folder, is_hub_id

# The negative prompt of the original Wan2.1 repository (wan/configs/shared_config.py): overexposed, static, blurred
# details, subtitles, worst quality, JPEG artefacts, ugly, extra fingers, deformed, crowded, walking backwards.
WAN_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，"
    "静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
WAN_1_3B = ModelShape(num_layers=30, num_heads=12, head_dim=128, ffn_dim=8960, text_tokens=512)
WAN_14B = ModelShape(num_layers=40, num_heads=40, head_dim=128, ffn_dim=13824, text_tokens=512)
WAN_14B_IMAGE = dataclasses.replace(WAN_14B, text_tokens=512 + IMAGE_TOKENS)


@dataclass(frozen=True)
class Preset:
    """A model by name.

    Args:
        base: hub id of its diffusers folder (text encoder, VAE, and without `weights` the transformer); None: bundled.
        weights: hub id of the repository whose one transformer file replaces the base's; its file names and sizes are
            asked of the hub, as nothing here was able to verify them.
        sla: what its SLA weights were trained with; None where it has none.
        recommended: the attention method to run its weights with, where that is not the default.
        policy: what runs dense with that method unless it is asked for otherwise.
        takes_image: whether it is an image-to-video model.
    """

    name: str
    about: str
    base: str | None
    weights: str | None
    shape: ModelShape
    defaults: ModelDefaults
    sla: SLAConfig | None = None
    recommended: str | None = None
    policy: AttentionPolicy = AttentionPolicy()
    takes_image: bool = False


_WAN = ModelDefaults(negative_prompt=WAN_NEGATIVE_PROMPT)
_TURBO = ModelDefaults(steps=4, guidance_scale=1.0, sampler="rcm", training=TrainingDefaults(caption_dropout=0.0))
_WAN_720P = dataclasses.replace(_WAN, flow_shift=5.0, width=1280, height=720)
_TURBO_720P = dataclasses.replace(_TURBO, width=1280, height=720)
_WAN_IMAGE = dataclasses.replace(_WAN, steps=40)
_WAN_IMAGE_720P = dataclasses.replace(_WAN_720P, steps=40)
# As in the paper's figures for Wan, with tau 1: Sol-Attn, arXiv:2607.24027.
_SOL = AttentionPolicy(dense_steps="20%", dense_layers="0")
_BASE_1_3B, _BASE_14B = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "Wan-AI/Wan2.1-T2V-14B-Diffusers"

PRESETS = {
    preset.name: preset
    for preset in (
        Preset("wan2.1-t2v-1.3b", "Wan2.1 1.3B, best at 480p", _BASE_1_3B, None, WAN_1_3B, _WAN,
               recommended="sol", policy=_SOL),
        Preset("wan2.1-t2v-14b", "Wan2.1 14B, best at 720p", _BASE_14B, None, WAN_14B, _WAN_720P,
               recommended="sol", policy=_SOL),
        Preset("turbowan2.1-t2v-1.3b-480p", "TurboDiffusion 1.3B: SLA and 4 steps", _BASE_1_3B,
               "TurboDiffusion/TurboWan2.1-T2V-1.3B-480P", WAN_1_3B, _TURBO, TURBO_SLA),
        Preset("turbowan2.1-t2v-14b-480p", "TurboDiffusion 14B: SLA and 4 steps", _BASE_14B,
               "TurboDiffusion/TurboWan2.1-T2V-14B-480P", WAN_14B, _TURBO, TURBO_SLA),
        Preset("turbowan2.1-t2v-14b-720p", "TurboDiffusion 14B for 720p: SLA and 4 steps", _BASE_14B,
               "TurboDiffusion/TurboWan2.1-T2V-14B-720P", WAN_14B, _TURBO_720P, TURBO_SLA),
        Preset("wan2.1-i2v-14b-480p", "Wan2.1 14B image-to-video", "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers", None,
               WAN_14B_IMAGE, _WAN_IMAGE, takes_image=True),
        Preset("wan2.1-i2v-14b-720p", "Wan2.1 14B image-to-video for 720p", "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers",
               None, WAN_14B_IMAGE, _WAN_IMAGE_720P, takes_image=True),
    )
}  # fmt: skip
CUDA_DEFAULT = "turbowan2.1-t2v-1.3b-480p"  # the only public SLA weights of a size that every card runs


def recommended_policy(model: str | None, attention: str) -> AttentionPolicy:
    """What runs dense of a model's clips with an attention method unless it is asked for otherwise: nothing, but for
    a preset that recommends the method."""
    preset = PRESETS.get(model or "")
    return AttentionPolicy() if preset is None or preset.recommended != attention else preset.policy


def local_folder(model: str) -> Path | None:
    """Where a model lies on this machine; None for a preset, and for a hub id that is no folder here.

    Raises: UsageError for a name that is none of these.
    """
    if model == BUNDLED:
        return bundled_folder()
    if model in PRESETS:
        return None
    path = user_path(model)
    if path.exists():
        return path
    if is_hub_id(model):
        return None
    raise unknown_model(model)


def unknown_model(model: str) -> UsageError:
    """The error for a name that is not a preset, a folder or a hub id, with the nearest name there is."""
    known = [BUNDLED, *PRESETS]
    close = difflib.get_close_matches(model.lower(), known, n=1, cutoff=0.4)
    return UsageError(
        f"model {quote_path(model)} is not a preset, a folder or a Hugging Face id. Presets: {', '.join(known)}. "
        f"Try --model {(close or known)[0]}."
    )


def check_sampler(sampler: str, distilled: bool) -> None:
    """Raise WeightsError for a sampler that weights are not made for: rcm for all but those distilled for it."""
    if distilled and sampler != "rcm":
        raise WeightsError(
            f"--sampler is {sampler}, but these weights are distilled for rcm and produce noise with any other "
            "sampler. Leave --sampler out."
        )
    if not distilled and sampler == "rcm":
        raise WeightsError(
            "--sampler is rcm, but these weights are not distilled for it and produce noise with it. Leave "
            "--sampler out."
        )


def never_tuned(name: str, method: Method) -> WeightsError:
    """The error for attention that needs weights, asked of a model that has none for it."""
    if label(method.name) != "SLA":
        return WeightsError(
            f"{name} has no {method.name} weights, which {method.name} attention needs. Give them with --weights, or "
            f"train them with slagen finetune --attention {method.name} --from-dense. Without them, use --attention "
            "sol, which needs no training, or --attention dense; or run it anyway with --allow-untrained."
        )
    return WeightsError(
        f"{name} was not fine-tuned for SLA: without fine-tuning, the attention that SLA skips is lost, and videos are "
        "poor. Use --attention sol, which needs no training, or --attention dense; or give SLA weights with --weights, "
        "or run it anyway with --allow-untrained."
    )
