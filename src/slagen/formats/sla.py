"""The weight files that slagen writes (`sla.safetensors`), of SLA or another attention method, with their metadata."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from slagen.attention.learned import SLA_NAME, check_known, read_config
from slagen.attention.registry import parameter_group
from slagen.attention.schedule_file import LAYERS
from slagen.errors import SlagenError, UsageError, WeightsError
from slagen.formats.headers import read_strings
from slagen.formats.model_files import SLA_FILE
from slagen.formats.quantised_linear import plain_tensors
from slagen.formats.sla_settings import layers_of
from slagen.formats.tensor_files import PICKLE_SUFFIXES
from slagen.io.files import writing
from slagen.io.forms import one_of, sha256
from slagen.io.paths import check_utf8
from slagen.io.reading import no_file
from slagen.io.text import quote
from slagen.settings import to_fields

FORMAT_VERSION = 2
UNLISTED = 1  # the version that does not list its tensors
FORM = {
    "format_version": int, "config": dict, "base_model": str, "base_hash": str, "trained": str, "steps": int,
    "sampler_family?": one_of("flow", "rcm"), "source_hash?": str, "method?": str,
    "layer_sparsities?": LAYERS,
}  # fmt: skip
LIST = {"tensors": [str], "tensors_hash": sha256()}


@dataclass(frozen=True)
class SLAMetadata:
    """What a weight file of slagen's says of itself.

    Args:
        config: the settings the weights were trained with: an SLAConfig, or that of another `method`.
        base_model: name of the model they were trained from, for messages.
        base_hash: `weights_hash` of that model's transformer.
        trained: what was trained, such as "all" or "proj_l"; of one of SLA's branches alone with its name behind it.
        steps: optimiser steps.
        sampler_family: the sampler the weights are made for: "flow" for UniPC, Euler or DPM-Solver++, or "rcm".
        source_hash: SHA-256 of the file that they were converted from; empty where slagen trained them.
        method: the attention method that they are of. Files of SLA, and of its branches, do not name it.
        layer_sparsities: the sparsity of each layer in training, where there was not one for all; the config then has
            their mean.
        tensors: names of all tensors in the file; None in files of version 1, which do not list them.
        tensors_hash: `tensors_hash` of them.
    """

    config: Any
    base_model: str
    base_hash: str
    trained: str
    steps: int
    sampler_family: str = "flow"
    source_hash: str = ""
    method: str = SLA_NAME
    layer_sparsities: tuple[float, ...] | None = None
    format_version: int = FORMAT_VERSION
    tensors: tuple[str, ...] | None = field(default=None, compare=False)
    tensors_hash: str = field(default="", compare=False)

    def to_strings(self) -> dict[str, str]:
        """The safetensors metadata that holds it."""
        fields = dict(self.__dict__, config=to_fields(self.config))
        if self.method == SLA_NAME:
            del fields["method"]  # as files have always been, so that any slagen reads them
        if self.layer_sparsities is None:
            del fields["layer_sparsities"]
        return {"slagen": json.dumps(fields, sort_keys=True)}

    @classmethod
    def from_strings(cls, metadata: dict[str, str] | None, path: Path) -> SLAMetadata:
        """Read it back. Raises WeightsError if it is missing, newer, or does not hold what it must."""
        text = (metadata or {}).get("slagen")
        if text is None:
            raise WeightsError(
                f"{path} has no slagen metadata, so its block sizes and linear domain are unknown. "
                f"Give an {SLA_FILE} that slagen wrote."
            )
        fields = read_strings(path, text, {"format_version": int})
        version = fields["format_version"]
        if version not in (UNLISTED, FORMAT_VERSION):
            raise WeightsError(
                f"{path} has format version {version}, but this version of slagen reads only up to {FORMAT_VERSION}. "
                "Upgrade slagen."
            )
        read_strings(path, text, FORM if version == UNLISTED else FORM | LIST)
        names = fields.pop("tensors", None)
        method = fields.get("method", SLA_NAME)
        check_known(path, method)
        if unknown := sorted(fields.keys() - cls.__dataclass_fields__.keys()):
            raise WeightsError(
                f"{path} has metadata with the unknown key {quote(unknown[0])}. A newer slagen may have written it: "
                "upgrade slagen, or copy or download the file again."
            )
        try:
            about = {"config": read_config(method, fields["config"]), "layer_sparsities": layers_of(fields)}
            return cls(**dict(fields, **about, tensors=None if version == UNLISTED else tuple(names)))
        except UsageError as error:
            fault = str(error).removesuffix(".")
            raise WeightsError(
                f"{path} has metadata that slagen cannot read ({fault}). Copy or download it again."
            ) from error


def tensors_hash(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of tensors as they are stored: name, dtype, shape and bytes. It runs on all threads."""

    def digest(name: str) -> bytes:
        tensor = tensors[name].contiguous()
        about = f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode()
        return hashlib.sha256(about + hashlib.sha256(tensor.flatten().view(torch.uint8).numpy().data).digest()).digest()

    with ThreadPoolExecutor() as pool:
        return hashlib.sha256(b"".join(pool.map(digest, sorted(tensors)))).hexdigest()


def with_contents(metadata: SLAMetadata, tensors: dict[str, Tensor]) -> SLAMetadata:
    """The metadata of a file with these tensors, on the CPU."""
    return dataclasses.replace(
        metadata, format_version=FORMAT_VERSION, tensors=tuple(sorted(tensors)), tensors_hash=tensors_hash(tensors)
    )


def check_contents(metadata: SLAMetadata, tensors: dict[str, Tensor], path: Path) -> None:
    """Raises WeightsError unless a file holds exactly the tensors that it was written with; version 1 lists none."""
    if metadata.tensors is None:
        return
    listed = set(metadata.tensors)
    missing, extra = sorted(listed - tensors.keys()), sorted(tensors.keys() - listed)
    if missing or extra:
        what = f"lacks {missing[0]}" if missing else f"contains {extra[0]}, which is unexpected"
        more = f", and {len(missing) + len(extra) - 1} more tensors differ" if len(missing) + len(extra) > 1 else ""
        raise WeightsError(f"{path} has changed since it was written: it {what}{more}. Copy or download it again.")
    if tensors_hash(tensors) != metadata.tensors_hash:
        raise WeightsError(
            f"{path} has changed since it was written: the hash of its tensors differs. Copy or download it again."
        )


def gaps(tensors: dict[str, Tensor], state: dict[str, Tensor]) -> list[str]:
    """What a file of version 1 seems to lack of a model: what most other blocks have in it, or, of a whole model, all.

    Args:
        tensors: of the file. state: of the model with SLA in it.
    """
    blocks: dict[str, list[str]] = {}
    for name in state:
        blocks.setdefault(re.sub(r"^blocks\.\d+\.", "", name), []).append(name)
    usual = [names for names in blocks.values() if 2 * sum(name in tensors for name in names) > len(names)]
    whole = sum(name in tensors for name in state) > 0.9 * len(state)
    wanted = state if whole else [name for names in usual for name in names]
    return [name for name in wanted if name not in tensors]


def weights_hash(transformer: nn.Module) -> str:
    """SHA-256 of a transformer's tensors by name, rounded to bfloat16 so that the load dtype does not matter."""
    return _hash(plain_tensors(transformer))


def state_hash(state: dict[str, Tensor]) -> str:
    """`weights_hash` of a transformer with these tensors by name."""
    return _hash(sorted(state.items()))


def _hash(tensors: Iterable[tuple[str, Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tuple(tensor.shape)};".encode())
        digest.update(tensor.detach().to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def find_sla_file(path: Path) -> Path:
    """The SLA file that a path names: itself, or `sla.safetensors` in a folder. Raises WeightsError."""
    if path.is_dir():
        path = path / SLA_FILE
        if not path.is_file():
            raise WeightsError(f"{path.parent} holds no {SLA_FILE}. Give the file, or a folder with it.")
    if not path.is_file():
        raise no_file(path, f"Give an {SLA_FILE}, or a folder with one.")
    if path.suffix in PICKLE_SUFFIXES:
        raise WeightsError(f"{path} is a pickle, which can run code when it is loaded. Give an {SLA_FILE} instead.")
    return path


def read_metadata(path: str | Path) -> SLAMetadata:
    """What an SLA file, or the one in a folder, says of itself; its tensors are not read. Raises as `read_sla`."""
    return _read(path, with_tensors=False)[0]


def read_sla(path: str | Path) -> tuple[SLAMetadata, dict[str, Tensor]]:
    """Read an SLA file or the one in a folder. Raises WeightsError if it is missing, broken or no SLA file."""
    return _read(path, with_tensors=True)


def _read(path: str | Path, with_tensors: bool) -> tuple[SLAMetadata, dict[str, Tensor]]:
    file = find_sla_file(Path(path))
    check_utf8(file)
    try:
        with safe_open(file, framework="pt") as handle:
            metadata = SLAMetadata.from_strings(handle.metadata(), file)
            names = handle.keys() if with_tensors else []
            tensors = {name: handle.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{file} is corrupt or incomplete ({error}). Copy or download it again.") from error
    if with_tensors:
        check_contents(metadata, tensors, file)
    return metadata, tensors


def write_sla(tensors: dict[str, Tensor], file: Path, metadata: SLAMetadata | None) -> None:
    """Write a weight file, whole or not at all: what the attention learned (of SLA every `proj_l`), and what else was
    trained, by the model's names.

    A low-rank change of `X.weight` is `X.lora_A.weight` (rank, in) and `X.lora_B.weight` (out, rank), to be added as
    B A, to the file's own `X.weight` where it has one. Without metadata it is a plain transformer file. Raises
    SlagenError where the disk does not take it.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        with writing(file) as part:
            save_file(kept, part, metadata=None if metadata is None else with_contents(metadata, kept).to_strings())
    except (OSError, SafetensorError) as error:
        raise SlagenError(f"{file} could not be written ({error}). Free some space, or give another folder.") from error


def trained_tensors(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """Trained parameters as a file keeps them: the attention's own in float32, the rest in float16, by plain names."""
    return {plain_name(name): x.float() if is_projection(name) else x.half() for name, x in named.items()}


def plain_name(name: str) -> str:
    """A parameter's name in the model's files, of the one that it has beside low-rank changes."""
    for old, new in ((".base_layer.", "."), (".lora_A.default.", ".lora_A."), (".lora_B.default.", ".lora_B.")):
        name = name.replace(old, new)
    return name


def is_projection(name: str) -> bool:
    """Whether a parameter was learned by an attention method, such as `proj_l` of SLA; others are the model's own."""
    return parameter_group(name) is not None
