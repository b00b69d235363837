"""Every public form of Wan2.1's weights, told apart by its keys: read, named as diffusers does, and accounted for.

Nothing is loaded in part: a tensor that is missing, unexpected, of another shape or of another kind of number stops it.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slagen.config import Sampler, SLAConfig
from slagen.errors import UsageError, WeightsError
from slagen.formats.bounds import is_finite
from slagen.formats.kinds import REFUSALS, hints, identify
from slagen.formats.model_files import SETTINGS_KEY, SLA_SETTINGS, check_no_shard, read_header, read_strings
from slagen.formats.names import (
    LAYOUTS,
    LINEARS_OF_A_BLOCK,
    OWN_SPELLING,
    PROJECTION,
    inside,
    other_parts,
    transformers,
)
from slagen.formats.published import TURBO_SLA, preset_of_width
from slagen.formats.quantised import FLOATS, multiply_out
from slagen.formats.reading import component_files, read_tensors, transformer_folder
from slagen.io import documents
from slagen.io.forms import Fault, check
from slagen.io.text import counted, cut


@dataclass
class Checkpoint:
    """The transformer in a file, under diffusers' names.

    Args:
        path: the file or folder it was read from.
        layout: a name in LAYOUTS.
        tensors: of the transformer; what was int8 or fp8 is multiplied out.
        projections: `proj_l` of the layers, by the processors' names; empty where there is no SLA in the file.
        forms: what each tensor of 8 bits was in the file, such as "int8"; here it is of the kind that was asked for.
        faults: what is wrong in the file itself, to be told together with what does not fit a model.
    """

    path: Path
    layout: str
    tensors: dict[str, Tensor]
    projections: dict[str, Tensor]
    forms: dict[str, str] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    @property
    def quantised(self) -> bool:
        return bool(self.forms)

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


def read_checkpoint(
    path: Path,
    dtype: torch.dtype = torch.bfloat16,
    *,
    projections_only: bool = False,
    part: str | None = None,
    shapes_only: bool = False,
) -> Checkpoint | SideFile:
    """Read a transformer, or SimpleTuner's side file, whatever its form.

    Args:
        dtype: of what is int8 or fp8 in the file.
        projections_only: leave all tensors out but `proj_l`.
        part: which transformer, where the file holds several.
        shapes_only: multiply nothing out: what is int8 or fp8 has a shape and no values.
    Raises: WeightsError if the file is broken, or holds something else. `check_fit` tells what does not fit a model.
    """
    content = read_tensors(path)
    kind = identify(content)
    if kind == "side-file":
        return _side_file(path, content)
    if kind not in ("transformer", "sla"):
        raise WeightsError(f"{path} {REFUSALS[kind]}")
    values, twice = _of_one_transformer(path, content, part)
    if projections_only:
        values = {name: value for name, value in values.items() if "proj_l" in name}
    checkpoint = _checkpoint(path, values, dtype, shapes_only)
    checkpoint.faults += [f"{name} is there twice" for name in twice]
    return checkpoint


def _of_one_transformer(path: Path, content: dict[str, Any], part: str | None) -> tuple[dict[str, Any], list[str]]:
    """What belongs to a transformer by names without prefixes, and the names that come twice. Raises WeightsError where
    there are several and none is chosen."""
    found = transformers(content)
    if (len(found) > 1 and part is None) or (part is not None and part not in found):
        holds = f"{path} holds {len(found)} transformers: {', '.join(found)}. " if len(found) > 1 else ""
        if part is None:
            raise WeightsError(
                f"{holds}Take one out, and give the folder that it makes: slagen convert {path} FOLDER "
                f"--part {list(found)[-1]}"
            )
        raise UsageError(
            f"part is {part!r}, but {holds or f'{path} holds one transformer. '}Give one of these, or none."
        )
    prefix = found.get(part or "", next(iter(found.values()), ""))
    values: dict[str, Any] = {}
    twice = []
    for name, plain in inside(content, prefix, list(found.values())).items():
        if plain in values:
            twice.append(plain)
        values[plain] = content[name]
    return values, twice


@dataclass(frozen=True)
class Found:
    """What a weight file is, without its tensors being read.

    Args:
        kind: as `identify` says it.
        sla: what its SLA weights were trained with; None without any, or where metadata says it.
        sampler: the sampler that it is distilled for; None for any flow-matching one.
        trained: what was trained, as an SLA file says it; "" where that is not told.
        untold: it holds SLA weights, and nothing says what they were trained with.
        notes: what else to know of it.
        few_steps: the word in its name or metadata that says it is distilled to few steps; "" where none does.
    """

    kind: str
    sla: SLAConfig | None = None
    sampler: Sampler | None = None
    trained: str = ""
    untold: bool = False
    notes: tuple[str, ...] = ()
    few_steps: str = ""


UNTOLD = (
    "holds SLA weights that diffusers saved, but nothing says what they were trained with. Give the sla.safetensors "
    "that they came from, or save them again with this slagen, which writes it into config.json: load_sla(pipe, FILE), "
    "pipe.save_pretrained(FOLDER)."
)


def peek(path: Path, part: str | None = None) -> Found:
    """Look at a weight file's names. Raises WeightsError if it is nothing that can be run.

    Args:
        part: which transformer, where the file holds several.
    """
    metadata: dict[str, Any] = {}
    if path.suffix == ".safetensors" and path.is_file():
        check_no_shard(path)
        content: dict[str, Any] = read_header(path)
        metadata = content.pop("__metadata__", None) or {}
        if "slagen" in metadata:
            return Found("sla")  # with every tensor that was trained, which may be all of a transformer's
        content |= read_tensors(path, lambda name: name.endswith(".comfy_quant"))
    else:
        content = _headers(path) if path.is_dir() else read_tensors(path)
    kind = identify(content)
    if kind == "side-file":
        return Found(kind, sla=_side_file(path, content).config)
    if kind not in ("transformer", "sla"):
        raise WeightsError(f"{path} {REFUSALS[kind]}")
    values, _ = _of_one_transformer(path, content, part)
    notes, few_steps = hints(path, metadata)
    left = other_parts(content)
    if left:
        notes.append(f"{path.name} holds more than a transformer ({', '.join(left)}), of which nothing else is used")
    found = Found(kind, notes=tuple(notes), few_steps=few_steps)
    spellings = {match[2] for name in values if (match := PROJECTION.fullmatch(name))}
    if OWN_SPELLING in spellings:
        told = read_settings(path, metadata)
        return dataclasses.replace(found, untold=told is None, **(told or {}))
    if kind == "transformer" and spellings:
        return dataclasses.replace(found, sla=TURBO_SLA, sampler="rcm")
    return found


SETTINGS_METADATA = "slagen_transformer"  # in a transformer file's metadata


def _headers(folder: Path) -> dict[str, Any]:
    """The tensors of a folder's transformer as the headers of its files tell of them."""
    entries: dict[str, Any] = {}
    for file in component_files(transformer_folder(folder)):
        entries |= read_header(file)
    entries.pop("__metadata__", None)
    return entries


def read_settings(path: Path, metadata: dict[str, Any]) -> dict[str, Any] | None:
    """What SLA weights inside a transformer were trained with: fields of Found, from the file's metadata or from the
    config.json that diffusers writes beside it; None where neither says it. Raises WeightsError if it cannot be read.
    """
    folder = transformer_folder(path) if path.is_dir() else path.parent
    told = None
    if SETTINGS_METADATA in metadata:
        told = read_strings(path, metadata[SETTINGS_METADATA], SLA_SETTINGS)
    elif (folder / "config.json").is_file():
        told = documents.read_json(folder / "config.json", {f"{SETTINGS_KEY}?": SLA_SETTINGS}).get(SETTINGS_KEY)
    if told is None:
        return None
    try:
        config = SLAConfig.from_dict(told["config"])
    except UsageError as error:
        raise WeightsError(f"{path} has SLA settings beside it that do not hold: {error} Get it again.") from error
    return {"sla": config, "sampler": "rcm" if told["sampler_family"] == "rcm" else None, "trained": told["trained"]}


def _checkpoint(path: Path, content: dict[str, Any], dtype: torch.dtype, shapes_only: bool) -> Checkpoint:
    plain = multiply_out(content, dtype, shapes_only)
    names = plain.tensors
    layout = max(LAYOUTS, key=lambda name: sum(LAYOUTS[name](key) is not None for key in names))
    rename = LAYOUTS[layout]
    checkpoint = Checkpoint(path, layout, {}, {}, faults=plain.faults)
    faults = checkpoint.faults
    spellings = set()
    for name, value in names.items():
        if not isinstance(value, Tensor):
            faults.append(f"{name} is a {type(value).__name__}, not a tensor")
            continue
        projection = PROJECTION.fullmatch(name)
        target = rename(name)
        if projection:
            spellings.add(projection[2])
            target = f"blocks.{projection[1]}.attn1.processor.proj_l.{projection[3]}"
            checkpoint.projections[target] = value
        elif target is None:
            faults.append(f"{name} is unexpected")
        else:
            checkpoint.tensors[target] = value
        if name in plain.forms and target is not None:
            checkpoint.forms[target] = plain.forms[name]
    if len(spellings) > 1:
        faults.append(f"proj_l is spelt in {len(spellings)} ways ({', '.join(sorted(spellings))})")
    if plain.turbo:  # all linear layers of the blocks are int8 there, and nothing else
        faults += [
            f"{name} is not int8, though others are"
            for name in checkpoint.tensors
            if LINEARS_OF_A_BLOCK.fullmatch(name) and name not in checkpoint.forms
        ]
        faults += [
            f"{name} is unexpected as int8" for name in checkpoint.forms if not LINEARS_OF_A_BLOCK.fullmatch(name)
        ]
    return checkpoint


def check_fit(checkpoint: Checkpoint, shapes: dict[str, torch.Size], num_layers: int, head_dim: int) -> None:
    """Hold a checkpoint against a model: every tensor there once, of the model's shape, of the usual kind of number.

    TurboDiffusion's patch embedding, a matrix in its files, is given its five dimensions here.

    Args:
        shapes: of the model's tensors, by name.
    Raises: WeightsError with the list of all that is wrong.
    """
    tensors, faults = checkpoint.tensors, list(checkpoint.faults)
    width = shapes.get("patch_embedding.bias", torch.Size((checkpoint.width,)))[0]
    if checkpoint.width and checkpoint.width != width:
        raise WeightsError(
            f"{checkpoint.path} is a transformer of {counted(checkpoint.num_layers, 'layer')} of width "
            f"{checkpoint.width}, but the model is one of {counted(num_layers, 'layer')} of width "
            f"{width}. Give its own model: --model {preset_of_width(checkpoint.width) or 'FOLDER'}."
        )
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
    faults += number_faults(held, checkpoint.forms)
    if faults:
        more = f"; and {len(faults) - 8} more" if len(faults) > 8 else ""
        raise WeightsError(
            f"{checkpoint.path} does not fit, and would make noise ({len(faults)} faulty): "
            f"{'; '.join(cut(fault, 300) for fault in faults[:8])}"
            f"{more}. Get the file again, or the model it belongs to."
        )
    zero = [name for name, x in checkpoint.projections.items() if name.endswith("weight") and not x.any()]
    if zero and len(zero) < num_layers:
        raise WeightsError(
            f"{checkpoint.path} has an all-zero {zero[0]} beside trained ones, so a part of it was lost. Get it again."
        )


def number_faults(tensors: dict[str, Tensor], forms: dict[str, str] | None = None) -> list[str]:
    """Tensors that are no finite floating-point numbers, or not of the kind that the same tensor of other blocks is.

    Args:
        forms: of those that were of 8 bits in the file: what they are here says nothing of it.
    """
    faults: list[str] = []
    kinds: dict[str, dict[torch.dtype, list[str]]] = {}
    sizes: Counter[torch.dtype] = Counter()
    for name, tensor in tensors.items():
        if tensor.dtype not in (*FLOATS, torch.float64):
            faults.append(f"{name} is {tensor.dtype}, but must be bfloat16, float16, float32 or float64")
            continue
        wide = tensor.dtype == torch.float64  # to be rounded to float32 at most
        if not tensor.is_meta and not is_finite(tensor.float() if wide else tensor):
            faults.append(f"{name} has values that are not finite numbers")
        if forms and name in forms:
            continue
        role = re.sub(r"\.\d+(?=\.)", ".*", name)
        kinds.setdefault(role, {}).setdefault(tensor.dtype, []).append(name)
        sizes[tensor.dtype] += 0 if "proj_l" in name else tensor.numel()
    for found in kinds.values():
        rarest = min(found, key=lambda dtype: len(found[dtype]))
        if len(found) > 1:
            faults.append(f"{found[rarest][0]} is {rarest}, unlike in other blocks")
    if any(form.startswith("float8") for form in (forms or {}).values()):
        del sizes[torch.float32]  # what was kept out of fp8 is float32 and one kind in half precision, more of either
    main = sizes.most_common(1)[0][0] if sizes else torch.float32
    for role, found in kinds.items():  # a file in half precision may keep some in float32, but nothing else is mixed
        for dtype in set(found) - {main, torch.float32}:
            if "proj_l" not in role or main in FLOATS[:2]:
                faults.append(f"{found[dtype][0]} is {dtype}, but the rest is {main}")
    return faults


SIDE_FORM = {
    "version": int, "state": {str: dict},
    "settings": {"topk": float, "feature_map": str, "blkq": int, "blkk": int, "tie_feature_map_qk?": bool},
}  # fmt: skip


def _side_file(path: Path, content: dict[str, Any]) -> SideFile:
    """SimpleTuner's: {"version": 1, "settings": {topk, feature_map, blkq, blkk, ...}, "state": {"128:bf16": {...}}}."""
    try:
        check(content, SIDE_FORM)
        settings, states = content["settings"], list(content["state"].values())
        if content["version"] != 1 or not settings.get("tie_feature_map_qk", True):
            raise WeightsError(f"{path} is of a version, or has untied feature maps, that slagen does not run.")
        if len(states) != 1 or set(states[0]) != {"proj_l.weight", "proj_l.bias"}:
            raise WeightsError(f"{path} must hold one proj_l and nothing else, but does not. Get it again.")
        config = SLAConfig(
            sparsity=round(1 - settings["topk"], 12), feature_map=settings["feature_map"], block_m=settings["blkq"],
            block_n=settings["blkk"],
        )  # fmt: skip
        weight, bias = states[0]["proj_l.weight"], states[0]["proj_l.bias"]
        if weight.ndim != 2 or weight.shape[0] != weight.shape[1] or bias.shape != weight.shape[:1]:
            raise WeightsError(f"{path} has a proj_l of shape {tuple(weight.shape)}, but it must be square.")
        faults = number_faults({"proj_l.weight": weight, "proj_l.bias": bias})
    except (AttributeError, Fault, UsageError) as error:
        raise WeightsError(f"{path} is no sla_attention.pt as SimpleTuner writes it: {error}. Get it again.") from error
    if faults:
        raise WeightsError(f"{path} does not fit: {'; '.join(faults)}. Get it again.")
    return SideFile(path, weight.float(), bias.float(), config)
