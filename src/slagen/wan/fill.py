"""Copy the tensors of a weight file into a transformer with its attention installed, after they were all checked."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from slagen.attention.protocol import Method
from slagen.errors import WeightsError
from slagen.formats.checks import number_faults
from slagen.formats.quantised_linear import multiply_out
from slagen.formats.sla import is_projection
from slagen.wan.processor import installation, processors


def _add_low_rank(tensors: dict[str, Tensor], state: dict[str, Tensor], path: str | Path) -> dict[str, Tensor]:
    """Low-rank changes added to the weights that they change, the file's own or the model's. Raises WeightsError where
    they do not fit."""
    changed = {name: tensor for name, tensor in tensors.items() if ".lora_" not in name}
    for name, down in tensors.items():
        if ".lora_A." not in name:
            continue
        target, up = name.replace(".lora_A.", "."), tensors.get(name.replace(".lora_A.", ".lora_B."))
        base = tensors.get(target, state.get(target))
        if base is None or up is None or (up.shape[:1] + down.shape[1:], up.shape[1:]) != (base.shape, down.shape[:1]):
            raise WeightsError(
                f"{path} does not match the model, which has no layer that {name} can change. Give weights for this "
                "model."
            )
        product = up.to(base.device, torch.float32) @ down.to(base.device, torch.float32)
        changed[target] = base.to(product.device, torch.float32) + product
    return changed


def _untrained(method: Method, tensors: dict[str, Tensor], layers: tuple[float, ...] | None) -> list[str]:
    """The names of all-zero matrices that a method's output depends on, where it cannot do without them."""
    if not method.needs.weights:
        return []
    dense = tuple(f"blocks.{layer}." for layer, sparsity in enumerate(layers or ()) if sparsity == 0)
    groups = {name: method.group(name) for name in tensors if not name.startswith(dense)}
    used = [name for name, group in groups.items() if group is not None and group.used]
    return [name for name in used if tensors[name].ndim > 1 and not tensors[name].any()]


def fill(
    transformer: WanTransformer3DModel, tensors: dict[str, Tensor], path: str | Path, allow_untrained: bool,
    missing: list[str], layers: tuple[float, ...] | None = None,
) -> None:  # fmt: skip
    """Check every tensor against the model, then copy them in and keep what they replace; `missing` ones are faults.

    Weights of 8 bits that the file changes are held in full from then on.

    Args: layers: the sparsity of each layer in training, where there was not one for all: one of 0 trained nothing.
    """
    multiply_out(transformer, {name.replace(".lora_A.", ".") for name in tensors})
    state = transformer.state_dict()
    faults = number_faults(tensors)
    tensors = _add_low_rank(tensors, state, path)
    missing += [name for name in state if is_projection(name) and name not in tensors and name not in missing]
    faults += [f"{name} is missing" for name in missing]
    for name, tensor in tensors.items():
        if name not in state:
            faults.append(f"{name} is not in the model")
        elif tensor.shape != state[name].shape:
            faults.append(f"{name} has shape {tuple(tensor.shape)}, but {tuple(state[name].shape)} in the model")
    if faults:
        more = f", and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise WeightsError(
            f"{path} does not match the model: {'; '.join(faults[:3])}{more}. Give weights for this model."
        )
    zero = _untrained(processors(transformer)[0].method, tensors, layers)
    if zero and not allow_untrained:
        others = f", as are {len(zero) - 1} more" if len(zero) > 1 else ""
        raise WeightsError(
            f"{path} contains untrained weights: {zero[0]} is all zero{others}. "
            "Give trained weights, or run it anyway with --allow-untrained."
        )
    record = installation(transformer)
    assert record is not None
    with torch.no_grad():
        for name, tensor in tensors.items():
            if not is_projection(name):
                record.replaced[name] = state[name].detach().cpu().clone()
            state[name].copy_(tensor)
