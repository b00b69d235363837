"""Every public form of Wan2.1's weights, told apart by its keys: read, named as diffusers does, and accounted for.

    diffusers   blocks.0.attn1.to_q         save_pretrained, single or sharded
    wan         blocks.0.self_attn.q        the original repository, Comfy's repacks, TurboDiffusion (SLA inside, int8)
    fastvideo   blocks.0.to_q               FastVideo's own names in a diffusers folder

Nothing is loaded in part: a tensor that is missing, unexpected, of another shape or of another kind of number stops it.
Names: github.com/Wan-Video/Wan2.1, github.com/thu-ml/TurboDiffusion, github.com/hao-ai-lab/FastVideo.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from slagen.config import Sampler, SLAConfig
from slagen.errors import EnvironmentProblem, UsageError, WeightsError
from slagen.models import SLA_FILE, TURBO_SLA, read_header

PICKLE_SUFFIXES = {".pth", ".pt", ".bin", ".ckpt", ".pkl", ".pickle"}
PREFIXES = ("model.diffusion_model.", "net_ema.", "net.", "module.", "_orig_mod.")  # stripped if every key has them
WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.")  # stripped inside names if every block has them
CONTAINERS = ("state_dict", "model", "ema", "model_state_dict", "module")  # a dict in the file that holds the tensors
QUANT_BLOCK = 128  # rows and columns that share a scale in TurboDiffusion's int8
TEXT_ENCODER_HOME = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
FLOATS = (torch.bfloat16, torch.float16, torch.float32)

_END = r"\.(weight|bias)"
_WAN = [
    (rf"patch_embedding{_END}", r"patch_embedding.\1"),
    (rf"time_embedding\.0{_END}", r"condition_embedder.time_embedder.linear_1.\1"),
    (rf"time_embedding\.2{_END}", r"condition_embedder.time_embedder.linear_2.\1"),
    (rf"text_embedding\.0{_END}", r"condition_embedder.text_embedder.linear_1.\1"),
    (rf"text_embedding\.2{_END}", r"condition_embedder.text_embedder.linear_2.\1"),
    (rf"time_projection\.1{_END}", r"condition_embedder.time_proj.\1"),
    (rf"head\.head{_END}", r"proj_out.\1"),
    (r"head\.modulation", r"scale_shift_table"),
    (r"blocks\.(\d+)\.modulation", r"blocks.\1.scale_shift_table"),
    (rf"blocks\.(\d+)\.self_attn\.([qkv]){_END}", r"blocks.\1.attn1.to_\2.\3"),
    (rf"blocks\.(\d+)\.self_attn\.o{_END}", r"blocks.\1.attn1.to_out.0.\2"),
    (r"blocks\.(\d+)\.self_attn\.norm_([qk])\.weight", r"blocks.\1.attn1.norm_\2.weight"),
    (rf"blocks\.(\d+)\.cross_attn\.([qkv]){_END}", r"blocks.\1.attn2.to_\2.\3"),
    (rf"blocks\.(\d+)\.cross_attn\.o{_END}", r"blocks.\1.attn2.to_out.0.\2"),
    (r"blocks\.(\d+)\.cross_attn\.norm_([qk])\.weight", r"blocks.\1.attn2.norm_\2.weight"),
    (rf"blocks\.(\d+)\.norm3{_END}", r"blocks.\1.norm2.\2"),
    (rf"blocks\.(\d+)\.ffn\.0{_END}", r"blocks.\1.ffn.net.0.proj.\2"),
    (rf"blocks\.(\d+)\.ffn\.2{_END}", r"blocks.\1.ffn.net.2.\2"),
]
_FASTVIDEO = [
    (rf"patch_embedding\.proj{_END}", r"patch_embedding.\1"),
    (rf"condition_embedder\.text_embedder\.fc_in{_END}", r"condition_embedder.text_embedder.linear_1.\1"),
    (rf"condition_embedder\.text_embedder\.fc_out{_END}", r"condition_embedder.text_embedder.linear_2.\1"),
    (rf"condition_embedder\.time_embedder\.mlp\.fc_in{_END}", r"condition_embedder.time_embedder.linear_1.\1"),
    (rf"condition_embedder\.time_embedder\.mlp\.fc_out{_END}", r"condition_embedder.time_embedder.linear_2.\1"),
    (rf"condition_embedder\.time_modulation\.linear{_END}", r"condition_embedder.time_proj.\1"),
    (rf"proj_out{_END}", r"proj_out.\1"),
    (r"(blocks\.\d+\.)?scale_shift_table", r"\1scale_shift_table"),
    (rf"blocks\.(\d+)\.to_([qkv]){_END}", r"blocks.\1.attn1.to_\2.\3"),
    (rf"blocks\.(\d+)\.to_out{_END}", r"blocks.\1.attn1.to_out.0.\2"),
    (r"blocks\.(\d+)\.norm_([qk])\.weight", r"blocks.\1.attn1.norm_\2.weight"),
    (rf"blocks\.(\d+)\.attn2\.to_([qkv]){_END}", r"blocks.\1.attn2.to_\2.\3"),
    (rf"blocks\.(\d+)\.attn2\.to_out{_END}", r"blocks.\1.attn2.to_out.0.\2"),
    (r"blocks\.(\d+)\.attn2\.norm_([qk])\.weight", r"blocks.\1.attn2.norm_\2.weight"),
    (rf"blocks\.(\d+)\.self_attn_residual_norm\.norm{_END}", r"blocks.\1.norm2.\2"),
    (rf"blocks\.(\d+)\.ffn\.fc_in{_END}", r"blocks.\1.ffn.net.0.proj.\2"),
    (rf"blocks\.(\d+)\.ffn\.fc_out{_END}", r"blocks.\1.ffn.net.2.\2"),
]
_DIFFUSERS = [
    (rf"(patch_embedding|proj_out|condition_embedder\.time_proj){_END}", r"\1.\2"),
    (rf"(condition_embedder\.(?:time|text)_embedder\.linear_[12]){_END}", r"\1.\2"),
    (r"((?:blocks\.\d+\.)?scale_shift_table)", r"\1"),
    (rf"(blocks\.\d+\.attn[12]\.(?:to_[qkv]|to_out\.0)){_END}", r"\1.\2"),
    (r"(blocks\.\d+\.attn[12]\.norm_[qk]\.weight)", r"\1"),
    (rf"(blocks\.\d+\.(?:norm2|ffn\.net\.0\.proj|ffn\.net\.2)){_END}", r"\1.\2"),
]
_PROJECTION = re.compile(
    r"blocks\.(\d+)\.(self_attn\.attn_op\.local_attn|attn1\.attn_op\.local_attn|attn1\.attn_impl|attn1\.processor)"
    rf"\.proj_l{_END}"
)


def _renamer(table: list[tuple[str, str]]) -> Callable[[str], str | None]:
    rules = [(re.compile(pattern), target) for pattern, target in table]

    def rename(name: str) -> str | None:
        for pattern, target in rules:
            match = pattern.fullmatch(name)
            if match:
                return match.expand(target)
        return None

    return rename


LAYOUTS = {"diffusers": _renamer(_DIFFUSERS), "wan": _renamer(_WAN), "fastvideo": _renamer(_FASTVIDEO)}
_LINEARS_OF_A_BLOCK = re.compile(r"blocks\.\d+\.(attn[12]\.to_([qkv]|out\.0)|ffn\.net\.(0\.proj|2))\.weight")


@dataclass
class Checkpoint:
    """The transformer in a file, under diffusers' names.

    Args:
        path: the file or folder it was read from.
        layout: a name in LAYOUTS.
        tensors: of the transformer; what was int8 is dequantised.
        projections: `proj_l` of the layers, by the processors' names; empty where there is no SLA in the file.
        quantised: whether the file holds TurboDiffusion's int8.
        faults: what is wrong in the file itself, to be told together with what does not fit a model.
    """

    path: Path
    layout: str
    tensors: dict[str, Tensor]
    projections: dict[str, Tensor]
    quantised: bool = False
    faults: list[str] = field(default_factory=list)

    @property
    def num_layers(self) -> int:
        return 1 + max((int(m[1]) for name in self.tensors if (m := re.match(r"blocks\.(\d+)\.", name))), default=-1)

    @property
    def width(self) -> int:
        """Heads x head dimension, 0 where even that cannot be read."""
        tensor = self.tensors.get("patch_embedding.bias", self.tensors.get("patch_embedding.weight"))
        return 0 if tensor is None else tensor.shape[0]


@dataclass(frozen=True)
class SideFile:
    """SimpleTuner's `sla_attention.pt`: one `proj_l` that all layers share, and the settings it was trained with."""

    path: Path
    weight: Tensor
    bias: Tensor
    config: SLAConfig


def read_tensors(path: Path) -> dict[str, Any]:
    """All that a weight file holds, by its own names; tensors are mapped from disk where the format allows it.

    Args:
        path: .safetensors, a pickle (.pth, .pt, .bin, .ckpt; tensors and plain containers only), or a folder with one
            transformer in safetensors, sharded or not.
    Raises: WeightsError if it is missing, broken, or a pickle that holds anything but tensors.
    """
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise WeightsError(f"{path} does not exist. Give a weight file or folder.")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix == ".gguf":
        return _read_gguf(path)
    if path.suffix in PICKLE_SUFFIXES:
        return _read_pickle(path)
    raise WeightsError(
        f"{path} is no weight file that slagen reads. Give a .safetensors, .pth or .gguf file, or a diffusers folder."
    )


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt") as handle:
            return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} is broken or truncated ({error}). Copy or download it again.") from error


def _read_folder(folder: Path) -> dict[str, Any]:
    inner = folder / "transformer"
    folder = inner if inner.is_dir() else folder
    tensors: dict[str, Any] = {}
    for file in transformer_files(folder):
        for name, tensor in _read_safetensors(file).items():
            if name in tensors:
                raise WeightsError(f"{folder} holds {name} in two of its shards. Get the model again.")
            tensors[name] = tensor
    return tensors


def transformer_files(folder: Path) -> list[Path]:
    """The safetensors of one component, from its index where there is one. Raises WeightsError."""
    import json

    indices = sorted(folder.glob("*.safetensors.index.json"))
    if not indices:
        files = [file for file in sorted(folder.glob("*.safetensors")) if file.name != SLA_FILE]
        if len(files) != 1:
            what = "no safetensors" if not files else f"{len(files)} safetensors and no index"
            raise WeightsError(f"{folder} holds {what}. Give the folder or file of one transformer.")
        return files
    try:
        shards = set(json.loads(indices[0].read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise WeightsError(f"{indices[0]} cannot be read ({error}). Get the model again.") from error
    if not shards or any(not isinstance(shard, str) or Path(shard).name != shard for shard in shards):
        raise WeightsError(f"{indices[0]} names no shards, or shards outside its folder. Get the model again.")
    missing = sorted(shard for shard in shards if not (folder / shard).is_file())
    if missing:
        raise WeightsError(f"{folder} lacks the shard {missing[0]}. Get the model again.")
    return [folder / shard for shard in sorted(shards)]


def _read_pickle(path: Path) -> dict[str, Any]:
    """Tensors only: PyTorch's restricted unpickler refuses whatever could run code, and nothing else is tried."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path} is a pickle that holds more than tensors, which could run code when loaded. slagen does not load "
            "it: get the file from its authors as safetensors."
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, AttributeError, TypeError, IndexError) as error:
        raise WeightsError(f"{path} is broken or truncated. Copy or download it again.") from error
    while isinstance(content, dict):
        inner = [content[name] for name in CONTAINERS if isinstance(content.get(name), dict)]
        if len(inner) != 1 or any(isinstance(value, Tensor) for value in content.values()):
            break
        content = inner[0]
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise WeightsError(f"{path} holds no named tensors. Give a file of model weights.")
    return content


def _read_gguf(path: Path) -> dict[str, Any]:
    """Names and shapes alone, on the meta device: diffusers loads the values, and keeps them quantised."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise EnvironmentProblem(f"{path} is a GGUF file. Install its reader: pip install 'slagen[gguf]'.") from error
    try:
        entries = GGUFReader(path).tensors
        return {e.name: torch.empty([int(size) for size in reversed(e.shape)], device="meta") for e in entries}
    except (ValueError, OSError, IndexError, KeyError, NotImplementedError) as error:
        raise WeightsError(f"{path} is broken, truncated, or of a kind that is not read ({error}).") from error


def identify(tensors: Iterable[str]) -> str:
    """What a file is, by its keys: "transformer", "sla", "side-file", "vae", "text-encoder", "vsa", "lora" or
    "image-to-video"; "unknown" for all else.
    """
    names = _without_prefixes(list(tensors))
    found = set(names)
    if any("to_gate_compress" in name for name in names):
        return "vsa"
    if found == {"settings", "state", "version"}:
        return "side-file"
    if any(re.search(r"\.lora_(A|B|down|up)\b|\.lora\.(down|up)\.", name) for name in names):
        return "lora"
    if any(name.startswith(("img_emb.", "condition_embedder.image_embedder.")) for name in names):
        return "image-to-video"
    if "token_embedding.weight" in found or any(
        name.endswith(("SelfAttention.q.weight", "pos_embedding.embedding.weight")) for name in names
    ):
        return "text-encoder"
    if any(name.startswith(("decoder.", "encoder.")) for name in names):
        return "vae"
    if names and all(".processor.proj_l." in name for name in names):
        return "sla"
    known = sum(any(rename(name) for rename in LAYOUTS.values()) for name in names)
    return "transformer" if known > len(names) / 2 else "unknown"


REFUSALS = {
    "vsa": "holds FastVideo's VSA (to_gate_compress), another sparse attention, whose gates SLA has no place for. "
    "Give SLA weights, or the model it was trained from.",
    "lora": "is a LoRA, not a whole transformer. Merge it into its model first.",
    "image-to-video": "is an image-to-video transformer. slagen runs Wan2.1 text-to-video.",
    "text-encoder": f"is the original T5 text encoder, whose names diffusers does not read. The text encoder of "
    f"{TEXT_ENCODER_HOME} is the same: give that with --model.",
    "vae": "is a video autoencoder, not a transformer. Make a diffusers folder of it: slagen convert FILE FOLDER.",
    "unknown": "holds no Wan2.1 transformer. Give Wan2.1 text-to-video or SLA weights.",
}


def read_checkpoint(
    path: Path, dtype: torch.dtype = torch.bfloat16, *, projections_only: bool = False
) -> Checkpoint | SideFile:
    """Read a transformer, or SimpleTuner's side file, whatever its form.

    Args:
        dtype: of what is int8 in the file.
        projections_only: leave all tensors out but `proj_l`.
    Raises: WeightsError if the file is broken, or holds something else. `check_fit` tells what does not fit a model.
    """
    content = read_tensors(path)
    kind = identify(content)
    if kind == "side-file":
        return _side_file(path, content)
    if kind not in ("transformer", "sla"):
        raise WeightsError(f"{path} {REFUSALS[kind]}")
    if projections_only:
        names = zip(_without_prefixes(list(content)), content.values(), strict=True)
        content = {name: value for name, value in names if "proj_l" in name}
    return _checkpoint(path, content, dtype)


@dataclass(frozen=True)
class Found:
    """What a weight file is, without its tensors being read.

    Args:
        kind: as `identify` says it.
        sla: what its SLA weights were trained with; None without any, or where metadata says it.
        sampler: the sampler that it is distilled for; None for any flow-matching one.
    """

    kind: str
    sla: SLAConfig | None = None
    sampler: Sampler | None = None


def peek(path: Path) -> Found:
    """Look at a weight file's names. Raises WeightsError if it is nothing that can be run."""
    if path.suffix == ".safetensors" and path.is_file():
        content: dict[str, Any] = read_header(path)
        if "slagen" in (content.pop("__metadata__", None) or {}):
            return Found("sla")  # with every tensor that was trained, which may be all of a transformer's
    else:
        content = read_tensors(path)
    kind = identify(content)
    if kind == "side-file":
        return Found(kind, sla=_side_file(path, content).config)
    if kind not in ("transformer", "sla"):
        raise WeightsError(f"{path} {REFUSALS[kind]}")
    if kind == "transformer" and any(_PROJECTION.fullmatch(name) for name in _without_prefixes(list(content))):
        return Found(kind, sla=TURBO_SLA, sampler="rcm")
    return Found(kind)


def _checkpoint(path: Path, content: dict[str, Any], dtype: torch.dtype) -> Checkpoint:
    names = dict(zip(_without_prefixes(list(content)), content.values(), strict=True))
    layout = max(LAYOUTS, key=lambda name: sum(LAYOUTS[name](key) is not None for key in _plain(names)))
    rename = LAYOUTS[layout]
    checkpoint = Checkpoint(path, layout, {}, {})
    faults = checkpoint.faults
    spellings = set()
    for name, value in names.items():
        if not isinstance(value, Tensor):
            faults.append(f"{name} is a {type(value).__name__}, not a tensor")
            continue
        projection = _PROJECTION.fullmatch(name)
        if projection:
            spellings.add(projection[2])
            checkpoint.projections[f"blocks.{projection[1]}.attn1.processor.proj_l.{projection[3]}"] = value
        elif name.endswith(".int8_weight"):
            checkpoint.quantised = True
            target = rename(name.removesuffix("int8_weight") + "weight") or ""
            scale = names.get(name.removesuffix("int8_weight") + "scale")
            if not _LINEARS_OF_A_BLOCK.fullmatch(target):
                faults.append(f"{name} is unexpected")
            elif not isinstance(scale, Tensor):
                faults.append(f"{name.removesuffix('int8_weight')}scale is missing")
            else:
                _add(checkpoint, target, _dequantise(name, value, scale, dtype, faults))
        elif name.endswith(".scale"):
            if name.removesuffix("scale") + "int8_weight" not in names:
                faults.append(f"{name} is unexpected")
        else:
            target = rename(name) or ""
            if not target:
                faults.append(f"{name} is unexpected")
            else:
                _add(checkpoint, target, value)
    if len(spellings) > 1:
        faults.append(f"proj_l is spelt in {len(spellings)} ways ({', '.join(sorted(spellings))})")
    if checkpoint.quantised:
        faults += [
            f"{name} is not int8, though others are"
            for name in checkpoint.tensors
            if _LINEARS_OF_A_BLOCK.fullmatch(name) and name in _float_linears(names, rename)
        ]
    return checkpoint


def _float_linears(names: dict[str, Any], rename: Callable[[str], str | None]) -> set[str]:
    return {rename(name) or "" for name in names if name.endswith(".weight")}


def _add(checkpoint: Checkpoint, name: str, tensor: Tensor) -> None:
    if name in checkpoint.tensors:
        checkpoint.faults.append(f"{name} is there twice")
    checkpoint.tensors[name] = tensor


def _plain(names: Iterable[str]) -> list[str]:
    """Names of floating-point weights, so that an int8 file is told by the same table."""
    return [name.replace(".int8_weight", ".weight") for name in names]


def _without_prefixes(names: list[str]) -> list[str]:
    """Names without what training code and repackers put around them, where all names have it alike."""
    stripped = True
    while stripped and names:
        stripped = False
        for prefix in PREFIXES:
            if all(name.startswith(prefix) for name in names):
                names, stripped = [name.removeprefix(prefix) for name in names], True
    for wrapper in WRAPPERS:
        pattern = re.compile(rf"(blocks\.\d+\.){re.escape(wrapper)}")
        inner = [name for name in names if name.startswith("blocks.")]
        if inner and all(pattern.match(name) for name in inner):
            names = [pattern.sub(r"\1", name) for name in names]
    return names


def _dequantise(name: str, codes: Tensor, scale: Tensor, dtype: torch.dtype, faults: list[str]) -> Tensor:
    """TurboDiffusion's int8: w[i, j] = codes[i, j] * scale[i // 128, j // 128]."""
    blocks = tuple(-(-size // QUANT_BLOCK) for size in codes.shape)
    if codes.dtype != torch.int8 or scale.dtype != torch.float32 or codes.ndim != 2 or tuple(scale.shape) != blocks:
        faults.append(
            f"{name} is {codes.dtype} {tuple(codes.shape)} with scales {scale.dtype} {tuple(scale.shape)}, but must be "
            f"int8 with a float32 scale for each {QUANT_BLOCK} x {QUANT_BLOCK}"
        )
        return codes.to(dtype)
    if not torch.isfinite(scale).all():
        faults.append(f"{name} has scales that are not finite numbers")
    wide = scale.repeat_interleave(QUANT_BLOCK, 0)[: codes.shape[0]].repeat_interleave(QUANT_BLOCK, 1)
    return (codes.float() * wide[:, : codes.shape[1]]).to(dtype)


def check_fit(checkpoint: Checkpoint, shapes: dict[str, torch.Size], num_layers: int, head_dim: int) -> None:
    """Hold a checkpoint against a model: every tensor there once, of the model's shape, of the usual kind of number.

    TurboDiffusion's patch embedding, a matrix in its files, is given its five dimensions here.

    Args:
        shapes: of the model's tensors, by name.
    Raises: WeightsError with the list of all that is wrong.
    """
    tensors, faults = checkpoint.tensors, list(checkpoint.faults)
    name = "patch_embedding.weight"
    flat = tensors.get(name)
    if checkpoint.layout == "wan" and flat is not None and flat.ndim == 2 and name in shapes:
        shape = shapes[name]
        if tuple(flat.shape) == (shape[0], shape[1:].numel()):
            tensors[name] = flat.reshape(shape)
    expected = dict(shapes)
    if checkpoint.projections:
        for layer in range(num_layers):
            prefix = f"blocks.{layer}.attn1.processor.proj_l."
            expected |= {prefix + "weight": torch.Size((head_dim, head_dim)), prefix + "bias": torch.Size((head_dim,))}
    held = {**tensors, **checkpoint.projections}
    faults += [f"{name} is missing" for name in expected if name not in held]
    faults += [f"{name} is unexpected" for name in held if name not in expected]
    faults += [
        f"{name} has the shape {tuple(tensor.shape)}, but must have {tuple(expected[name])}"
        for name, tensor in held.items()
        if name in expected and tensor.shape != expected[name]
    ]
    faults += _number_faults(held)
    if faults:
        more = f"; and {len(faults) - 8} more" if len(faults) > 8 else ""
        raise WeightsError(
            f"{checkpoint.path} does not fit, and would make noise ({len(faults)} faulty): {'; '.join(faults[:8])}"
            f"{more}. Get the file again, or the model it belongs to."
        )
    zero = [name for name, x in checkpoint.projections.items() if name.endswith("weight") and not x.any()]
    if zero and len(zero) < num_layers:
        raise WeightsError(
            f"{checkpoint.path} has an all-zero {zero[0]} beside trained ones, so a part of it was lost. Get it again."
        )


def _number_faults(tensors: dict[str, Tensor]) -> list[str]:
    """Tensors that are no finite floating-point numbers, or not of the kind that the same tensor of other blocks is."""
    faults: list[str] = []
    kinds: dict[str, dict[torch.dtype, list[str]]] = {}
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            faults.append(f"{name} is {tensor.dtype}, but must be bfloat16, float16 or float32")
            continue
        if not tensor.is_meta and not torch.isfinite(tensor).all():
            faults.append(f"{name} has values that are not finite numbers")
        role = re.sub(r"^blocks\.\d+\.", "blocks.*.", name)
        kinds.setdefault(role, {}).setdefault(tensor.dtype, []).append(name)
    for found in kinds.values():
        rarest = min(found, key=lambda dtype: len(found[dtype]))
        if len(found) > 1:
            faults.append(f"{found[rarest][0]} is {rarest}, unlike in other blocks")
    sizes: Counter[torch.dtype] = Counter()
    for name, tensor in tensors.items():
        sizes[tensor.dtype] += 0 if "proj_l" in name else tensor.numel()
    main = sizes.most_common(1)[0][0] if sizes else torch.float32
    for role, found in kinds.items():  # a file in half precision may keep some in float32, but nothing else is mixed
        for dtype in set(found) - {main, torch.float32}:
            if "proj_l" not in role or main in FLOATS[:2]:
                faults.append(f"{found[dtype][0]} is {dtype}, but the rest is {main}")
    return faults


_VAE_PARTS = {
    "residual.0": "norm1", "residual.2": "conv1", "residual.3": "norm2", "residual.6": "conv2",
    "shortcut": "conv_shortcut", "conv1": "conv_in", "head.0": "norm_out", "head.2": "conv_out",
    "middle.0": "mid_block.resnets.0", "middle.1": "mid_block.attentions.0", "middle.2": "mid_block.resnets.1",
}  # fmt: skip


def rename_vae(tensors: dict[str, Tensor], num_res_blocks: int) -> dict[str, Tensor]:
    """The original Wan2.1 VAE under diffusers' names: its decoder is one list of blocks there, cut by levels here."""
    return {_vae_name(name, num_res_blocks): tensor for name, tensor in tensors.items()}


def _vae_name(name: str, num_res_blocks: int) -> str:
    if name.startswith(("conv1.", "conv2.")):
        return name.replace("conv1.", "quant_conv.").replace("conv2.", "post_quant_conv.")
    side, _, rest = name.partition(".")
    block = re.match(r"(down|up)samples\.(\d+)\.(.*)", rest)
    prefix = side
    if block and block[1] == "down":
        prefix, rest = f"{side}.down_blocks.{block[2]}", block[3]
    elif block:
        level, place = divmod(int(block[2]), num_res_blocks + 2)  # its residual blocks, one more, and an upsampler
        part = "upsamplers.0" if place == num_res_blocks + 1 else f"resnets.{place}"
        prefix, rest = f"{side}.up_blocks.{level}.{part}", block[3]
    elif rest.startswith("middle."):
        middle, rest = ".".join(rest.split(".")[:2]), ".".join(rest.split(".")[2:])
        prefix = f"{side}.{_VAE_PARTS.get(middle, middle)}"
    stem, _, kind = rest.rpartition(".")
    return f"{prefix}.{_VAE_PARTS.get(stem, stem)}.{kind}"


def _side_file(path: Path, content: dict[str, Any]) -> SideFile:
    """SimpleTuner's: {"version": 1, "settings": {topk, feature_map, blkq, blkk, ...}, "state": {"128:bf16": {...}}}."""
    try:
        settings, states = content["settings"], list(content["state"].values())
        if content["version"] != 1 or not settings.get("tie_feature_map_qk", True):
            raise WeightsError(f"{path} is of a version, or has untied feature maps, that slagen does not run.")
        if len(states) != 1 or set(states[0]) != {"proj_l.weight", "proj_l.bias"}:
            raise WeightsError(f"{path} must hold one proj_l, but holds {[sorted(state) for state in states]}.")
        config = SLAConfig(
            sparsity=round(1 - settings["topk"], 12), feature_map=settings["feature_map"], block_m=settings["blkq"],
            block_n=settings["blkk"],
        )  # fmt: skip
        weight, bias = states[0]["proj_l.weight"], states[0]["proj_l.bias"]
        if weight.ndim != 2 or weight.shape[0] != weight.shape[1] or bias.shape != weight.shape[:1]:
            raise WeightsError(f"{path} has a proj_l of shape {tuple(weight.shape)}, but it must be square.")
        faults = _number_faults({"proj_l.weight": weight, "proj_l.bias": bias})
    except (KeyError, AttributeError, TypeError, UsageError) as error:
        raise WeightsError(f"{path} is no sla_attention.pt as SimpleTuner writes it: {error}. Get it again.") from error
    if faults:
        raise WeightsError(f"{path} does not fit: {'; '.join(faults)}. Get it again.")
    return SideFile(path, weight.float(), bias.float(), config)
