"""Read weight files of every format: named tensors from safetensors, pickles, GGUF and folders."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from slagen.errors import EnvironmentProblem, WeightsError
from slagen.formats.bounds import check_pickle
from slagen.formats.folders import component_files, transformer_folder
from slagen.formats.gguf_files import read_gguf
from slagen.formats.headers import check_content, check_no_shard, shard_of
from slagen.formats.quantised import NOT_READ
from slagen.io.paths import check_utf8
from slagen.io.reading import no_file

SIDE_FILE_KEYS = {"settings", "state", "version"}  # of SimpleTuner's sla_attention.pt
PICKLE_SUFFIXES = {".pth", ".pt", ".bin", ".ckpt", ".pkl", ".pickle"}
TRAINING_STATE = ("optim", "scheduler", "lr_scheduler", "scaler", "grad_scaler", "critic", "fake_score")  # left alone
DEPTH = 8  # of dictionaries in a pickle; real ones have two or three


def read_tensors(
    path: Path, wanted: Callable[[str], bool] = lambda name: True, *, shard: bool = False
) -> dict[str, Any]:
    """All that a weight file holds, by its own names; tensors are mapped from disk where the format allows it.

    Args:
        path: .safetensors, a pickle (.pth, .pt, .bin, .ckpt; tensors and plain containers only), or a folder with one
            transformer in safetensors, sharded or not. Where a pickle has tensors in several dictionaries, their
            places in the file lead the names: "generator_ema/model.head.head.weight".
        wanted: whether to read a tensor, by its name; used for .safetensors files only.
        shard: whether to read one of several shards of a model as well.
    Raises: WeightsError if it is missing, broken, or a pickle that holds anything but tensors.
    """
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise no_file(path, "Give a weight file or folder.")
    if not (shard and shard_of(path)):
        check_no_shard(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path, wanted)
    if path.suffix == ".gguf":
        return _read_gguf(path)
    if path.suffix in PICKLE_SUFFIXES:
        return _read_pickle(path)
    raise WeightsError(
        f"{path} is not a weight file that slagen can read. Give a .safetensors, .pth or .gguf file, or "
        "a diffusers folder."
    )


def _read_safetensors(path: Path, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, Any]:
    check_utf8(path)
    try:
        with safe_open(path, framework="pt") as handle:
            return {name: handle.get_tensor(name) for name in handle.keys() if wanted(name)}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as error:
        check_content(path)
        raise WeightsError(f"{path} is corrupt or incomplete ({error}). Copy or download it again.") from error


def _read_folder(folder: Path) -> dict[str, Any]:
    return read_component(transformer_folder(folder))


def read_component(folder: Path) -> dict[str, Any]:
    """All tensors of one component of a pipeline, from all of its shards. Raises WeightsError."""
    tensors: dict[str, Any] = {}
    for file in component_files(folder):
        for name, tensor in _read_safetensors(file).items():
            if name in tensors:
                raise WeightsError(f"{folder} holds {name} in two of its shards. Download the model again.")
            tensors[name] = tensor
    return tensors


def _read_pickle(path: Path) -> dict[str, Any]:
    """Tensors only: PyTorch's restricted unpickler refuses whatever could run code, and nothing else is tried."""
    check_content(path)
    _check_no_script(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        if tool := re.search(r"\b(torchao|quanto)\.", str(error)):
            raise WeightsError(f"{path} {NOT_READ[tool[1]]}") from error
        raise WeightsError(
            f"{path} is a pickle that holds more than tensors, which could run code when loaded, so slagen does not "
            "load it. Give the weights as safetensors."
        ) from error
    except Exception as error:  # of whatever kind torch raises over a damaged file
        raise WeightsError(f"{path} is corrupt or incomplete. Copy or download it again.") from error
    check_pickle(content, path)
    if isinstance(content, dict) and set(content) == SIDE_FILE_KEYS:
        return content
    found = _dictionaries_of_tensors(content, "", path, set())
    if not found:
        raise WeightsError(f"{path} holds no named tensors. Give a file of model weights.")
    if len(found) == 1:
        return next(iter(found.values()))
    return {f"{place}{name}": value for place, inner in found.items() for name, value in inner.items()}


def _check_no_script(path: Path) -> None:
    """Raise WeightsError for a TorchScript archive, which is a program with its weights."""
    with suppress(OSError, zipfile.BadZipFile, ValueError), zipfile.ZipFile(path) as archive:
        if any(re.fullmatch(r"[^/]+/(constants\.pkl|code/.*)", name) for name in archive.namelist()):
            raise WeightsError(
                f"{path} is a TorchScript archive, which contains code, so slagen does not load it. Give the "
                "state_dict as safetensors."
            )


def _dictionaries_of_tensors(content: Any, place: str, path: Path, seen: set[int]) -> dict[str, dict[str, Any]]:
    """The dictionaries in a pickle that hold tensors, each by its place in the others, such as "generator_ema/"."""
    if not isinstance(content, dict) or id(content) in seen or not all(isinstance(name, str) for name in content):
        return {}
    seen.add(id(content))  # a pickle may hold itself
    if place.count("/") > DEPTH:
        raise WeightsError(
            f"{path} holds dictionaries nested more than {DEPTH} levels deep. Give a file of model weights."
        )
    own = dict(content)
    found: dict[str, dict[str, Any]] = {}
    for name, value in content.items():
        inner = {}
        if not name.startswith(TRAINING_STATE):
            inner = _dictionaries_of_tensors(value, f"{place}{name}/", path, seen)
        if inner:
            found |= inner
            del own[name]
    if any(isinstance(value, Tensor) for value in own.values()):
        found[place] = own
    return found


def _read_gguf(path: Path) -> dict[str, Any]:
    """Names and shapes alone, on the meta device: diffusers loads the values, and keeps them quantised."""
    return {
        entry.name: torch.empty([int(size) for size in reversed(entry.shape)], device="meta")
        for entry in _gguf_entries(path)
    }


def gguf_kinds(path: Path) -> list[str]:
    """The type of every tensor in a GGUF file, such as "Q4_0" or "F32". Raises as `read_tensors`."""
    return [entry.tensor_type.name for entry in _gguf_entries(path)]


def _gguf_entries(path: Path) -> list[Any]:
    check_content(path)
    try:
        return list(read_gguf(path).tensors)
    except ImportError as error:
        raise EnvironmentProblem(
            f"{path} is a GGUF file. To read it, install the GGUF package: pip install 'slagen[gguf]'."
        ) from error
    except Exception as error:  # of whatever kind the reader raises over a damaged file
        raise WeightsError(
            f"{path} is corrupt, incomplete or in an unsupported format ({error}). Copy or download it again."
        ) from error
