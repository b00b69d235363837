"""The kind of a weight file, by its tensors' names and shapes, and advice for kinds that slagen does not run."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from slagen.attention.registry import parameter_group
from slagen.formats.layouts import LAYOUTS
from slagen.formats.names import inside, transformers
from slagen.formats.quantised import NOT_READ, beside_a_weight, form_not_read
from slagen.formats.tensor_files import SIDE_FILE_KEYS
from slagen.io.text import line

TEXT_ENCODER_HOME = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"

_RUNS = (
    "slagen runs Wan2.1 text-to-video and image-to-video transformers. Give one, for example from "
    "Wan-AI/Wan2.1-T2V-14B-Diffusers."
)
_MERGE = "Merge it into its model with the tool that made it, and give the merged transformer."
TRANSFORMERS = ("transformer", "image-to-video")
REFUSALS = {
    "lora": "is a LoRA, not a transformer. Give it with --lora.",
    "unmerged-lora": "is a transformer with a LoRA that is not merged into its weights. Merge it (peft: "
    "merge_and_unload), and give the merged transformer.",
    "lokr": f"is a LoKr adapter (LyCORIS), not a transformer. {_MERGE}",
    "loha": f"is a LoHa adapter (LyCORIS), not a transformer. {_MERGE}",
    "lycoris": f"is a LyCORIS adapter (GLoRA, OFT or BOFT), not a transformer. {_MERGE}",
    "difference": "is an adapter of weight differences (diff, diff_b), not a transformer. Give it with --lora.",
    **NOT_READ,
    "vace": f"is Wan2.1 VACE, a model that edits and extends videos, or a part of it. {_RUNS}",
    "skyreels": f"is SkyReels V2 diffusion forcing, which generates videos chunk by chunk. {_RUNS}",
    "speech": f"is an audio-driven transformer (Wan2.2 S2V, HuMo, MultiTalk or FantasyTalking). {_RUNS}",
    "animate": f"is Wan2.2 Animate, which animates a given character. {_RUNS}",
    "control": f"is a transformer controlled by a video or a camera path (such as Fun-Control). {_RUNS}",
    "first-last": f"is Wan2.1 FLF2V, which generates the frames between a first and a last image. {_RUNS}",
    "wan2.2-image-to-video": "is one of the two image-to-video transformers of Wan2.2 A14B, for high or low noise, "
    f"which make a video together. {_RUNS}",
    "ti2v-5b": f"is Wan2.2 TI2V-5B, whose latents have 48 channels and need a different VAE. {_RUNS}",
    "conditioned": "is a Wan transformer with more input than output channels, so it needs more than a text prompt. "
    f"{_RUNS}",
    "text-encoder": "is a T5 text encoder, not a transformer. slagen reads it only from a model folder in diffusers "
    f"format. Give one with --model, such as {TEXT_ENCODER_HOME}.",
    "image-encoder": "is a CLIP image encoder, for image-to-video. slagen reads it only from a model folder in "
    "diffusers format. Give one with --model, such as Wan-AI/Wan2.1-I2V-14B-480P-Diffusers.",
    "vae": "is a VAE, not a transformer. Give it with --vae, or make a diffusers folder: slagen convert FILE FOLDER.",
    "wan2.2-vae": "is the VAE of Wan2.2 TI2V-5B (48 channels). Wan2.1 needs Wan2.1_VAE.pth. Give that with --vae.",
    "tiny-vae": "is a tiny autoencoder for previews (TAE). Give Wan2.1_VAE.pth with --vae.",
    "unknown": "holds no Wan2.1 transformer. Give Wan2.1 text-to-video or SLA weights.",
}

_ADAPTERS = (
    ("unmerged-lora", r"\.base_layer\."),
    ("lokr", r"\.lokr_[wt]\d"),
    ("loha", r"\.hada_[wt]\d"),
    ("lycoris", r"\.(oft_blocks|oft_diag|[ab][12]\.weight)$"),
    (
        "lora",
        r"(?:^|[._])lora(?:[._]|$)",
    ),  # of kohya, musubi, peft, diffusers and Mochi
    ("difference", r"\.(diff|diff_b|diff_m|set_weight|w_norm|b_norm)$"),
)
_VARIANTS = (  # by tensors that no text-to-video transformer has
    ("vace", r"(^|\.)vace_(blocks|patch_embedding)\."),
    ("skyreels", r"(^|\.)fps_(embedding|projection)\."),
    ("animate", r"(^|\.)(face_adapter|face_encoder|motion_encoder|pose_patch_embedding)\."),
    ("speech", r"(^|\.)(casual_audio_encoder|audio_injector|frame_packer|audio_proj|audio_cross_attn|proj_model)\b"),
    ("control", r"(^|\.)(control_adapter|ref_conv|cam_encoder|dwpose_embedding|add_conv_in|patch_embedding_pose)\."),
    ("first-last", r"(^|\.)(img_emb\.emb_pos|condition_embedder\.image_embedder\.pos_embed)$"),
)
_PICTURES = r"(^|\.)(img_emb|image_embedder|k_img|v_img|add_[kv]_proj)\."
_OTHERS = (  # that are no transformer
    ("text-encoder", r"(SelfAttention\.q\.\w+|pos_embedding\.embedding\.weight)$|^token_embedding\.weight$"),
    ("image-encoder", r"^((model\.)?visual\.|textual\.|vision_model\.)"),
    ("wan2.2-vae", r"^(encoder|decoder)\.(down|up)samples\.\d+\.(down|up)samples\."),
    ("tiny-vae", r"^(taesd_)?(encoder|decoder)\.\d+\."),
    ("vae", r"^(encoder|decoder)\."),
)


def identify(entries: Mapping[str, Any] | Iterable[str]) -> str:
    """The kind of a file: one of TRANSFORMERS, "sla", "side-file", or a name in REFUSALS.

    Args:
        entries: its names; or names with tensors or entries of a safetensors header, for kinds that only shapes show.
    """
    content = dict(entries) if isinstance(entries, Mapping) else dict.fromkeys(entries)
    if set(content) == SIDE_FILE_KEYS:
        return "side-file"
    found = list(transformers(content).values())
    prefix = found[0] if found else None
    values = {plain: content[name] for name, plain in inside(content, prefix or "", found).items()}
    if not values:
        return _first(_OTHERS, content) or "unknown"
    if all(map(parameter_group, values)):
        return "sla"
    kind = _first(_ADAPTERS, values) or _first(_VARIANTS, values)
    if kind:
        return kind
    if prefix is not None and (form := form_not_read(values)):
        return form
    weights = [name for name in values if not beside_a_weight(name, values)]
    known = sum(any(layout.rename(_as_weight(name)) for layout in LAYOUTS.values()) for name in weights)
    if known > len(weights) / 2:
        return _by_channels(values) or "transformer"
    return _first(_OTHERS, values) or "unknown"


def _first(table: tuple[tuple[str, str], ...], names: Iterable[str]) -> str | None:
    """The first kind in a table whose pattern is in any name."""
    names = list(names)
    return next((kind for kind, pattern in table if any(re.search(pattern, name) for name in names)), None)


def _as_weight(name: str) -> str:
    return name.replace(".int8_weight", ".weight")


def shape_of(value: Any) -> tuple[int, ...]:
    """The shape of a tensor, or of an entry of a safetensors header; () where it is unknown."""
    if isinstance(value, Tensor):
        return tuple(value.shape)
    shape = value.get("shape") if isinstance(value, dict) else None
    return tuple(shape) if isinstance(shape, list) and all(isinstance(size, int) for size in shape) else ()


def _shape_by_name(values: Mapping[str, Any], wanted: str) -> tuple[int, ...]:
    """The shape of a tensor by its name in diffusers, whatever it is called in the file; () where it is not there."""
    names = (name for name in values if any(layout.rename(name) == wanted for layout in LAYOUTS.values()))
    return next((shape_of(values[name]) for name in names), ())


def _by_channels(values: Mapping[str, Any]) -> str | None:
    """The kind by the numbers of channels, and by whether there is a place for an image encoder's output: the
    image-to-video transformers of Wan2.2 have the same names as those of text-to-video."""
    pictures = any(re.search(_PICTURES, name) for name in values)
    patch, out = (_shape_by_name(values, name) for name in ("patch_embedding.weight", "proj_out.weight"))
    volume = math.prod(patch[2:]) if len(patch) == 5 else 4
    if len(patch) not in (2, 5) or len(out) != 2 or not volume:
        return "image-to-video" if pictures else None
    taken, given = (patch[1] if len(patch) == 5 else patch[1] // volume), out[0] // volume
    if taken == given:
        return "ti2v-5b" if given == 48 else "image-to-video" if pictures else None
    if taken == 2 * given + 4:
        return "image-to-video" if pictures else "wan2.2-image-to-video"
    return "control" if taken in (2 * given, 3 * given, 3 * given + 4) else "conditioned"


_EXPERT = re.compile(r"wan[-_. ]?2[._]?2|(?<![a-z])a14b|(high|low)[-_ ]?noise", re.IGNORECASE)
_DISTILLED = re.compile(
    r"lightx2v|lightning|distill\w*|caus[-_ ]?vid|self[-_ ]?forcing|fusion[-_ ]?x|accvid(eo)?|fastwan|"
    r"\brcm\b|\bdmd\b|turbo|[1-8][-_ ]?steps?\b|\blcm\b|rapid",
    re.IGNORECASE,
)
_PIECEWISE = re.compile(r"skyreels[-_ ]?v2[-_ ]?df|diffusion[-_ ]?forcing", re.IGNORECASE)
EXPERT_NOTE = (
    "has {word!r} in its name or metadata, so it may be one of the two transformers of Wan2.2 A14B (for high and low "
    "noise), which alone generates poorer videos"
)
PIECEWISE_NOTE = (
    "has {word!r} in its name or metadata, so its weights may be made for sampling chunk by chunk, but slagen samples "
    "the whole clip at once"
)


def hints(path: Path, metadata: Mapping[str, Any]) -> tuple[list[str], str]:
    """What names and metadata say about weights that look the same by their tensors.

    Args:
        path: of the file or folder; the two folders that it lies in have a say too.
        metadata: of its safetensors header.
    Returns: notes, and the word that says they are distilled to few steps, or "".
    """
    said = list(path.absolute().parts[-3:])  # as it was named: the hub's cache has links to files named by hash
    said += [str(value)[:2000] for key, value in metadata.items() if not key.startswith(("_", "slagen"))]
    text = " ".join(said)
    notes = []
    for pattern, note in ((_EXPERT, EXPERT_NOTE), (_PIECEWISE, PIECEWISE_NOTE)):
        found = pattern.search(text)
        if found:
            notes.append(f"{line(path.name)} {note.format(word=found[0])}")
    few = _DISTILLED.search(text.replace("_", " "))
    return notes, few[0] if few else ""
