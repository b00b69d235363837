"""Which files of a folder hold a component's weights: one file, or the shards that an index lists."""

import re
from pathlib import Path

from slagen.errors import WeightsError
from slagen.formats.model_files import AGAIN, SLA_FILE
from slagen.io import documents

USUAL_NAMES = ("diffusion_pytorch_model.safetensors", "model.safetensors")


def transformer_folder(folder: Path) -> Path:
    """A pipeline's transformer folder, or the folder itself. Raises WeightsError for a pipeline that has two."""
    if (folder / "transformer_2").is_dir():
        raise WeightsError(
            f"{folder} is a Wan2.2 pipeline with two transformers, but slagen runs Wan2.1 text-to-video "
            "pipelines, which have one. Give a Wan2.1 pipeline."
        )
    return folder / "transformer" if (folder / "transformer").is_dir() else folder


def component_files(folder: Path) -> list[Path]:
    """The safetensors of one component, from its index where there is one. Raises WeightsError."""
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if not indices:
        files = [file for file in sorted(folder.glob("*.safetensors")) if file.name != SLA_FILE]
        usual = [file for file in files if file.name in USUAL_NAMES]
        if len(usual or files) == 1:  # beside the usual name may lie the same weights in another precision
            return usual or files
        what = "no .safetensors file" if not files else f"{len(files)} .safetensors files and no index"
        pickles = sorted(folder.glob("*.bin")) if not files else []
        why = f" ({pickles[0].name} is a pickle, which can run code)" if pickles else ""
        raise WeightsError(
            f"{folder} holds {what}{why}. Download the model's .safetensors file, or all shards and the index."
        )
    shards = read_shards(indices[0])
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise WeightsError(f"{folder} lacks the shard {missing[0]}. Download the model again.")
    return shards


def read_shards(index: Path) -> list[Path]:
    """The files that an `*.index.json` spreads a model over; none lies outside its folder. Raises WeightsError."""
    content = documents.read_json(index, {"weight_map": {str: str}}, advice=AGAIN)
    shards = sorted(set(content["weight_map"].values()))
    if not shards or any(re.fullmatch(r"\w[\w.-]*\.safetensors", shard) is None for shard in shards):
        raise WeightsError(f"{index} lists no shards, or shards outside its folder. {AGAIN}")
    return [index.parent / shard for shard in shards]
