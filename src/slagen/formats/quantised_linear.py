"""Linear layers whose weights stay in int8 or fp8 in memory, multiplied out one layer at a time as they are used."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slagen.formats.quantised import Codes
from slagen.io.text import counted


class QuantisedLinear(nn.Linear):
    """A linear layer with a weight of 8 bits: what it computes is that of the weight multiplied out.

    `weight` (out, in) holds the codes: int8, or the bits of fp8 as uint8, so that nothing takes them for numbers to
    cast. `weight_scale` is the scale, as in `Codes`.

    Args:
        codes: the weight. bias: (out,), in the dtype that is computed in, or None.
        dtype: that it is computed in.
    """

    weight_scale: Tensor | None

    def __init__(self, codes: Codes, bias: nn.Parameter | None, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = codes.values.shape
        self.form, self.block, self.compute_dtype = codes.values.dtype, codes.block, dtype
        bits = codes.values if self.form == torch.int8 else codes.values.view(torch.uint8)
        self.weight = nn.Parameter(bits, requires_grad=False)
        self.register_parameter("bias", bias)
        self.register_buffer("weight_scale", codes.scale)

    def multiplied_out(self) -> Tensor:
        """The weight (out, in) in the dtype that is computed in."""
        return Codes(self.weight.detach().view(self.form), self.weight_scale, self.block).product(self.compute_dtype)

    def forward(self, input: Tensor) -> Tensor:
        """x (..., in) to (..., out)."""
        return F.linear(input, self.multiplied_out(), self.bias)


def keep_quantised(model: nn.Module, kept: Mapping[str, Codes], dtype: torch.dtype) -> None:
    """Give a model's linear layers weights of 8 bits, by the names of these weights."""
    for name, codes in kept.items():
        layer = name.removesuffix(".weight")
        model.set_submodule(layer, QuantisedLinear(codes, model.get_submodule(layer).bias, dtype))  # type: ignore[arg-type]


def quantised_layers(model: nn.Module) -> dict[str, QuantisedLinear]:
    """The layers of a model that hold weights of 8 bits, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantisedLinear)}


@torch.no_grad()
def multiply_out(model: nn.Module, weights: Collection[str]) -> int:
    """Hold these weights in full from now on, as is needed to change them; returns how many were of 8 bits."""
    layers = {name: layer for name, layer in quantised_layers(model).items() if f"{name}.weight" in weights}
    for name, layer in layers.items():
        full = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        full.weight = nn.Parameter(layer.multiplied_out(), requires_grad=False)
        full.register_parameter("bias", layer.bias)
        model.set_submodule(name, full)
    return len(layers)


def plain_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A model's tensors by name, in the names' order; those of 8 bits multiplied out, one at a time."""
    layers = quantised_layers(model)
    for name, tensor in sorted(model.state_dict().items()):
        layer = layers.get(name.rpartition(".")[0])
        if layer is None or name.endswith(".bias"):
            yield name, tensor
        elif name.endswith(".weight"):
            yield name, layer.multiplied_out()


def held_bytes(model: nn.Module) -> tuple[int, int]:
    """Bytes of a model's tensors as they are held, and as they would be with all weights multiplied out."""
    held = sum(x.numel() * x.element_size() for x in model.state_dict().values())
    saved = 0
    for layer in quantised_layers(model).values():
        scale = 0 if layer.weight_scale is None else layer.weight_scale.numel() * layer.weight_scale.element_size()
        saved += layer.weight.numel() * (layer.compute_dtype.itemsize - 1) - scale
    return held, held + saved


def describe(model: nn.Module) -> str | None:
    """What a note says of a model whose weights stay in 8 bits; None of any other."""
    layers = quantised_layers(model)
    if not layers:
        return None
    held, full = held_bytes(model)
    forms = " and ".join(sorted({str(layer.form).removeprefix("torch.") for layer in layers.values()}))
    return (
        f"the weights of {counted(len(layers), 'layer')} stay in {forms}: the transformer takes "
        f"{held / 2**30:.2f} GiB of memory instead of {full / 2**30:.2f}"
    )


def largest_product(model: nn.Module) -> int:
    """Bytes that multiplying out the largest weight of 8 bits takes: in float32, and in the dtype computed in."""
    sizes = (x.weight.numel() * (4 + x.compute_dtype.itemsize) for x in quantised_layers(model).values())
    return max(sizes, default=0)
