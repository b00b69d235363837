"""LoRAs in a loaded transformer: merged into its weights, or live beside them by diffusers and peft."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.utils import USE_PEFT_BACKEND
from torch import Tensor

from slagen.errors import EnvironmentProblem, WeightsError
from slagen.formats.lora import LayerChange, LoraFile, read_changes
from slagen.formats.quantised_linear import multiply_out
from slagen.io.text import counted

NEEDS_PEFT = (
    "a LoRA that is not merged into the weights needs peft. Install it: pip install 'slagen[lora]'. Or merge it: "
    "--lora-merge."
)


class Loras:
    """The LoRAs of a run in a transformer, each with a scale that may be changed.

    Merged, they take no time in a step and no memory of the device. Live, by peft, they take both, but leave the
    weights as they are: these may be quantised. What both compute differs by rounding. Whole differences (diff and
    diff_b) are added to the weights in any case.

    Args:
        pipe: a WanPipeline, with its attention installed.
        files: as `check_lora` returned them. merge: merge them, or keep them live.
        keep: keep a copy of each weight that is changed, in the memory of the CPU, so that `set_scales` can be called
            again, and `remove`.
    Attributes: multiplied_out: how many weights of 8 bits are held in full, because they are changed.
    Raises: WeightsError where a file does not fit, or GGUF weights are to be changed; EnvironmentProblem where peft is
        missing.
    """

    def __init__(self, pipe: Any, files: Sequence[LoraFile], *, merge: bool, keep: bool) -> None:
        self.transformer, self.files, self.merge, self.keep = pipe.transformer, files, merge, keep or not merge
        self.scales: tuple[float, ...] | None = None
        self.originals: dict[str, Tensor] = {}
        parameters = dict(self.transformer.named_parameters())
        shapes = {name: _shape(parameter) for name, parameter in parameters.items()}
        self.changes = [read_changes(file, shapes) for file in files]
        self.multiplied_out = multiply_out(self.transformer, _changed_weights(self.changes, merge))
        self.parameters = dict(self.transformer.named_parameters())  # by their names before peft gives them others
        if not merge:
            self._add_adapters(pipe)

    def set_scales(self, scales: Sequence[float]) -> None:
        """Give each LoRA a scale, 0 being as without it, in place of the one that it had."""
        wanted = tuple(scales)
        if wanted == self.scales:
            return
        assert self.scales is None or self.keep
        self._restore()
        self.scales = wanted
        for changes, scale in zip(self.changes, wanted, strict=True):
            for layer, change in changes.items() if scale else ():
                self._add(layer, change, scale)
        if not self.keep:
            self.changes = []
        if not self.merge:
            _set_adapters(self.transformer, [_name(index) for index in range(len(wanted))], wanted)

    def describe(self) -> str | None:
        """What a note says of weights of 8 bits that are changed; None where there are none."""
        if not self.multiplied_out:
            return None
        text = f"the LoRA changes {counted(self.multiplied_out, 'weight')} in 8 bits, which a run holds in full then"
        return f"{text}; --no-lora-merge leaves them in 8 bits" if self.merge else text

    def remove(self) -> None:
        """Put back the weights as they were."""
        self._restore()
        self.scales = None
        if not self.merge:
            self.transformer.unload_lora()

    @torch.no_grad()
    def _add(self, layer: str, change: LayerChange, scale: float) -> None:
        """Add what is not live to the parameters of a layer, in float32, rounded once."""
        weight = f"{layer}.weight" if f"{layer}.weight" in self.parameters else layer
        for name, delta in ((weight, change.weight), (f"{layer}.bias", change.bias)):
            if delta is not None:
                self._add_to(name, delta, scale)
        if self.merge and change.down is not None and change.up is not None:
            device = self.parameters[weight].device
            product = change.up.to(device).flatten(1) @ change.down.to(device).flatten(1)
            self._add_to(weight, product, scale)

    def _add_to(self, name: str, delta: Tensor, scale: float) -> None:
        parameter = self.parameters[name]
        if not parameter.is_floating_point() or parameter.element_size() < 2:
            raise WeightsError(
                f"{name} stays quantised, so a LoRA cannot be added to it. Give the model in bf16, or a LoRA without "
                "whole differences (diff) and --no-lora-merge."
            )
        if self.keep:
            self.originals.setdefault(name, parameter.detach().cpu().clone())
        added = scale * delta.to(parameter.device).reshape(parameter.shape)
        parameter.copy_(parameter.to(torch.float32) + added)

    @torch.no_grad()
    def _restore(self) -> None:
        for name, tensor in self.originals.items():
            self.parameters[name].copy_(tensor)
        self.originals.clear()

    def _add_adapters(self, pipe: Any) -> None:
        if not USE_PEFT_BACKEND:
            raise EnvironmentProblem(NEEDS_PEFT)
        own = self.transformer.dtype  # beside weights that stay quantised
        dtypes = {name: x.dtype if x.is_floating_point() else own for name, x in self.parameters.items()}
        for index, changes in enumerate(self.changes):
            state = {
                f"{layer}.{name}.weight": tensor.to(dtypes[f"{layer}.weight"])
                for layer, change in changes.items()
                for name, tensor in (("lora_A", change.down), ("lora_B", change.up))
                if tensor is not None
            }
            if state:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")  # of the LoRA before
                    self.transformer.load_lora_adapter(
                        state, prefix=None, adapter_name=_name(index), low_cpu_mem_usage=True, _pipeline=pipe
                    )
        self.changes = [
            {layer: dataclasses.replace(change, down=None, up=None) for layer, change in changes.items()}
            for changes in self.changes
        ]


def _changed_weights(changes: Sequence[dict[str, LayerChange]], merge: bool) -> set[str]:
    """The weights that LoRAs change in place, by name."""
    each = [(layer, change) for one in changes for layer, change in one.items()]
    return {f"{layer}.weight" for layer, change in each if merge or change.weight is not None}


def _name(index: int) -> str:
    return f"lora_{index}"


def _shape(parameter: Tensor) -> tuple[int, ...]:
    """A parameter's shape, of a quantised GGUF tensor the one that it stands for."""
    return tuple(getattr(parameter, "quant_shape", None) or parameter.shape)


def _set_adapters(transformer: Any, names: Sequence[str], scales: Sequence[float]) -> None:
    """Make those active whose scale is not 0."""
    loaded = getattr(transformer, "peft_config", None) or {}
    used = {name: scale for name, scale in zip(names, scales, strict=True) if scale and name in loaded}
    if used:
        transformer.enable_lora()
        transformer.set_adapters(list(used), list(used.values()))
    elif loaded:
        transformer.disable_lora()
