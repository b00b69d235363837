"""Every public form of Wan2.1's weights, told apart by its keys: read, named as diffusers does, and accounted for.

Nothing is loaded in part: a tensor that is missing, unexpected, of another shape or of another kind of number stops it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slagen.config import Sampler, SLAConfig
from slagen.errors import UsageError, WeightsError
from slagen.models import TURBO_SLA, read_header
from slagen.wan.kinds import REFUSALS, identify
from slagen.wan.names import LAYOUTS, LINEARS_OF_A_BLOCK, PROJECTION, plain, without_prefixes
from slagen.wan.quantised import dequantise
from slagen.wan.reading import is_finite, read_tensors

FLOATS = (torch.bfloat16, torch.float16, torch.float32)


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
        names = zip(without_prefixes(list(content)), content.values(), strict=True)
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
    if kind == "transformer" and any(PROJECTION.fullmatch(name) for name in without_prefixes(list(content))):
        return Found(kind, sla=TURBO_SLA, sampler="rcm")
    return Found(kind)


def _checkpoint(path: Path, content: dict[str, Any], dtype: torch.dtype) -> Checkpoint:
    names = dict(zip(without_prefixes(list(content)), content.values(), strict=True))
    layout = max(LAYOUTS, key=lambda name: sum(LAYOUTS[name](key) is not None for key in plain(names)))
    rename = LAYOUTS[layout]
    checkpoint = Checkpoint(path, layout, {}, {})
    faults = checkpoint.faults
    spellings = set()
    for name, value in names.items():
        if not isinstance(value, Tensor):
            faults.append(f"{name} is a {type(value).__name__}, not a tensor")
            continue
        projection = PROJECTION.fullmatch(name)
        if projection:
            spellings.add(projection[2])
            checkpoint.projections[f"blocks.{projection[1]}.attn1.processor.proj_l.{projection[3]}"] = value
        elif name.endswith(".int8_weight"):
            checkpoint.quantised = True
            target = rename(name.removesuffix("int8_weight") + "weight") or ""
            scale = names.get(name.removesuffix("int8_weight") + "scale")
            if not LINEARS_OF_A_BLOCK.fullmatch(target):
                faults.append(f"{name} is unexpected")
            elif not isinstance(scale, Tensor):
                faults.append(f"{name.removesuffix('int8_weight')}scale is missing")
            else:
                _add(checkpoint, target, dequantise(name, value, scale, dtype, faults))
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
            if LINEARS_OF_A_BLOCK.fullmatch(name) and name in _float_linears(names, rename)
        ]
    return checkpoint


def _float_linears(names: dict[str, Any], rename: Callable[[str], str | None]) -> set[str]:
    return {rename(name) or "" for name in names if name.endswith(".weight")}


def _add(checkpoint: Checkpoint, name: str, tensor: Tensor) -> None:
    if name in checkpoint.tensors:
        checkpoint.faults.append(f"{name} is there twice")
    checkpoint.tensors[name] = tensor


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
        if not tensor.is_meta and not is_finite(tensor):
            faults.append(f"{name} has values that are not finite numbers")
        role = re.sub(r"\.\d+(?=\.)", ".*", name)
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
