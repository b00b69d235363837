"""Weights of 8 bits back as the floating-point numbers that they stand for."""

from __future__ import annotations

import torch
from torch import Tensor

QUANT_BLOCK = 128  # rows and columns that share a scale in TurboDiffusion's int8


def dequantise(name: str, codes: Tensor, scale: Tensor, dtype: torch.dtype, faults: list[str]) -> Tensor:
    """TurboDiffusion's int8: w[i, j] = codes[i, j] * scale[i // 128, j // 128]."""
    blocks = tuple(-(-size // QUANT_BLOCK) for size in codes.shape)
    if codes.dtype != torch.int8 or scale.dtype != torch.float32 or codes.ndim != 2 or tuple(scale.shape) != blocks:
        faults.append(
            f"{name} is {codes.dtype} {tuple(codes.shape)} with scales {scale.dtype} {tuple(scale.shape)}, but must be "
            f"int8 with a float32 scale for each {QUANT_BLOCK} x {QUANT_BLOCK}"
        )
        return codes.to(dtype)
    if not torch.isfinite(scale).all():
        faults.append(f"{name} has scales that are not finite numbers")
    wide = scale.repeat_interleave(QUANT_BLOCK, 0)[: codes.shape[0]].repeat_interleave(QUANT_BLOCK, 1)
    return (codes.float() * wide[:, : codes.shape[1]]).to(dtype)
