"""Whether a checkpoint fits a model: every tensor there once, in the model's shape, finite and of the usual dtype."""

import re
from collections import Counter

import torch
from torch import Tensor

from slagen.attention.registry import parameter_group
from slagen.errors import WeightsError
from slagen.formats.bounds import is_finite
from slagen.formats.checkpoint import Checkpoint
from slagen.formats.published import preset_of_width
from slagen.formats.quantised import FLOATS
from slagen.io.text import counted, cut


def check_fit(
    checkpoint: Checkpoint, shapes: dict[str, torch.Size], num_layers: int, head_dim: int,
    dtype: torch.dtype = torch.float32,
) -> None:  # fmt: skip
    """Check a checkpoint against a model: every tensor there once, in the model's shape and in a usual dtype.

    TurboDiffusion's patch embedding, a matrix in its files, is given its five dimensions here.

    Args:
        shapes: of the model's tensors, by name. dtype: that weights which stay quantised are computed in.
    Raises: WeightsError that lists the first eight faults.
    """
    tensors, faults = checkpoint.tensors, list(checkpoint.faults)
    width = shapes.get("patch_embedding.bias", torch.Size((checkpoint.width,)))[0]
    if checkpoint.width and checkpoint.width != width:
        raise WeightsError(
            f"{checkpoint.path} is a transformer with {counted(checkpoint.num_layers, 'layer')} of width "
            f"{checkpoint.width}, but the model has {counted(num_layers, 'layer')} of width "
            f"{width}. Give the model that it belongs to: --model {preset_of_width(checkpoint.width) or 'FOLDER'}."
        )
    name = "patch_embedding.weight"
    flat = tensors.get(name)
    if checkpoint.layout == "wan" and flat is not None and flat.ndim == 2 and name in shapes:
        shape = shapes[name]
        if tuple(flat.shape) == (shape[0], shape[1:].numel()):
            tensors[name] = flat.reshape(shape)
    expected = dict(shapes)
    expected |= _learned_shapes(checkpoint.projections, num_layers, head_dim)
    held = {**tensors, **checkpoint.projections}
    faults += [f"{name} is missing" for name in expected if name not in held]
    faults += [f"{name} is unexpected" for name in held if name not in expected]
    faults += [
        f"{name} has the shape {tuple(tensor.shape)}, but must have {tuple(expected[name])}"
        for name, tensor in held.items()
        if name in expected and tensor.shape != expected[name]
    ]
    faults += number_faults(held, checkpoint.forms)
    faults += [f"{name} contains NaN or Inf" for name, codes in checkpoint.kept.items() if not codes.is_finite(dtype)]
    if faults:
        more = f"; and {len(faults) - 8} more" if len(faults) > 8 else ""
        raise WeightsError(
            f"{checkpoint.path} does not match the model ({counted(len(faults), 'faulty tensor')}): "
            f"{'; '.join(cut(fault, 300) for fault in faults[:8])}"
            f"{more}. Copy or download it again, or give the model that it belongs to."
        )
    zero = [name for name, x in checkpoint.projections.items() if name.endswith("proj_l.weight") and not x.any()]
    if zero and len(zero) < num_layers:
        raise WeightsError(
            f"{checkpoint.path} has lost some of its contents: {zero[0]} is all zero, although other layers are "
            "trained. Download it again."
        )


def _learned_shapes(found: dict[str, Tensor], num_layers: int, head_dim: int) -> dict[str, torch.Size]:
    """The shapes of what an attention method learned, in every layer: of SLA as they must be, of another as they are in
    the first layer that has it; the model that they are put into says whether they suit."""
    shapes = dict[str, torch.Size]()
    for name, tensor in found.items():
        shapes.setdefault(re.sub(r"^blocks\.\d+\.", "", name), tensor.shape)
    if own := [role for role in shapes if ".proj_l." in role]:
        for role in own:
            del shapes[role]
        prefix = "attn1.processor.proj_l."
        shapes |= {prefix + "weight": torch.Size((head_dim, head_dim)), prefix + "bias": torch.Size((head_dim,))}
    return {f"blocks.{layer}.{role}": shape for layer in range(num_layers) for role, shape in shapes.items()}


def _is_learned(name: str) -> bool:
    """Whether an attention method learned it, by any spelling."""
    return "proj_l" in name or parameter_group(name) is not None


def number_faults(tensors: dict[str, Tensor], forms: dict[str, str] | None = None) -> list[str]:
    """Faults of values and dtypes: NaN or Inf, integers, and a dtype unlike that of the same tensor in other blocks.

    Args:
        forms: what each tensor of 8 bits was in the file, by name; slagen chose its dtype here, so that is not checked.
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
            faults.append(f"{name} contains NaN or Inf")
        if forms and name in forms:
            continue
        role = re.sub(r"\.\d+(?=\.)", ".*", name)
        kinds.setdefault(role, {}).setdefault(tensor.dtype, []).append(name)
        sizes[tensor.dtype] += 0 if _is_learned(name) else tensor.numel()
    for found in kinds.values():
        rarest = min(found, key=lambda dtype: len(found[dtype]))
        if len(found) > 1:
            faults.append(f"{found[rarest][0]} is {rarest}, unlike the same tensor in other blocks")
    if any(form.startswith("float8") for form in (forms or {}).values()):
        del sizes[torch.float32]  # what was kept out of fp8 is float32 and one kind in half precision, more of either
    main = sizes.most_common(1)[0][0] if sizes else torch.float32
    for role, found in kinds.items():  # a file in half precision may keep some in float32, but nothing else is mixed
        for dtype in set(found) - {main, torch.float32}:
            if not _is_learned(role) or main in FLOATS[:2]:
                faults.append(f"{found[dtype][0]} is {dtype}, but the other tensors are {main}")
    return faults
