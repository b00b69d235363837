"""Headers of weight files: what a safetensors file lists, and files of another kind under a weight file's name."""

import re
import struct
from pathlib import Path
from typing import Any

from slagen.errors import WeightsError
from slagen.io.documents import parse_json
from slagen.io.forms import Fault, Kind, check
from slagen.io.reading import no_file, open_regular

MAX_HEADER = 32 * 2**20
_PLACE = Kind("two byte offsets in ascending order", (int, int), lambda pair: 0 <= pair[0] <= pair[1] <= 2**60)
TENSOR = {
    "dtype": str, "data_offsets": _PLACE,
    "shape": Kind("a list of at most 16 sizes", [int], lambda x: len(x) <= 16 and all(0 <= n <= 2**50 for n in x)),
}  # fmt: skip


def read_header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file: dtype, shape and place of each tensor by name, and `__metadata__`.

    Raises: WeightsError if the file is corrupt or incomplete.
    """
    try:
        with open_regular(path) as handle:
            (length,) = struct.unpack("<Q", handle.read(8))
            if length > MAX_HEADER:
                raise Fault("its header is too long")
            header = parse_json(handle.read(length), dict)
        for name, entry in header.items():
            check(entry, {str: str} if name == "__metadata__" else TENSOR, name)
        ends = (entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
        size = 8 + length + max(ends, default=0)
        if path.stat().st_size != size:
            raise Fault(f"the file has {path.stat().st_size} bytes, but its header describes {size}")
    except (OSError, struct.error, Fault) as error:
        check_content(path)
        raise WeightsError(f"{path} is corrupt or incomplete ({error}). Copy or download it again.") from error
    return header


WEIGHTS = (".safetensors", ".gguf", ".pth", ".pt", ".bin", ".ckpt", ".pkl", ".pickle")
FOREIGN = (  # what a file begins with, the suffixes that it should not have then, and what it is
    (rb"(?i)\s*version https://git-lfs", WEIGHTS, "a Git LFS pointer, not the weight file itself. Download "
     "the file: git lfs pull"),
    (rb"(?i)\s*<(!doctype|html)", WEIGHTS, "a web page, not a weight file. Download the weight file itself"),
    (rb"(?s).{4}ftyp", WEIGHTS, "a video. Give a weight file"),
    (rb"GGUF", tuple({*WEIGHTS} - {".gguf"}), "a GGUF file. Give it a name that ends in .gguf"),
    (rb"(?s).{6}\0\0\{\s*\"", WEIGHTS[1:], "a safetensors file. Give it a name that ends in .safetensors"),
    (rb"PK\x03\x04", WEIGHTS[:2], "a zip archive, as PyTorch saves checkpoints. Rename it so that it ends in .pth"),
)  # fmt: skip


def check_content(path: Path) -> None:
    """Raise WeightsError for a healthy file that only has the name of a weight file, or of one of another form.

    What cannot be read, or begins in any other way, passes.
    """
    try:
        with open_regular(path) as handle:
            start = handle.read(64)
    except OSError:
        return
    for pattern, suffixes, kind in FOREIGN:
        if path.suffix in suffixes and re.match(pattern, start):
            raise WeightsError(f"{path} is {kind}.")


def shard_of(path: Path) -> tuple[int, int] | None:
    """The number of a shard and of all shards of its model, by the file's name: (1, 2); None for any other file."""
    match = re.search(r"-(\d{5})-of-(\d{5})\.[a-z]+$", path.name)
    return (int(match[1]), int(match[2])) if match and int(match[2]) > 1 else None


def check_no_shard(path: Path) -> None:
    """Raise WeightsError for one of the files that a sharded model is spread over, or their index, by its name."""
    if path.name.endswith(".index.json"):
        raise WeightsError(f"{path} is the index of a sharded model. Give the folder that holds it: {path.parent}.")
    if (shard := shard_of(path)) is not None:
        raise WeightsError(
            f"{path} is one of {shard[1]} shards of a model. Give the folder that holds them all and their "
            f"index (*.safetensors.index.json): {path.parent}."
        )


def check_weights(path: Path, *, shard: bool = False) -> None:
    """Check a path that weights are to be read from by its name and the headers of safetensors files.

    Args:
        shard: whether one of several shards will do.
    Raises: MissingPath where nothing lies there, WeightsError for one of several shards and for a corrupt file.
    """
    if not path.exists():
        raise no_file(path, "Give a weight file or folder.")
    if path.is_file():
        if not (shard and shard_of(path)):
            check_no_shard(path)
        if path.suffix == ".safetensors":
            read_header(path)


def read_strings(path: Path, text: str, form: Any) -> Any:
    """JSON that a weight file's metadata hold. Raises WeightsError."""
    try:
        return parse_json(text, form)
    except Fault as fault:
        raise WeightsError(
            f"{path} has metadata that slagen cannot read ({fault}). Copy or download it again."
        ) from fault
