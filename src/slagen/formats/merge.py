"""`slagen merge`: add what a tuning changed in one transformer to another, tensor by tensor."""

import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from slagen.errors import SlagenError, UsageError, WeightsError
from slagen.formats.bounds import is_finite
from slagen.formats.checkpoint import Checkpoint
from slagen.formats.checks import check_fit
from slagen.formats.peek import Found, peek
from slagen.formats.sla_settings import SETTINGS_METADATA, describe_settings
from slagen.formats.transformer import read_checkpoint
from slagen.io.files import reserved, writing
from slagen.io.paths import check_utf8, user_path
from slagen.io.text import counted


def merge(
    base: str, output: str, *, diff_base: str, diff_target: str, weight: float = 1.0, overwrite: bool = False,
    on_note: Callable[[str], None] = lambda text: None,
) -> Path:  # fmt: skip
    """Add what a tuning changed to another model: W = W_base + w (W_target - W_diffbase), tensor by tensor in float32.

    Args:
        base: transformer that gets the change, such as a step-distilled one.
        output: a .safetensors file, in diffusers' names, in the base's dtypes.
        diff_base, diff_target: the transformer before and after tuning. What only the target has, as `proj_l`, is
            copied; what either lacks, or has in another shape, stays the base's.
        weight: w.
    Raises: WeightsError if a file is not a transformer; UsageError for an output that exists, or a weight that is not
        finite or takes a sum beyond its dtype.
    Source: TurboDiffusion's merge script, github.com/thu-ml/TurboDiffusion.
    """
    if not math.isfinite(weight):
        raise UsageError(f"weight is {weight}, but must be a finite number. Try --weight 1.")
    target = user_path(output)
    check_utf8(target)
    if target.suffix != ".safetensors":
        raise UsageError(
            f"the output is {target}, but must be a .safetensors file. Try {target.with_suffix('.safetensors')}."
        )
    with reserved(target):
        if target.is_dir() or (os.path.lexists(target) and not overwrite):
            raise UsageError(f"{target} exists. Choose another output, or replace a file with --overwrite.")
        tensors, about = _merged(base, diff_base, diff_target, weight, on_note)
        try:
            with writing(target, replace=overwrite) as part:
                save_file(tensors, part, metadata=about)
        except (OSError, SafetensorError) as error:
            raise SlagenError(f"{target} cannot be written ({error}). Check the free space on its disk.") from error
    return target


def _merged(
    base: str, diff_base: str, diff_target: str, weight: float, on_note: Callable[[str], None]
) -> tuple[dict[str, Tensor], dict[str, str] | None]:
    """The merged tensors, and the metadata that record what their SLA weights were trained with."""
    paths = [user_path(name) for name in (base, diff_base, diff_target)]
    start, before, after = ({**c.tensors, **c.projections} for c in map(_whole, paths))
    about = _settings_of(peek(paths[0]), peek(paths[2]))
    merged: dict[str, Tensor] = {}
    changed = 0
    for name, tensor in start.items():
        old, new = before.get(name), after.get(name)
        if old is None or new is None or not old.shape == new.shape == tensor.shape:
            merged[name] = tensor
            continue
        merged[name] = (tensor.float() + weight * (new.float() - old.float())).to(tensor.dtype)
        if not is_finite(merged[name]):
            raise UsageError(
                f"with --weight {weight:g}, {name} exceeds the range of {tensor.dtype}. Try a weight closer to 0."
            )
        changed += not torch.equal(merged[name], tensor)
    copied = [name for name in after if name not in start]
    merged |= {name: after[name] for name in copied}
    if changed or copied:
        on_note(
            f"{counted(changed, 'tensor')} changed, {len(start) - changed} kept as in the base, "
            f"{len(copied)} copied from the fine-tuned transformer"
        )
    else:
        on_note("the merge changed nothing: all tensors equal those of the base transformer")
    return {name: tensor.contiguous() for name, tensor in merged.items()}, about


def _settings_of(base: Found, target: Found) -> dict[str, str] | None:
    """The metadata that record what a merged transformer's attention was trained with; None without such weights."""
    found = target if target.trained_with is not None else base
    if found.trained_with is None:
        return None
    family = "rcm" if "rcm" in (base.sampler, target.sampler) else "flow"
    settings = describe_settings(found.method, found.trained_with, family, found.trained, found.layer_sparsities)
    return {SETTINGS_METADATA: json.dumps(settings, sort_keys=True)}


def _whole(path: Path) -> Checkpoint:
    """Read a transformer and check that it is complete: the same tensors in every layer, and no unknown ones."""
    checkpoint = read_checkpoint(path, torch.float32)
    if not isinstance(checkpoint, Checkpoint):
        raise WeightsError(f"{path} holds only attention weights. Give a whole transformer.")
    shapes = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
    roles = {re.sub(r"^blocks\.\d+\.", "", name) for name in shapes if name.startswith("blocks.")}
    for layer in range(checkpoint.num_layers):
        for role in roles:
            shapes.setdefault(f"blocks.{layer}.{role}", torch.Size())
    weights = [x for name, x in checkpoint.projections.items() if name.endswith("weight")]
    check_fit(checkpoint, shapes, checkpoint.num_layers, weights[0].shape[0] if weights else 0)
    return checkpoint
