"""A prepared data set: the latents and text embeddings of its clips, encoded once and stored in shards.

A prepared folder holds shards of tensors, `tensors.jsonl`, which says where each is and what it must hash to, and
`dataset.json`, written last, which lists the clips and says what encoded them. Tensors are named by a hash of
all that they were made from, so that preparing again makes what is missing or changed and nothing else; `decoded.txt`
lists those whose videos could be decoded, before the first is encoded.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from slagen.errors import WeightsError
from slagen.formats import folders
from slagen.generation.embeddings import component_files, file_hashes
from slagen.io import forms
from slagen.io.documents import parse_json, read_bytes
from slagen.io.forms import Fault, Kind, check
from slagen.io.reading import digest
from slagen.io.text import counted
from slagen.training.data.store import AGAIN, INDEX_FILE, SET_FILE, SHAPE, Store
from slagen.training.metrics import Example
from slagen.wan.folder import ModelSource

VERSION = 1


MAX_SET = 256 * 2**20
SET = {
    "identity": str, "negative": str, "negative_prompt": str, "fps": forms.whole(1, 240),
    "clips": [{"latents": str, "text": str, "caption": str, "held_out": bool,
               "shape": Kind("four sizes", SHAPE, lambda shape: len(shape) == 4)}],
}  # fmt: skip


@dataclass(frozen=True)
class Clip:
    """One clip of a prepared set: names of its tensors, and the shape of its latents (C, T, h, w)."""

    latents: str
    text: str
    caption: str
    shape: tuple[int, ...]
    held_out: bool


class Dataset:
    """A prepared set.

    Args:
        folder: written by `prepare`.
    Raises: WeightsError where it is incomplete.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.store = folder, Store(folder)
        try:
            content = parse_json(read_bytes(folder / SET_FILE, MAX_SET), {"version": int})
            if content["version"] != VERSION:
                raise WeightsError(
                    f"{folder} is a data set in format {content['version']}, but this version of slagen reads format "
                    f"{VERSION}. {AGAIN}"
                )
            check(content, SET)
        except (OSError, Fault) as error:
            raise WeightsError(f"{folder} is not a valid data set ({SET_FILE}: {error}). {AGAIN}") from error
        self.identity: str = content["identity"]
        self.negative: str = content["negative"]
        self.negative_prompt: str = content["negative_prompt"]
        self.fps: int = content["fps"]
        clips = [
            Clip(c["latents"], c["text"], c["caption"], tuple(c["shape"]), c["held_out"]) for c in content["clips"]
        ]
        names = {name for clip in clips for name in (clip.latents, clip.text)} | {self.negative}
        lost = sum(name not in self.store for name in names)
        if lost:
            raise WeightsError(f"{folder} lacks {lost} of its {len(names)} tensors. {AGAIN}")
        self.training = [clip for clip in clips if not clip.held_out]
        self.held_out = [clip for clip in clips if clip.held_out]
        if not self.training or not self.held_out:
            raise WeightsError(
                f"{folder} has {counted(len(self.training), 'training clip')} and "
                f"{counted(len(self.held_out), 'held-out clip')}, but needs at least one of each. {AGAIN}"
            )
        self.hash = digest([self.identity, self.negative, [dataclasses.astuple(clip) for clip in clips]])

    def to_dict(self) -> dict[str, Any]:
        """As `slagen finetune data --json` prints it: the folder, the hash of the set, and the numbers of clips."""
        counts = {"training": len(self.training), "held_out": len(self.held_out)}
        return {"folder": str(self.folder), "hash": self.hash, **counts}

    def example(self, clip: Clip) -> Example:
        """A clip's latents and text, both float32."""
        return Example(self.store.load(clip.latents).float(), self.store.load(clip.text).float())

    def negative_text(self) -> Tensor:
        """The text embedding of the negative prompt, (S, E) float32."""
        return self.store.load(self.negative).float()


def is_prepared(path: Path) -> bool:
    """Whether a folder is a complete set that `prepare` wrote."""
    return (path / SET_FILE).is_file() and (path / INDEX_FILE).is_file()


def encoder_identity(source: ModelSource, cache: Path) -> str:
    """A hash of everything that encodes: VAE, text encoder, tokenizer, and the maximum length of texts."""
    files = component_files(source.folder, ("vae", "text_encoder", "tokenizer"))
    return digest([file_hashes(files, cache), source.defaults.max_sequence_length])


def transformer_files(source: ModelSource) -> list[Path]:
    """The files that a model's transformer is read from."""
    path = source.weights or source.folder
    if path.is_file():
        return [path]
    return folders.component_files(path / "transformer" if (path / "transformer").is_dir() else path)


def open_dataset(folder: Path, source: ModelSource, cache: Path) -> Dataset:
    """A prepared set for a model. Raises WeightsError if it was encoded by another VAE or text encoder."""
    data = Dataset(folder)
    if data.identity != encoder_identity(source, cache):
        raise WeightsError(
            f"{folder} was encoded with a VAE or text encoder that is not {source.name}'s. Give --model the model that "
            "it was prepared for, or give --data the original videos."
        )
    if data.negative_prompt != source.defaults.negative_prompt:
        raise WeightsError(
            f"{folder} was prepared with a negative prompt that is not {source.name}'s. Prepare it again with --model "
            f"{source.name}; clips that are already encoded are kept."
        )
    return data
