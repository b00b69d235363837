"""LoRA files of every public form: which layers of a Wan transformer they change, and their tensors by layer.

    diffusers, peft   transformer.blocks.0.attn1.to_q.lora_A.weight
    Wan, ComfyUI      diffusion_model.blocks.0.self_attn.q.lora_down.weight, with .alpha, .diff and .diff_b
    musubi, kohya     lora_unet_blocks_0_self_attn_q.lora_down.weight

Prefixes are told by `layouts.leading`, and names of layers by its forms, so these are not listed again here.
Source: huggingface/diffusers (loaders/lora_conversion_utils.py), kohya-ss/musubi-tuner, comfyanonymous/ComfyUI.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slagen.attention.cost import ModelShape
from slagen.errors import WeightsError
from slagen.formats.bounds import is_finite
from slagen.formats.headers import read_header, read_strings
from slagen.formats.kinds import REFUSALS, TRANSFORMERS, hints, identify, shape_of
from slagen.formats.layouts import LAYOUTS
from slagen.formats.names import transformers
from slagen.formats.published import preset_of_width
from slagen.formats.tensor_files import read_tensors
from slagen.io.documents import read_json
from slagen.io.forms import Fault, check
from slagen.io.reading import file_hash
from slagen.io.text import counted, cut

_ROLES = {"A": "down", "B": "up", "down": "down", "up": "up"}
_PAIR = re.compile(r"\.lora(?:_linear_layer\.|[._])(A|B|down|up)(?:\.\w+)??(?:\.(weight|bias))?\Z")
_SINGLE = re.compile(r"\.(alpha|diff|diff_b)\Z")
_OF_DORA = re.compile(r"\.(?:dora_scale|lora_magnitude_vector)\b")
# kohya writes underscores for the dots of a layer's name; these are between two parts of a name.
_FLAT = re.compile(r"(?:lora_(?:unet|transformer)|lycoris)_")
_DOTS = tuple(
    (re.compile(pattern), target)
    for pattern, target in (
        (r"^blocks_(\d+)_", r"blocks.\1."),
        (r"(self_attn|cross_attn)_(?=[a-z])", r"\1."),
        (r"(attn[12])_(?=to_)", r"\1."),
        (r"^(condition_embedder)_(?=\w)", r"\1."),
        (r"(text_embedder|time_embedder)_(?=linear_)", r"\1."),
        (r"(ffn)_(?=net_)", r"\1."),
        (r"(net)_(?=\d)", r"\1."),
        (r"(?<=\d)_(?=proj\b)", "."),
        (r"(to_out|ffn|(?:text|time)_embedding|time_projection)_(?=\d)", r"\1."),
        (r"^head_head", "head.head"),
    )
)  # fmt: skip
_OF_FIRST_DIFFUSERS = re.compile(r"\.processor\.(to_[a-z]+)_lora\.")


@dataclass(frozen=True)
class LoraFile:
    """What a LoRA file changes, from its names and shapes.

    Args:
        path: of the file. sha256: of its content.
        layers: the names in the file of what changes a layer, by the layer's name in diffusers and their role: "down"
            (rank, in), "up" (out, rank), "alpha", "bias", "diff" (a change of the whole weight) and "diff_b".
        shapes: of its tensors, by name in the file.
        unmatched: names that are no change of a layer.
        config: of peft, whose alpha is not among the tensors: from the file's metadata, or beside the file.
        few_steps: the word in its name or metadata that says it distills a model to few steps; "" where none does.
    """

    path: Path
    sha256: str
    layers: Mapping[str, Mapping[str, str]]
    shapes: Mapping[str, tuple[int, ...]] = field(repr=False)
    unmatched: tuple[str, ...]
    config: Mapping[str, Any] = field(default_factory=dict, repr=False)
    few_steps: str = ""

    @property
    def matched(self) -> int:
        """How many of its tensors change a layer."""
        return sum(map(len, self.layers.values()))

    @property
    def width(self) -> int | None:
        """The width of the transformer that it was made for; None where no layer of attention or feed-forward says."""
        for layer, roles in self.layers.items():
            if re.search(r"attn[12]\.to_(q|k|v|out\.0)$|ffn\.net\.0\.proj$", layer):
                name = roles.get("down") or roles.get("diff")
                if name is not None and len(self.shapes[name]) == 2:
                    return self.shapes[name][1]
        return None

    def scaling(self, layer: str, rank: int) -> float:
        """What the product of a layer's two matrices is multiplied by where no alpha is among the tensors."""
        patterns = self.config.get("alpha_pattern") or {}
        own = next((x for name, x in patterns.items() if f".{layer}".endswith(f".{name.removeprefix('^')}")), None)
        alpha = self.config.get("lora_alpha") if own is None else own
        root = math.sqrt(rank) if self.config.get("use_rslora") else rank
        return alpha / root if alpha is not None and rank else 1.0

    def __hash__(self) -> int:
        return hash(self.sha256)


@dataclass(frozen=True)
class LayerChange:
    """What a file adds to a layer's parameters at a scale of 1, as far as it does.

    Args:
        down: (rank, in), up: (out, rank), float32: their product is added to the weight. It includes alpha. Those of a
            convolution have its further dimensions.
        weight, bias: float32, in the parameters' shapes.
    """

    down: Tensor | None
    up: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def read_lora(path: Path) -> LoraFile:
    """What a LoRA file changes, from its header where it is a safetensors file.

    Raises: WeightsError where it is corrupt, or no LoRA for a Wan transformer.
    """
    about = path.stat() if path.is_file() else None
    return _read(path, *((0, 0) if about is None else (about.st_size, about.st_mtime_ns)))


@functools.lru_cache(maxsize=32)
def _read(path: Path, size: int, changed_ns: int) -> LoraFile:
    content: dict[str, Any] = read_header(path) if path.suffix == ".safetensors" else read_tensors(path)
    metadata = content.pop("__metadata__", None) or {}
    kind = "sla" if "slagen" in metadata else identify(content)
    if kind in (*TRANSFORMERS, "sla", "side-file"):
        raise WeightsError(f"{path} holds {_KINDS[kind]}, not a LoRA. Give it with --weights.")
    if kind in ("lokr", "loha", "lycoris", "unmerged-lora"):
        raise WeightsError(f"{path} {REFUSALS[kind].replace('not a transformer', 'which slagen does not apply')}")
    config = _peft_config(path, metadata)
    if any(map(_OF_DORA.search, content)) or config.get("use_dora"):
        raise WeightsError(f"{path} is a DoRA, which slagen does not apply. Merge it into its model, and give that.")
    layers, unmatched = _layers(content)
    if not layers:
        first = next(iter(content), "")
        raise WeightsError(
            f"{path} is no LoRA for a Wan2.1 transformer: none of its {counted(len(content), 'tensor')} changes a layer"
            f"{f', such as {cut(first, 80)}' if first else ''}. Give a LoRA for Wan2.1."
        )
    if sum(map(len, layers.values())) + len(unmatched) != len(content):
        raise WeightsError(
            f"{path} changes a layer twice, as a LoRA for the two transformers of Wan2.2 does. Give one for Wan2.1."
        )
    shapes = {name: shape_of(x) for name, x in content.items()}
    _, few_steps = hints(path, metadata)
    return LoraFile(path, file_hash(path), layers, shapes, unmatched, config, few_steps)


_CONFIG = {
    "r?": int | None, "lora_alpha?": float | None, "alpha_pattern?": {str: float}, "use_rslora?": bool,
    "use_dora?": bool,
}  # fmt: skip


def _peft_config(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """What peft was set to: diffusers writes it into a file's metadata, peft into adapter_config.json beside it."""
    text, beside = metadata.get("lora_adapter_metadata"), path.with_name("adapter_config.json")
    if text is not None:
        found = read_strings(path, text, {str: object})
        config = {name.removeprefix("transformer."): value for name, value in found.items()}
    elif beside.is_file():
        config = read_json(beside, {str: object})
    else:
        return {}
    try:
        check(config, _CONFIG)
    except Fault as fault:
        raise WeightsError(
            f"{path} has settings of peft that slagen cannot read ({fault}). Download it again."
        ) from None
    return config


_KINDS = {**dict.fromkeys(TRANSFORMERS, "a transformer"), "sla": "attention weights", "side-file": "SLA weights"}


def _layers(names: Iterable[str]) -> tuple[dict[str, dict[str, str]], tuple[str, ...]]:
    """Names in a file by the layer that they change and their role; and those that change none."""
    plain = {name: _spelt_out(name) for name in names}
    prefixes = sorted(transformers(plain.values()).values(), key=len, reverse=True)
    parts = {name: _split(_without(text, prefixes)) for name, text in plain.items()}
    # Of the forms, one has the most of its names: some names mean another layer in another form.
    renamed = [
        {name: layer for name, part in parts.items() if part and (layer := _layer(form, *part))}
        for form in LAYOUTS.values()
    ]
    best = max(renamed, key=len)
    layers: dict[str, dict[str, str]] = {}
    for name, layer in best.items():
        part = parts[name]
        assert part is not None
        layers.setdefault(layer, {}).setdefault(part[1], name)
    return layers, tuple(name for name in plain if name not in best)


def _spelt_out(name: str) -> str:
    """A tensor's name with dots between the parts of the layer's name."""
    if match := _FLAT.match(name):
        layer, _, rest = name[match.end() :].partition(".")
        for pattern, target in _DOTS:
            layer = pattern.sub(target, layer)
        return f"{layer}.{rest}"
    return _OF_FIRST_DIFFUSERS.sub(lambda found: f".{found[1].replace('to_out', 'to_out.0')}.lora.", name)


def _without(name: str, prefixes: Iterable[str]) -> str:
    return next((name.removeprefix(prefix) for prefix in prefixes if name.startswith(prefix)), name)


def _split(name: str) -> tuple[str, str] | None:
    """A layer's name and the role of a tensor, from its name; None for what is no part of a LoRA."""
    if match := _PAIR.search(name):
        role = "bias" if match[2] == "bias" else _ROLES[match[1]]
        return name[: match.start()], role
    if match := _SINGLE.search(name):
        return name[: match.start()], match[1]
    return None


def _layer(form: Any, layer: str, role: str) -> str | None:
    """A layer's name in diffusers by its name in a form. A table such as `modulation` has no weight: it is itself."""
    weight = form.rename(f"{layer}.weight")
    if weight is not None:
        return str(weight.removesuffix(".weight"))
    return form.rename(layer) if role == "diff" else None


_OF_IMAGES = re.compile(r"\.(add_[kv]_proj|norm_added_k|image_embedder)\b")


def check_lora(lora: LoraFile, shape: ModelShape, model: str, *, takes_image: bool = False) -> LoraFile:
    """A LoRA of which a model has every layer; what is for further layers counts as unmatched.

    Args:
        shape: of the model's transformer. model: its name, for messages. takes_image: whether it has an image branch.
    Raises: WeightsError where a layer has another shape in the model, or the model has none of its layers.
    """
    width, own_width = shape.num_heads * shape.head_dim, lora.width
    if own_width is not None and own_width != width:
        preset = preset_of_width(own_width)
        raise WeightsError(
            f"{lora.path} is a LoRA for a transformer of width {own_width}, but {model} has width {width}. "
            + (f"Give a LoRA for this model, or --model {preset}." if preset else "Give a LoRA for this model.")
        )
    expected = {role: (outputs, inputs) for role, (outputs, inputs) in _linears(width, shape.ffn_dim)}
    layers, beyond = {}, list[str]()
    for name, roles in lora.layers.items():
        block = re.match(r"blocks\.(\d+)\.(.+)", name)
        if (block is not None and int(block[1]) >= shape.num_layers) or (_OF_IMAGES.search(name) and not takes_image):
            beyond += roles.values()
            continue
        layers[name] = roles
        if block is not None and block[2] in expected:
            _check_layer(lora, name, expected[block[2]])
    if not layers:
        raise WeightsError(
            f"{lora.path} changes no layer of {model}, which has only {counted(shape.num_layers, 'block')}. Give a "
            "LoRA for this model."
        )
    return dataclasses.replace(lora, layers=layers, unmatched=(*lora.unmatched, *beyond))


def _linears(width: int, ffn_dim: int) -> list[tuple[str, tuple[int, int]]]:
    """The linear layers of a block, with the shapes of their weights."""
    square = [f"attn{i}.{name}" for i in (1, 2) for name in ("to_q", "to_k", "to_v", "to_out.0")]
    square += ["attn2.add_k_proj", "attn2.add_v_proj"]
    return [(name, (width, width)) for name in square] + [
        ("ffn.net.0.proj", (ffn_dim, width)), ("ffn.net.2", (width, ffn_dim))
    ]  # fmt: skip


def _check_layer(lora: LoraFile, layer: str, shape: tuple[int, ...]) -> None:
    """Raise WeightsError where what a file has for a layer does not suit a weight of that shape."""
    roles = lora.layers[layer]
    found = {role: lora.shapes[name] for role, name in roles.items()}
    fault = ""
    if ("down" in found) != ("up" in found):
        fault = f"{layer} lacks one of its two matrices"
    elif "down" in found:
        down, up = found["down"], found["up"]
        flat = (*up[:1], math.prod(down[1:]))
        if not down or math.prod(up[1:]) != down[0] or flat != (*shape[:1], math.prod(shape[1:])):
            fault = f"{layer} changes a weight by {up} times {down}, but the model's is {shape}"
    if math.prod(found.get("alpha", ())) != 1:
        fault = f"the alpha of {layer} has the shape {found['alpha']}, but must be one number"
    for role, wanted in (("diff", shape), ("diff_b", shape[:1]), ("bias", shape[:1])):
        if role in found and found[role] != wanted:
            fault = f"{layer} changes a tensor by {found[role]}, but the model's is {wanted}"
    if fault:
        raise WeightsError(f"{lora.path} does not fit the model: {fault}. Give a LoRA for this model.")


def read_changes(lora: LoraFile, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, LayerChange]:
    """What a file adds to each layer of a model.

    Args:
        lora: as `check_lora` returns it. shapes: of the model's parameters by name.
    Raises: WeightsError where a layer is not in the model or has another shape, and for NaN and Inf.
    """
    tensors = read_tensors(lora.path)
    changes = {}
    for layer, roles in lora.layers.items():
        found = {role: tensors[name].to(torch.float32) for role, name in roles.items()}
        if bad := next((roles[role] for role, tensor in found.items() if not is_finite(tensor)), None):
            raise WeightsError(f"{lora.path} contains NaN or Inf in {bad}. Copy or download it again.")
        shape = shapes.get(f"{layer}.weight", shapes.get(layer))
        if shape is None:
            raise WeightsError(f"{lora.path} changes {layer}, which the model does not have.")
        _check_layer(lora, layer, tuple(shape))
        rank = len(found.get("down", ()))
        scale = float(found["alpha"]) / rank if rank and "alpha" in found else lora.scaling(layer, rank)
        down, bias = (scale * found[role] if role in found else None for role in ("down", "bias"))
        changes[layer] = LayerChange(down, found.get("up"), found.get("diff"), found.get("diff_b", bias))
    return changes
