"""Weights of int8 and fp8 with their scales, in every public spelling of the two, and their product.

    weight                      fp8 without a scale                 Kijai's and Comfy's e4m3fn and e5m2
    weight, scale_weight        fp8, one scale a tensor             Comfy's and Kijai's scaled fp8, marked `scaled_fp8`
    weight, weight_scale        fp8 or int8, a tensor or a row      Comfy's (`comfy_quant` says which), lightx2v's
    weight, weight_scale_inv    the same, a block of 128 x 128      TurboDiffusion's int8 in diffusers' names
    int8_weight, scale          int8, a block of 128 x 128          TurboDiffusion

`scale_input` and `input_scale` are for multiplying in 8 bits, which is not done here.
Source: github.com/comfyanonymous/ComfyUI, QUANTIZATION.md; github.com/ModelTC/LightX2V, tools/convert.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from slagen.formats.bounds import is_finite
from slagen.io.documents import parse_json
from slagen.io.forms import Fault

QUANT_BLOCK = 128  # rows and columns that share a scale in TurboDiffusion's int8
SCALES = ("scale_weight", "weight_scale", "weight_scale_inv", "scale")
LEFT_OUT = ("scale_input", "input_scale", "comfy_quant")  # of a weight
MARK = "scaled_fp8"  # of a file
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
FORMATS = ("float8_e4m3fn", "float8_e5m2", "int8_tensorwise", "int8_rowwise", "int8_blockwise")
_READ = (
    "slagen reads GGUF, and fp8 and int8 with one scale per tensor, row or block. Give a file of one of these "
    "kinds, or the model's bf16 weights."
)
NOT_READ = {
    "packed": f"is quantised in an unsupported form. {_READ}",
    "quanto": f"is quantised with optimum-quanto, which is not supported. {_READ}",
    "torchao": f"is quantised with torchao, which is not supported. {_READ}",
    "zero-point": f"is quantised with zero points, which are not supported. {_READ}",
}
_OF_TOOLS = (  # what no other form has among its names
    ("quanto", re.compile(r"\.weight\._(data|scale|shift)$|\.weight_qtype$")),
    ("torchao", re.compile(r"[._]_?weight_qdata$|\.weight_(qdata|tensor_impl)\b|\._weight_(scale|zero_point)$")),
    ("zero-point", re.compile(r"\.(weight_)?zero_points?$|\.qzeros$")),
    ("packed", re.compile(
        r"\.(weight_scale_2|weight_global_scale|weight_packed|qweight|absmax|SCB|quant_map|pre_quant_scale|"
        r"weight_s_rel|weight_scalar|weight_scales|W_q)$|\.quant_state\."
    )),
)  # fmt: skip
_PACKED_KINDS = ("uint8", "U8", "F4", "F8_E8M0", "float8_e8m0fnu", "float4_e2m1fn_x2")


@dataclass(frozen=True)
class Codes:
    """A weight of 8 bits, or any other that has a scale.

    Args:
        values: (out, in) int8 or fp8.
        scale: float32, by which they are multiplied: one, () ; one a row, (out, 1); one a block, (out / block,
            in / block) rounded up; None without any.
        block: rows and columns that share a scale; 0 where no blocks do.
    """

    values: Tensor
    scale: Tensor | None
    block: int = 0

    @property
    def form(self) -> str:
        """The dtype of the values, such as "int8"."""
        return str(self.values.dtype).removeprefix("torch.")

    def on_meta(self) -> Codes:
        """Its shape and dtypes, without values."""
        return Codes(self.values.to("meta"), self.scale, self.block)

    def product(self, dtype: torch.dtype) -> Tensor:
        """The weight: values x scale in float32, rounded once to `dtype`."""
        if self.scale is None or self.values.is_meta:
            return self.values.to(dtype)
        wide = self.values.to(torch.float32)
        if not self.block:
            return wide.mul_(self.scale).to(dtype)
        rows, columns = wide.shape
        by_row = self.scale.repeat_interleave(self.block, 0)[:rows]  # (out, in / block)
        if columns % self.block == 0:
            wide.unflatten(1, (-1, self.block)).mul_(by_row[..., None])
        else:
            wide.mul_(by_row.repeat_interleave(self.block, 1)[:, :columns])
        return wide.to(dtype)

    def is_finite(self, dtype: torch.dtype) -> bool:
        """Whether no number of the product is NaN or Inf."""
        if self.values.is_meta:
            return True
        if self.values.dtype == torch.float8_e4m3fn:
            broken = self.values.view(torch.uint8) & 0x7F == 0x7F
        elif self.values.dtype == torch.float8_e5m2:
            broken = self.values.view(torch.uint8) & 0x7C == 0x7C
        else:
            broken = torch.zeros(())
        if broken.any():
            return False
        largest = 128.0 if self.values.dtype == torch.int8 else torch.finfo(self.values.dtype).max
        scale = 1.0 if self.scale is None else self.scale.abs().max().item()
        return largest * scale <= torch.finfo(dtype).max or is_finite(self.product(dtype))


@dataclass
class Plain:
    """What a file's tensors are, by name, without scales and marks.

    Args:
        tensors: weights of 8 bits as `Codes`; all others are as they were.
        faults: what is wrong with them.
        turbo: whether TurboDiffusion's names are there.
    """

    tensors: dict[str, Any] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    turbo: bool = False


def beside_a_weight(name: str, names: Mapping[str, Any]) -> bool:
    """Whether a tensor belongs to a quantised weight, or marks a file of such."""
    stem, _, last = name.rpartition(".")
    own = f"{stem}.weight" in names or f"{stem}.int8_weight" in names
    return name == MARK or (own and last in (*SCALES, *LEFT_OUT))


def form_not_read(values: Mapping[str, Any]) -> str | None:
    """A name in NOT_READ where weights are of fewer than 8 bits, or share scales in a way that is not read here.

    Args:
        values: tensors, or entries of a safetensors header, by name.
    """
    for form, pattern in _OF_TOOLS:
        if any(pattern.search(name) for name in values):
            return form
    for name, value in values.items():
        kind = str(getattr(value, "dtype", "") if not isinstance(value, dict) else value.get("dtype", ""))
        if kind.removeprefix("torch.") in _PACKED_KINDS and name.endswith((".weight", *(f".{s}" for s in SCALES))):
            return "packed"
        if name.endswith(".comfy_quant") and isinstance(value, Tensor) and _comfy(value).get("format") not in FORMATS:
            return "packed"
    return None


def with_scales(values: Mapping[str, Any], shapes_only: bool = False) -> Plain:
    """Every weight of 8 bits with its scale.

    Args:
        values: tensors under names without prefixes; other values are passed on.
        shapes_only: leave the values of those weights out.
    """
    plain = Plain(turbo=any(name.endswith(".int8_weight") for name in values))
    scales: dict[str, str] = {}
    for name in values:
        stem, _, last = name.rpartition(".")
        if last in SCALES and beside_a_weight(name, values):
            whole = f"{stem}.int8_weight" if f"{stem}.int8_weight" in values else f"{stem}.weight"
            if whole in scales:
                plain.faults.append(f"{name} and {scales[whole]} both give the scale of {whole}")
            scales[whole] = name
    kinds = {x.dtype for name in scales.values() if isinstance(x := values[name], Tensor)}
    if len(kinds) > 1:
        plain.faults.append(f"the scales are {' and '.join(sorted(map(str, kinds)))}, but must have the same dtype")
    scaled_fp8 = any(isinstance(x := values[name], Tensor) and x.dtype in FP8 for name in scales) or MARK in values
    for name, value in values.items():
        if beside_a_weight(name, values):
            continue
        target = name.removesuffix("int8_weight") + "weight" if name.endswith(".int8_weight") else name
        if not isinstance(value, Tensor) or (name not in scales and value.dtype not in FP8):
            if target != name:
                plain.faults.append(f"{name.removesuffix('int8_weight')}scale is missing")
            else:
                plain.tensors[name] = value
            continue
        if target in plain.tensors:
            plain.faults.append(f"{target} appears twice")
        if name not in scales and scaled_fp8 and value.ndim == 2:
            plain.faults.append(f"{name} is {value.dtype} but has no scale, although other tensors have one")
        shown = value.to("meta") if shapes_only else value
        plain.tensors[target] = _codes(name, shown, scales.get(name), values, plain.faults)
    return plain


def _codes(name: str, value: Tensor, scale_name: str | None, values: Mapping[str, Any], faults: list[str]) -> Codes:
    if scale_name is None:
        return Codes(value, None)
    scale = values[scale_name]
    codes = _scaled(name, value, scale, values)
    if codes is None:
        kind = f"shape {tuple(scale.shape)} and {scale.dtype}" if isinstance(scale, Tensor) else type(scale).__name__
        faults.append(
            f"{name} is {value.dtype} of shape {tuple(value.shape)} with scales of {kind}, but must be int8 or fp8 "
            f"with one scale, one per row, or one per block of {QUANT_BLOCK} x {QUANT_BLOCK}"
        )
        return Codes(value, None)
    if not torch.isfinite(scale.float()).all():
        faults.append(f"{name} has scales that are NaN or Inf")
    return codes


def _scaled(name: str, value: Tensor, scale: Any, values: Mapping[str, Any]) -> Codes | None:
    """A weight with its scale; None where the scale's shape says nothing."""
    if not isinstance(scale, Tensor) or scale.dtype not in FLOATS or value.dtype not in (torch.int8, *FP8, *FLOATS):
        return None
    turbo, rows = name.endswith(".int8_weight"), value.shape[0] if value.ndim else 0
    if turbo and (value.dtype != torch.int8 or scale.dtype != torch.float32 or scale.ndim != 2):
        return None
    scale = scale.float()
    if scale.numel() == 1 and not turbo:
        return Codes(value, scale.reshape(()))
    if tuple(scale.shape) in ((rows,), (rows, 1)) and not turbo:
        return Codes(value, scale.reshape(rows, *[1] * (value.ndim - 1)))
    mark = values.get(f"{name.rpartition('.')[0]}.comfy_quant")
    block = _comfy(mark).get("group_size", QUANT_BLOCK)
    if not isinstance(block, int) or block < 1 or value.ndim != 2 or scale.ndim != 2:
        return None
    if tuple(scale.shape) != tuple(-(-size // block) for size in value.shape):
        return None
    return Codes(value, scale, block)


def _comfy(mark: Any) -> dict[str, Any]:
    """What `comfy_quant` says of a weight: JSON as bytes; {} where it is none."""
    if not isinstance(mark, Tensor) or mark.dtype != torch.uint8 or mark.numel() > 4096:
        return {}
    try:
        said = parse_json(bytes(mark.flatten().tolist()), dict)
    except Fault:
        return {}
    return {} if said.get("convrot") else said
