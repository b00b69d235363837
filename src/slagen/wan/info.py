"""`slagen info`: what a weight file or a model's folder holds, as numbers and words."""

from collections import Counter
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from slagen.attention.learned import SLA_NAME, matrix_norms
from slagen.attention.sla.config import SLAConfig
from slagen.errors import WeightsError
from slagen.formats.checkpoint import Checkpoint
from slagen.formats.headers import read_header, shard_of
from slagen.formats.held import held, transformer_files
from slagen.formats.kinds import REFUSALS, TRANSFORMERS, identify
from slagen.formats.lora import read_lora
from slagen.formats.model_files import SLA_FILE
from slagen.formats.names import transformers
from slagen.formats.peek import lacks_settings, peek
from slagen.formats.side_file import SideFile
from slagen.formats.sla import read_metadata
from slagen.formats.tensor_files import gguf_kinds, read_tensors
from slagen.formats.transformer import read_checkpoint
from slagen.io.paths import user_path
from slagen.settings import to_fields
from slagen.wan.folder import describe_folder

FLOAT_KINDS = {"float64", "float32", "float16", "bfloat16", "F64", "F32", "F16", "BF16"}
LEFT_OUT = (
    "trained_with",
    "layer_sparsities",
    "notes",
    "sla_file",
    "proj_l_norms",
    "parameter_norms",
    "attention",
    "trained_sizes",
    "vocabulary",
    "example_prompt",
    "memory_gib",
)  # of the JSON, where there is none


@dataclass(frozen=True)
class Info:
    """What a file or folder is: a transformer, a pipeline, SLA weights or something else, in `kind`."""

    path: str
    kind: str

    def to_dict(self) -> dict[str, Any]:
        """What --json prints."""
        return {
            name: value.to_dict() if isinstance(value, Info) else to_fields(value) if is_dataclass(value) else value
            for name, value in vars(self).items()
            if value is not None or name not in LEFT_OUT
        }


@dataclass(frozen=True)
class FileInfo(Info):
    """A weight file or a transformer's folder: how many tensors and numbers, and tensors by dtype."""

    tensors: int
    parameters: int
    dtypes: dict[str, int]


@dataclass(frozen=True)
class RefusedInfo(FileInfo):
    """A file that slagen does not take. meaning: what it is, and what to give instead."""

    meaning: str


@dataclass(frozen=True)
class LoraInfo(FileInfo):
    """A LoRA. meaning: how it is used. changed: how many layers it changes. width: of the transformer that it is for,
    None where its layers do not say. ranks: least and most. unmatched: tensors that change no layer."""

    meaning: str
    changed: int
    width: int | None
    ranks: list[int]
    unmatched: list[str]


@dataclass(frozen=True)
class PartsInfo(FileInfo):
    """Several transformers in one file, by name."""

    parts: list[str]


@dataclass(frozen=True)
class ShardInfo(FileInfo):
    """One of the shards of a model. kind: of the tensors in it. meaning: what to do with it."""

    shard: int
    shards: int
    meaning: str


@dataclass(frozen=True)
class SideFileInfo(FileInfo):
    """One `proj_l` that all layers share, and its norm."""

    trained_with: SLAConfig
    proj_l_norms: list[float]
    trained: bool


@dataclass(frozen=True)
class SLAInfo(FileInfo):
    """Attention weights that slagen wrote.

    Args:
        trained_with: the config of the method that `metadata` names; of SLA where they name none.
        layers: that learned something of their own. proj_l_norms: of SLA, by layer. parameter_norms: of another method,
            by parameter group and layer.
    """

    base_model: str
    trained_with: Any
    metadata: dict[str, Any]
    layers: int
    proj_l_norms: list[float] | None
    trained: bool
    parameter_norms: dict[str, list[float]] | None = None


@dataclass(frozen=True)
class TransformerInfo(FileInfo):
    """A Wan transformer.

    Args:
        layout: whose names its tensors have. width: of a hidden state. sampler: that its weights are for.
        sla: whether it holds SLA weights; proj_l_norms are theirs, by layer. faults: what keeps it from being loaded.
        trained_with: the settings of its attention weights, if it records them. layer_sparsities: as in SLAMetadata.
        sla_file: the one beside it.
        memory_gib: what weights of 8 bits take, which stay so in memory, and what they would in bf16; None for others.
        attention: the method of its attention weights, where that is not SLA. parameter_norms: of what that learned, by
            parameter group and layer.
    """

    layout: str
    layers: int
    width: int
    quantised: bool
    sampler: str
    sla: bool
    proj_l_norms: list[float]
    trained: bool
    faults: list[str]
    attention: str | None = None
    trained_with: Any = None
    layer_sparsities: tuple[float, ...] | None = None
    parameter_norms: dict[str, list[float]] | None = None
    notes: list[str] | None = None
    sla_file: Info | None = None
    memory_gib: dict[str, float] | None = None


@dataclass(frozen=True)
class PipelineInfo(Info):
    """A model's folder: the sizes of its transformer, as in ModelShape, and what it holds.

    Args:
        trained_sizes, vocabulary, example_prompt: what a model of few sizes and words knows, from its `slagen.json`.
    """

    num_layers: int
    num_heads: int
    head_dim: int
    ffn_dim: int
    text_tokens: int
    transformer: Info
    sla_file: Info | None = None
    trained_sizes: list[str] | None = None
    vocabulary: list[str] | None = None
    example_prompt: str | None = None


def info(path_text: str) -> Info:
    """Say what a weight file or folder is: its form, sizes and dtypes, and the norm of every layer's `proj_l`.

    Raises: WeightsError if it is broken, or nothing that slagen knows.
    """
    path = user_path(path_text)
    if path.is_dir() and (path / "model_index.json").is_file():
        return _describe_pipeline(path)
    if path.is_dir() and not (path / "transformer").is_dir() and (path / SLA_FILE).is_file():
        path = path / SLA_FILE
    content = read_tensors(path, shard=True)
    kind = identify(content)
    if path.suffix == ".safetensors" and "slagen" in read_header(path).get("__metadata__", {}):
        kind = "sla"  # which may hold every tensor of a transformer, and low-rank changes
    tensors = {name: x for name, x in content.items() if isinstance(x, Tensor)}
    dtypes = [str(x.dtype).removeprefix("torch.") for x in tensors.values()]
    dtypes = gguf_kinds(path) if path.suffix == ".gguf" else dtypes
    file = FileInfo(str(path), kind, len(tensors), sum(x.numel() for x in tensors.values()), dict(Counter(dtypes)))
    if (shard := shard_of(path)) is not None:
        meaning = f"this is shard {shard[0]} of {shard[1]} of a model; to use it, give the folder with all shards"
        return ShardInfo(**vars(file), shard=shard[0], shards=shard[1], meaning=f"{meaning}: {path.parent}")
    if kind == "sla":
        return _describe_sla(file, path, tensors)
    if kind == "side-file":
        side = read_checkpoint(path)
        assert isinstance(side, SideFile)
        norms = [side.weight.norm().item()]
        return SideFileInfo(**vars(file), trained_with=side.config, proj_l_norms=norms, trained=norms[0] > 0)
    if kind in ("lora", "difference"):
        return _describe_lora(file, path)
    if kind not in TRANSFORMERS:
        return RefusedInfo(**vars(file), meaning=f"this {REFUSALS[kind]}")
    parts = list(transformers(content))
    if len(parts) > 1:
        return PartsInfo(**vars(file), parts=parts)
    return _describe_transformer(file, path, not FLOAT_KINDS.issuperset(dtypes))


def _describe_transformer(file: FileInfo, path: Path, quantised: bool) -> TransformerInfo:
    checkpoint, found = read_checkpoint(path, shapes_only=True), peek(path)
    assert isinstance(checkpoint, Checkpoint)
    norms, others = _norms(checkpoint.projections)
    image = ["it generates videos from an image; use it with an image-to-video model and --image"]
    notes = [*(image if found.kind == "image-to-video" else []), *found.notes]
    notes += [f"this {lacks_settings(found.method)}"] if found.lacks_settings else []
    if found.few_steps:
        notes.append(
            f"its name or metadata contain {found.few_steps!r}, so it may be distilled to few steps without guidance"
        )
    return TransformerInfo(
        **vars(file), layout=checkpoint.layout, layers=checkpoint.num_layers, width=checkpoint.width,
        quantised=quantised, sampler=found.sampler or "unipc", sla=bool(norms), proj_l_norms=norms,
        trained=_all_trained(norms, others, found.layer_sparsities), faults=checkpoint.faults,
        trained_with=found.trained_with, layer_sparsities=found.layer_sparsities,
        attention=None if found.method == SLA_NAME else found.method,
        notes=notes or None, parameter_norms=others or None, sla_file=_beside(path), memory_gib=_memory(path),
    )  # fmt: skip


def _memory(path: Path) -> dict[str, float] | None:
    found = held(transformer_files(path), 2)
    if not found.in_8_bits:
        return None
    return {"held": round(found.held / 2**30, 3), "bf16": round(found.full(2).held / 2**30, 3)}


def _describe_lora(file: FileInfo, path: Path) -> FileInfo:
    try:
        lora = read_lora(path)
    except WeightsError as error:
        return RefusedInfo(**vars(file), meaning=str(error).removeprefix(f"{path} "))
    ranks = sorted({lora.shapes[roles["down"]][0] for roles in lora.layers.values() if "down" in roles})
    return LoraInfo(
        **vars(file), meaning="a LoRA for Wan2.1; use it with --lora FILE:SCALE", changed=len(lora.layers),
        width=lora.width, ranks=ranks[:1] + ranks[1:][-1:], unmatched=list(lora.unmatched),
    )  # fmt: skip


def _describe_pipeline(folder: Path) -> PipelineInfo:
    source, transformer = describe_folder(folder, folder.resolve().name), info(str(folder / "transformer"))
    sizes, words = source.defaults.trained_sizes, source.defaults.vocabulary
    return PipelineInfo(
        str(folder), "pipeline", **vars(source.shape), transformer=transformer, sla_file=_beside(folder),
        trained_sizes=None if sizes is None else list(map(str, sizes)),
        vocabulary=None if words is None else list(words),
        example_prompt=None if words is None else source.defaults.example_prompt,
    )  # fmt: skip


def _beside(folder: Path) -> Info | None:
    """The SLA weights in a folder."""
    return info(str(folder / SLA_FILE)) if (folder / SLA_FILE).is_file() else None


def _describe_sla(file: FileInfo, path: Path, tensors: dict[str, Tensor]) -> SLAInfo:
    metadata = read_metadata(path)
    norms, others = _norms(tensors)
    of_sla, layers = metadata.method == SLA_NAME, metadata.layer_sparsities
    left_out = {"config", "tensors"} | ({"tensors_hash"} if metadata.tensors is None else set())
    left_out |= {"method"} if of_sla else set()
    left_out |= {"layer_sparsities"} if layers is None else set()
    about = {name: value for name, value in vars(metadata).items() if name not in left_out}
    return SLAInfo(
        **vars(file), base_model=about.pop("base_model"), trained_with=metadata.config, metadata=about,
        layers=max(map(len, [norms, *others.values()])), proj_l_norms=norms if of_sla else None,
        trained=_all_trained(norms, others, layers) or not (of_sla or others), parameter_norms=others or None,
    )  # fmt: skip


def _norms(tensors: dict[str, Tensor]) -> tuple[list[float], dict[str, list[float]]]:
    """The Frobenius norms of each layer's `proj_l`, in the layers' order, and of what other methods learned."""
    found = matrix_norms(tensors)
    return found.pop("proj_l", []), found


def _all_trained(norms: list[float], others: dict[str, list[float]], layers: tuple[float, ...] | None = None) -> bool:
    """Whether every layer learned something, but for those of sparsity 0, which attend to everything."""
    groups, dense = [norms, *others.values()], [x == 0 for x in layers or ()]
    every = [norm for own in groups for layer, norm in enumerate(own) if not any(dense[layer : layer + 1])]
    return bool(every) and min(every) > 0
