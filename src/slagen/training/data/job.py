"""What one preparation of a data set is given, and what it makes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from slagen.events import Event, nth
from slagen.generation.config import GenerateConfig
from slagen.generation.resolve import Weights
from slagen.training.config import DataConfig
from slagen.training.data.dataset import Clip, encoder_identity
from slagen.training.data.store import Store
from slagen.wan.folder import ModelSource


@dataclass(frozen=True)
class Job:
    """One preparation of a data set.

    Args:
        config: which clips, and in what form. base: model, device and dtype. weights: where the model's weights lie.
        store: for the tensors. cache: a folder with the hashes of files.
        seed: which clips are held out, and with what noise the dense model generates its own.
        emit: is called with each event.
    """

    config: DataConfig
    base: GenerateConfig
    weights: Weights
    store: Store
    cache: Path
    seed: int
    emit: Callable[[Event], None]

    @property
    def source(self) -> ModelSource:
        """The model whose VAE and text encoder are used."""
        return self.weights.source

    def encoder_identity(self) -> str:
        """A hash of that VAE and text encoder."""
        return encoder_identity(self.source, self.cache)


def clip_event(verb: str, noun: str, index: int, total: int, name: str) -> Event:
    """One of several clips begins: index from 0."""
    text = f"{verb} {noun} {index + 1} of {total}: {name}"
    return Event("clip", text, num_steps=total, done=index, about=nth(noun, index + 1, total, name))


@dataclass(frozen=True)
class Made:
    """A prepared set: its clips, the name of the negative prompt's tensor, and frames per second."""

    clips: list[Clip]
    negative: str
    fps: int
