"""Modules built from a config and filled with weights: without random values, without a cast after loading."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from slagen.errors import SlagenError, WeightsError
from slagen.formats.bounds import is_finite


@contextmanager
def reading_from(what: str | Path) -> Iterator[None]:
    """In here other libraries make something of a file; what they raise over its content becomes WeightsError."""
    try:
        yield
    except (SlagenError, ImportError, MemoryError, UnicodeEncodeError):
        raise  # a package is not there, or a path is none that a library takes
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # that is Rust's
            raise
        said = " ".join(str(error).split()) or type(error).__name__
        raise WeightsError(f"{what} is corrupt: {said[:300].rstrip('.')}. Download the model again.") from error


@contextmanager
def no_random_init() -> Iterator[None]:
    """Layers made in here draw no random weights, which for the meta device takes time, and torch's compiler."""
    layers: tuple[Any, ...] = (nn.Embedding, nn.Linear, _ConvNd)
    draw = [layer.reset_parameters for layer in layers]
    for layer in layers:
        layer.reset_parameters = lambda self: None
    try:
        yield
    finally:
        for layer, former in zip(layers, draw, strict=True):
            layer.reset_parameters = former


def cast_tensors(tensors: dict[str, Tensor], dtype: torch.dtype, kept: set[str], path: Path) -> dict[str, Tensor]:
    """Tensors in `dtype`, but in float32 where a part of the name is in `kept`. Raises WeightsError beyond float16."""
    cast = {name: x.to(torch.float32 if kept & set(name.split(".")) else dtype) for name, x in tensors.items()}
    for name, tensor in cast.items():
        if tensor.dtype == torch.float16 != tensors[name].dtype and not is_finite(tensor):
            raise WeightsError(f"{name} in {path} has values beyond the range of float16. Try --dtype bf16, or fp32.")
    return cast
