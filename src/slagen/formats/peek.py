"""What a weight file is, from its names and metadata, without reading its tensors."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slagen.attention.learned import SLA_NAME, label, owner
from slagen.errors import WeightsError
from slagen.formats.folders import component_files, transformer_folder
from slagen.formats.headers import check_no_shard, read_header
from slagen.formats.kinds import REFUSALS, TRANSFORMERS, hints, identify
from slagen.formats.layouts import OWN_SPELLING, learned
from slagen.formats.names import other_parts
from slagen.formats.published import FASTWAN_VSA, TURBO_SLA, Sampler
from slagen.formats.side_file import read_side_file
from slagen.formats.sla_settings import read_settings
from slagen.formats.tensor_files import read_tensors
from slagen.formats.transformer import tensors_of_one


@dataclass(frozen=True)
class Found:
    """What a weight file is, without its tensors being read.

    Args:
        kind: as `identify` says it: one of TRANSFORMERS, "sla" or "side-file".
        trained_with: the config that its attention weights were trained with; None without any, or where metadata
            says it. method: that they are of.
        layer_sparsities: the sparsity of each layer in training, where there was not one for all.
        sampler: the sampler that it is distilled for; None for any flow-matching one.
        trained: what was trained, as an SLA file says it; "" where that is unknown.
        lacks_settings: it holds attention weights, and nothing says what they were trained with.
        notes: what else a user should know.
        few_steps: the word in its name or metadata that says it is distilled to few steps; "" where none does.
    """

    kind: str
    trained_with: Any = None
    method: str = SLA_NAME
    sampler: Sampler | None = None
    trained: str = ""
    lacks_settings: bool = False
    notes: tuple[str, ...] = ()
    few_steps: str = ""
    layer_sparsities: tuple[float, ...] | None = None


def lacks_settings(method: str) -> str:
    """What a message says of a path that holds attention weights without the settings they were trained with."""
    how = ": load_sla(pipe, FILE), pipe.save_pretrained(FOLDER)" if label(method) == "SLA" else ""
    return (
        f"holds {label(method)} weights that diffusers saved without the settings that they were trained with. Give "
        "the original sla.safetensors, or save the pipeline again with this version of slagen, which records the "
        f"settings in config.json{how}."
    )


def peek(path: Path, part: str | None = None) -> Found:
    """What a weight file is, by its names and metadata. Raises WeightsError if slagen cannot run it.

    Args:
        part: which transformer, where the file holds several.
    """
    metadata: dict[str, Any] = {}
    if path.suffix == ".safetensors" and path.is_file():
        check_no_shard(path)
        content: dict[str, Any] = read_header(path)
        metadata = content.pop("__metadata__", None) or {}
        if "slagen" in metadata:
            return Found("sla")  # with every tensor that was trained, which may be all of a transformer's
        content |= read_tensors(path, lambda name: name.endswith(".comfy_quant"))
    else:
        content = read_headers(path) if path.is_dir() else read_tensors(path)
    kind = identify(content)
    if kind == "side-file":
        return Found(kind, trained_with=read_side_file(path, content).config)
    if kind not in (*TRANSFORMERS, "sla"):
        raise WeightsError(f"{path} {REFUSALS[kind]}")
    values, _ = tensors_of_one(path, content, part)
    notes, few_steps = hints(path, metadata)
    left = other_parts(content)
    if left:
        notes.append(f"{path.name} also holds {', '.join(left)}; only its transformer is used")
    found = Found(kind, notes=tuple(notes), few_steps=few_steps)
    spellings = {place[1]: name for name in values if (place := learned(name))}
    if OWN_SPELLING in spellings:
        settings = read_settings(path, metadata) or {"lacks_settings": True, "method": owner(spellings[OWN_SPELLING])}
        return dataclasses.replace(found, **settings)
    if kind in TRANSFORMERS and any("to_gate_compress" in name for name in spellings.values()):
        return dataclasses.replace(found, trained_with=FASTWAN_VSA, method="vsa")
    if kind in TRANSFORMERS and spellings:
        return dataclasses.replace(found, trained_with=TURBO_SLA, sampler="rcm")
    return found


def read_headers(folder: Path) -> dict[str, Any]:
    """The tensors of a folder's transformer, as the headers of its files list them."""
    entries: dict[str, Any] = {}
    for file in component_files(transformer_folder(folder)):
        entries |= read_header(file)
    entries.pop("__metadata__", None)
    return entries
