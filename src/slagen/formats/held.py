"""How many bytes a transformer's weights take in memory, by the headers of their files. No torch, for `slagen plan`."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slagen.errors import WeightsError
from slagen.formats.folders import component_files, transformer_folder
from slagen.formats.headers import read_header
from slagen.formats.layouts import LAYOUTS, LINEARS_OF_A_BLOCK, leading

ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
EIGHT_BITS = ("I8", "F8_E4M3", "F8_E5M2")
IN_PICKLES = (b"CharStorage", b"int8_weight", b"float8_e4m3fn", b"float8_e5m2")  # where weights are of 8 bits
MAX_PICKLE = 2**26  # bytes of a zip archive's data.pkl, which lists its tensors


@dataclass(frozen=True)
class Held:
    """Bytes of weights in memory.

    Args:
        held: of all. fresh: of them, what is no copy of a file, and so cannot be dropped and read again.
        in_8_bits: numbers that stay in int8 or fp8.
    """

    held: int = 0
    fresh: int = 0
    in_8_bits: int = 0

    def full(self, item_bytes: int) -> Held:
        """The same with those of 8 bits multiplied out."""
        return Held(self.held + (item_bytes - 1) * self.in_8_bits, self.fresh + item_bytes * self.in_8_bits)


def held(files: Iterable[Path], item_bytes: int) -> Held:
    """What the weights in files take: safetensors by their headers, others by their size; of a corrupt one nothing.

    Args:
        item_bytes: of a number as it is computed with.
    """
    each = [_held(file, item_bytes) for file in files]
    return Held(sum(one.held for one in each), sum(one.fresh for one in each), sum(one.in_8_bits for one in each))


def _held(file: Path, item_bytes: int) -> Held:
    if not file.is_file():
        return Held()
    if file.suffix != ".safetensors":
        size = file.stat().st_size
        return Held(size, 0, size if any(word in _listing(file) for word in IN_PICKLES) else 0)
    try:
        header = read_header(file)
    except WeightsError:
        return Held()  # said better when it is loaded
    whole = fresh = in_8_bits = 0
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        number, dtype = math.prod(entry["shape"]), entry["dtype"]
        if dtype in EIGHT_BITS and _stays(name):
            whole, in_8_bits = whole + number, in_8_bits + number
        elif dtype in ITEM_BYTES or dtype in EIGHT_BITS:
            whole += number * item_bytes
            fresh += number * item_bytes if ITEM_BYTES.get(dtype) != item_bytes else 0
        else:
            whole += number
    return Held(whole, fresh, in_8_bits)


def _stays(name: str) -> bool:
    """Whether a weight of 8 bits stays so in memory, by its name in the file."""
    plain = name.removeprefix(leading(name) or "").replace(".int8_weight", ".weight")
    return any(LINEARS_OF_A_BLOCK.fullmatch(layout.rename(plain) or "") for layout in LAYOUTS.values())


def transformer_files(path: Path) -> list[Path]:
    """The files of a transformer that a path names: of a folder its shards, or the file itself; empty where it surely
    holds none, such as a file of attention weights alone."""
    if path.is_dir():
        try:
            return component_files(transformer_folder(path))
        except WeightsError:
            return []
    if path.suffix == ".safetensors":
        try:
            header: dict[str, Any] = read_header(path)
        except (WeightsError, OSError):
            return []
        own = "slagen" in header.get("__metadata__", {})
        return [] if own or not any("patch_embedding" in name for name in header) else [path]
    return [path] if path.suffix == ".gguf" or b"patch_embedding" in _listing(path) else []


def _listing(file: Path) -> bytes:
    """What lists the tensors of a zip archive of PyTorch's; nothing of any other file."""
    try:
        with zipfile.ZipFile(file) as archive:
            entry = next((entry for entry in archive.infolist() if entry.filename.endswith("/data.pkl")), None)
            return b"" if entry is None or entry.file_size > MAX_PICKLE else archive.read(entry)
    except (OSError, zipfile.BadZipFile, ValueError, RuntimeError, NotImplementedError):
        return b""
