"""What a weight file may ask for before it is believed: no counts and no tensors that its own bytes cannot hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slagen.errors import WeightsError

MAX_DEPTH = 16  # of containers in a pickle; training states have five or so
MAX_VALUES = 1_000_000  # in all of them, one that is there twice counted twice
MAX_ENTRIES = 200_000  # of all lists in the metadata of a GGUF file; those of the largest vocabularies stay below


def check_pickle(content: Any, path: Path) -> None:
    """Raise WeightsError where containers hold themselves or each other without end, or a tensor is no plain one.

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
        raise WeightsError(f"{path} holds containers in containers without end. Get it from its authors again.")


def _check_tensor(tensor: Tensor, path: Path) -> None:
    plain = tensor.layout == torch.strided and not tensor.is_meta and not tensor.is_quantized
    if not plain or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise WeightsError(
            f"{path} holds a tensor of shape {tuple(tensor.shape)} that is not stored in full, one number after the "
            "other. Get it from its authors again."
        )


def read_gguf(path: Path) -> Any:
    """A GGUFReader that believes no count in the file which the file is too short for.

    Raises: ImportError without the package, and what GGUFReader raises of a damaged file.
    """
    from gguf import GGUFReader, GGUFValueType

    class BoundedReader(GGUFReader):
        entries = 0

        def _get(self, offset: int, dtype: Any, count: Any = 1, override_order: Any = None) -> Any:
            if offset + int(count) * np.dtype(dtype).itemsize > len(self.data):
                raise ValueError("it ends too early")
            return super()._get(offset, dtype, count, override_order)

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            if raw_type == GGUFValueType.ARRAY:
                self.entries += int(self._get(orig_offs + 4, np.uint64)[0])
                if self._get(orig_offs, np.uint32)[0] == GGUFValueType.ARRAY or self.entries > MAX_ENTRIES:
                    raise ValueError("its metadata have lists in lists, or too long ones")
            return super()._get_field_parts(orig_offs, raw_type)

    return BoundedReader(path)
