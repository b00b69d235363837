"""Read a Wan2.1 transformer of any public form under diffusers' names, with every tensor accounted for.

Nothing is loaded in part: a missing or unexpected tensor, or one of another shape or dtype, is an error.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slagen.errors import UsageError, WeightsError
from slagen.formats.checkpoint import Checkpoint
from slagen.formats.kinds import REFUSALS, TRANSFORMERS, identify
from slagen.formats.layouts import LAYOUTS, LINEARS_OF_A_BLOCK, OWN_SPELLING, learned
from slagen.formats.names import inside, transformers
from slagen.formats.quantised import Codes, with_scales
from slagen.formats.side_file import SideFile, read_side_file
from slagen.formats.tensor_files import read_tensors


def read_checkpoint(
    path: Path,
    dtype: torch.dtype = torch.bfloat16,
    *,
    projections_only: bool = False,
    part: str | None = None,
    shapes_only: bool = False,
    keep_quantised: bool = False,
) -> Checkpoint | SideFile:
    """Read a transformer, or SimpleTuner's side file, whatever its form.

    Args:
        dtype: of the tensors that are int8 or fp8 in the file.
        projections_only: leave all tensors out but what an attention method learned.
        part: which transformer, where the file holds several.
        shapes_only: do not dequantise: tensors that are int8 or fp8 get a shape and no values.
        keep_quantised: leave the int8 and fp8 weights of the blocks' linear layers as they are, as `kept`.
    Raises: WeightsError if the file is broken, or holds something else. `check_fit` compares it with a model.
    """
    content = read_tensors(path)
    kind = identify(content)
    if kind == "side-file":
        return read_side_file(path, content)
    if kind not in (*TRANSFORMERS, "sla"):
        raise WeightsError(f"{path} {REFUSALS[kind]}")
    values, twice = tensors_of_one(path, content, part)
    if projections_only:
        values = {name: value for name, value in values.items() if learned(name) or "proj_l" in name}
    checkpoint = _checkpoint(path, values, dtype, shapes_only, keep_quantised)
    checkpoint.faults += [f"{name} appears twice" for name in twice]
    return checkpoint


def tensors_of_one(path: Path, content: dict[str, Any], part: str | None) -> tuple[dict[str, Any], list[str]]:
    """What belongs to a transformer by names without prefixes, and the names that come twice. Raises WeightsError where
    there are several and none is chosen."""
    found = transformers(content)
    if (len(found) > 1 and part is None) or (part is not None and part not in found):
        several = len(found) > 1
        holds = f"{path} holds {len(found)} transformers: {', '.join(found)}. " if several else ""
        if part is None:
            raise WeightsError(
                f"{holds}Extract one of them, and give the new folder: slagen convert {path} FOLDER "
                f"--part {list(found)[-1]}"
            )
        fault = f"{holds}Give one of these." if several else f"{path} holds only one transformer. Leave --part out."
        raise UsageError(f"part is {part!r}, but {fault}")
    prefix = found.get(part or "", next(iter(found.values()), ""))
    values: dict[str, Any] = {}
    twice = []
    for name, plain in inside(content, prefix, list(found.values())).items():
        if plain in values:
            twice.append(plain)
        values[plain] = content[name]
    return values, twice


def _checkpoint(
    path: Path, content: dict[str, Any], dtype: torch.dtype, shapes_only: bool, keep_quantised: bool
) -> Checkpoint:
    plain = with_scales(content, shapes_only)
    names = plain.tensors
    layout = max(LAYOUTS.values(), key=lambda layout: sum(layout.rename(name) is not None for name in names))
    checkpoint = Checkpoint(path, layout.name, {}, {}, faults=plain.faults)
    faults = checkpoint.faults
    spellings: dict[str, set[str]] = {}
    for name, read in names.items():
        if not isinstance(read, Tensor | Codes):
            faults.append(f"{name} is of type {type(read).__name__}, not a tensor")
            continue
        target = layout.rename(name)
        keep = False
        if isinstance(read, Codes):
            keep = (
                keep_quantised and read.values.element_size() == 1 and bool(LINEARS_OF_A_BLOCK.fullmatch(target or ""))
            )
        value = read if isinstance(read, Tensor) else (read.on_meta() if keep else read).product(dtype)
        if parts := learned(name):
            layer, place, own_name = parts
            spellings.setdefault(own_name.split(".")[0], set()).add(f"{place}.".lstrip(".") + own_name.split(".")[0])
            target = f"blocks.{layer}.{OWN_SPELLING}.{own_name}"
            checkpoint.projections[target] = value
        elif target is None:
            faults.append(f"{name} is unexpected")
        else:
            checkpoint.tensors[target] = value
        if isinstance(read, Codes) and target is not None:
            checkpoint.forms[target] = read.form
            if keep:
                checkpoint.kept[target] = read
    for group, places in spellings.items():
        if len(places) > 1:
            faults.append(f"{group} has {len(places)} different names ({', '.join(sorted(places))})")
    if plain.turbo:  # all linear layers of the blocks are int8 there, and nothing else
        faults += [
            f"{name} is not int8, although other tensors are"
            for name in checkpoint.tensors
            if LINEARS_OF_A_BLOCK.fullmatch(name) and name not in checkpoint.forms
        ]
        faults += [
            f"{name} is int8, but only the linear layers of the blocks may be"
            for name in checkpoint.forms
            if not LINEARS_OF_A_BLOCK.fullmatch(name)
        ]
    return checkpoint
