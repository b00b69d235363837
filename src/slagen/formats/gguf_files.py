"""Read GGUF files within bounds, and check their values without dequantising them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from slagen.errors import WeightsError
from slagen.formats.bounds import is_finite

MAX_ENTRIES = 200_000  # of all lists in the metadata of a GGUF file; those of the largest vocabularies stay below
# Of a block of packed numbers: its bytes, and where in it how many scales in float16 begin. The rest are whole numbers.
SCALES = {
    "Q4_0": (18, 0, 1), "Q4_1": (20, 0, 2), "Q5_0": (22, 0, 1), "Q5_1": (24, 0, 2), "Q8_0": (34, 0, 1),
    "Q2_K": (84, 80, 2), "Q3_K": (110, 108, 1), "Q4_K": (144, 0, 2), "Q5_K": (176, 0, 2), "Q6_K": (210, 208, 1),
}  # fmt: skip


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
                    raise ValueError("its metadata has lists that are nested or too long")
            return super()._get_field_parts(orig_offs, raw_type)

    return BoundedReader(path, "c")  # never written to, though PyTorch wants memory that could be


def check_values(path: Path) -> None:
    """Raise WeightsError where a tensor of a GGUF file, or a scale of a packed one, is not finite."""
    for entry in read_gguf(path).tensors:
        kind = entry.tensor_type.name
        if kind in SCALES:
            size, first, count = SCALES[kind]
            blocks = entry.data.reshape(-1, size)[:, first : first + 2 * count]
            numbers = torch.from_numpy(np.ascontiguousarray(blocks)).view(torch.float16)
        elif kind == "BF16":
            numbers = torch.from_numpy(entry.data).view(torch.bfloat16)
        else:
            numbers = torch.from_numpy(entry.data)
        if numbers.is_floating_point() and not is_finite(numbers):
            raise WeightsError(f"{entry.name} in {path} contains NaN or Inf. Copy or download it again.")
