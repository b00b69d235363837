"""Prompts kept on disk as the text encoder gives them: where all of a run's are known, none is loaded."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from slagen.errors import UsageError
from slagen.events import Event
from slagen.generation.config import GenerateConfig, cache_folder
from slagen.generation.embeddings import Embeddings, are_hashed
from slagen.generation.resolve import Plan
from slagen.generation.session import Session
from slagen.io.files import delete

PART = "prompts"  # the folder in the cache; those of batches are kept apart, for a batch needs all of its own
MAX_BYTES = 2**30  # of the folder; a prompt of Wan2.1 takes 4 MiB in bf16
LARGE = 2**28  # bytes of a text encoder that takes time to hash


class PromptCache:
    """The prompts of some plans of one model: those that are kept, or what the text encoder makes of them.

    Several runs may use one cache: a file is whole or not there, and what is used was read before the model is loaded.

    Args:
        use: whether this process encodes the prompts.
    Attributes: known: whether all of the plans' prompts are kept, so that no text encoder is loaded.
    """

    def __init__(self, plans: Sequence[Plan], on_event: Callable[[Event], None], *, use: bool = True) -> None:
        self.on_event = on_event
        folder = _folder(plans[0].config) if use else None
        self.store = None if folder is None else Embeddings(plans[0], folder, True, PART)
        self.known = (
            self.store is not None
            and are_hashed(self.store.files, self.store.cache)
            and all(map(self.store.read, plans))
        )
        for path in [] if self.store is None else self.store.damaged:
            on_event(Event("warning", f"{path} is damaged, so the prompt is encoded again"))
        if self.known:
            what = "the prompt is" if len(plans) == 1 else "all prompts are"
            on_event(Event("note", f"{what} known, so the text encoder is not loaded; --no-cache loads it"))

    def embeds(self, session: Session, plan: Plan) -> dict[str, torch.Tensor | None]:
        """Those of one of the plans, as `Session.sample` takes them. What the session's text encoder makes is kept,
        where the disk takes it."""
        if self.store is not None and self.known:
            return self.store.get(plan, session)
        self.on_event(Event("stage", "text"))
        embeds = session.encode(plan)
        if self.store is not None:
            files, cache = self.store.files, self.store.cache
            if sum(file.stat().st_size for file in files) > LARGE and not are_hashed(files, cache):
                self.on_event(Event("stage", "hash"))
            self.store.put(plan, embeds)
            _prune(self.store.cache / PART)
        return embeds


def _folder(config: GenerateConfig) -> Path | None:
    """The cache; None where none is wanted, or the user has no home that it could lie in."""
    if config.no_cache:
        return None
    try:
        return cache_folder(config)
    except UsageError:
        if config.cache_dir is not None:
            raise
        return None


def _prune(folder: Path) -> None:
    """Delete the files that were not used for longest, until the rest take MAX_BYTES."""
    found = []
    for file in folder.glob("*.safetensors"):
        with contextlib.suppress(OSError):  # another run deletes too
            status = file.stat()
            found.append((status.st_mtime_ns, status.st_size, file))
    total = sum(size for _, size, _ in found)
    for _, size, file in sorted(found):
        if total <= MAX_BYTES:
            break
        with contextlib.suppress(OSError):
            delete(file)
        total -= size
