"""Bounds on what a weight file may hold: containers of limited depth, tensors stored in full, finite values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slagen.errors import WeightsError

MAX_DEPTH = 16  # of containers in a pickle; training states have five or so
MAX_VALUES = 1_000_000  # in all of them, one that appears twice counted twice


def check_pickle(content: Any, path: Path) -> None:
    """Raise WeightsError where containers hold each other without end, or a tensor is not plain and dense.

    A tensor of stride 0 has any number of elements in a few bytes of file, and filling them in takes all memory.
    """
    level, values = [content], 0
    for _ in range(MAX_DEPTH):
        inner: list[Any] = []
        for value in level:
            if isinstance(value, Tensor):
                _check_tensor(value, path)
            elif isinstance(value, dict):
                inner += value.values()
            elif isinstance(value, list | tuple | set):
                inner += value
            values += 1
            if values + len(inner) > MAX_VALUES:
                break
        level = inner
        if not level or values + len(level) > MAX_VALUES:
            break
    if level:
        raise WeightsError(
            f"{path} holds lists or dictionaries that contain themselves, are nested too deeply or are too large. "
            "Download it again."
        )


def _check_tensor(tensor: Tensor, path: Path) -> None:
    plain = tensor.layout == torch.strided and not tensor.is_meta and not tensor.is_quantized
    if not plain or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise WeightsError(
            f"{path} holds a tensor of shape {tuple(tensor.shape)} that is not stored contiguously and in full. "
            "Download it again."
        )


def is_finite(tensor: Tensor) -> bool:
    """Whether a floating-point tensor holds no NaN and no infinity: one pass, and no copy of it."""
    return tensor.numel() == 0 or bool(torch.stack(torch.aminmax(tensor)).isfinite().all())
