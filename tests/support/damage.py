"""Single damages of a component's weight file, always the same ones: twelve kinds, at three places of the file each."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

PLACES = 3


def _missing(tensors: dict[str, Tensor], name: str) -> None:
    del tensors[name]


def _renamed(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name + "_copy"] = tensors.pop(name)


def _too_many(tensors: dict[str, Tensor], name: str) -> None:
    tensors["model." + name] = tensors[name].clone()


def _reshaped(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name] = tensors[name][None].contiguous()


def _shorter(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name] = tensors[name][:-1].contiguous()


def _integer(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name] = tensors[name].to(torch.int32)


def _double(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name] = tensors[name].double()


def _half(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name] = tensors[name].to(torch.bfloat16)


def _nan(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name].view(-1)[-1] = torch.nan


def _infinite(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name].view(-1)[0] = -torch.inf


CONTENTS: list[Callable[[dict[str, Tensor], str], None]] = [
    _missing, _renamed, _too_many, _reshaped, _shorter, _integer, _double, _half, _nan, _infinite,
]  # fmt: skip


def _cut(whole: bytes, place: int) -> bytes:
    return whole[: (0, len(whole) // 3, len(whole) - 1)[place]]


def _spoilt_header(whole: bytes, place: int) -> bytes:
    """Another length, a brace that is gone, or a kind of number that takes another number of bytes."""
    if place == 0:
        return bytes([whole[0] ^ 1]) + whole[1:]
    return whole.replace(b"{", b"[", 1) if place == 1 else whole.replace(b'"F32"', b'"F16"', 1)


FILES: list[Callable[[bytes, int], bytes]] = [_cut, _spoilt_header]
KINDS = [kind.__name__.lstrip("_") for kind in (*CONTENTS, *FILES)]


def damage(file: Path, kind: str, place: int) -> None:
    """Spoil a safetensors file of float32 in place.

    Args:
        kind: one of KINDS. place: which of PLACES: of the tensors in the order of their names, or of the file's bytes.
    """
    number = KINDS.index(kind)
    if number >= len(CONTENTS):
        file.write_bytes(FILES[number - len(CONTENTS)](file.read_bytes(), place))
        return
    with safe_open(file, "pt") as handle:
        metadata = handle.metadata()
    tensors = load_file(file)
    names = sorted(tensors)
    CONTENTS[number](tensors, names[(7 * number + place * len(names)) // PLACES % len(names)])
    save_file(tensors, file, metadata=metadata)
