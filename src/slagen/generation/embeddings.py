"""Prompts as the text encoder gives them, kept on disk, so that a run whose prompts are known loads no text encoder."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from slagen.errors import SlagenError, WeightsError
from slagen.generation.resolve import Plan
from slagen.generation.session import Session, texts_of
from slagen.io.documents import read_json
from slagen.io.files import sweep, write_json, writing
from slagen.io.paths import user_path
from slagen.io.reading import digest, file_hash
from slagen.packages import state, versions

SAVED_EVERY_S = 20.0  # of hashing, which a killed run loses at most


class Embeddings:
    """Prompts as the text encoder gives them, in memory and, if asked, on disk.

    A file is named by a hash of the encoder's and tokenizer's files, the text, its length and dtype, the kind of device
    and the packages that compute it: it is never stale.

    Args:
        part: the folder in the cache.
    Attributes: damaged: files that were read and are not what was written.
    """

    def __init__(self, plan: Plan, cache_dir: str | Path, on_disk: bool, part: str = "embeddings") -> None:
        self.plan, self.cache, self.part = plan, user_path(cache_dir), part
        self.folder = self.cache / part if on_disk else None
        if self.folder is not None:
            sweep(self.folder)
        self.files = component_files(plan.weights.source.folder, ("text_encoder", "tokenizer"))
        self.memory: dict[str, torch.Tensor] = {}
        self.whole: set[str] = set()  # keys of files that were read and are what was written
        self.damaged: list[Path] = []

    @cached_property
    def about(self) -> list[Any]:
        """What all keys depend on."""
        weights, packages = self.plan.weights, versions()
        return [
            file_hashes(self.files, self.cache), weights.source.defaults.max_sequence_length, str(weights.dtype),
            weights.device.type, [packages.get(name) for name in ("torch", "transformers", "diffusers")], state("ftfy"),
        ]  # fmt: skip

    def read(self, plan: Plan) -> bool:
        """Whether a plan's texts are all known; they are in memory then, whatever happens to their files."""
        for text in texts_of(plan):
            key = self._key(text)
            tensor = self._read(key)
            if tensor is None:
                return False
            self.memory[key] = tensor
            with contextlib.suppress(OSError):
                os.utime(self._path(key))  # what was used last is deleted last
        return True

    def has(self, plan: Plan) -> bool:
        """Whether a plan's texts are all known."""
        return all(self._known(text) for text in texts_of(plan))

    def put(self, plan: Plan, embeds: dict[str, torch.Tensor | None]) -> None:
        """Remember what `Session.encode` gave: on disk where that takes it, otherwise in memory."""
        for text, tensor in zip(texts_of(plan), embeds.values(), strict=False):
            assert tensor is not None
            tensor, key = tensor.cpu().contiguous(), self._key(text)
            if self.folder is not None:
                try:
                    self.folder.mkdir(parents=True, exist_ok=True)
                    with writing(self._path(key)) as part:
                        save_file({"embeds": tensor}, part, metadata={"sha256": _hash(tensor)})
                    continue
                except (OSError, SafetensorError):
                    self.folder = None
            self.memory[key] = tensor

    def get(self, plan: Plan, session: Session) -> dict[str, torch.Tensor | None]:
        """A plan's embeddings as `Session.sample` takes them. Raises SlagenError if their file is gone or broken."""
        device = session.pipe._execution_device
        tensors: list[torch.Tensor | None] = [self._load(text).to(device) for text in texts_of(plan)]
        return dict(zip(("prompt_embeds", "negative_prompt_embeds"), [*tensors, None], strict=False))

    def _key(self, text: str) -> str:
        return digest([*self.about, text])

    def _path(self, key: str) -> Path:
        return self.cache / self.part / f"{key}.safetensors"

    def _known(self, text: str) -> bool:
        key = self._key(text)
        if key in self.memory or self.folder is None:
            return key in self.memory
        if key not in self.whole and self._read(key) is not None:
            self.whole.add(key)
        return key in self.whole

    def _load(self, text: str) -> torch.Tensor:
        key = self._key(text)
        tensor = self.memory[key] if key in self.memory else self._read(key)
        if tensor is None:
            raise SlagenError(f"{self._path(key)} is missing or corrupt. Run the batch again with --retry-failed.")
        return tensor

    def _read(self, key: str) -> torch.Tensor | None:
        """What a file holds; None unless that is what was written."""
        path = self._path(key)
        try:
            with safe_open(path, framework="pt") as handle:
                tensor, metadata = handle.get_tensor("embeds"), handle.metadata() or {}
        except (OSError, SafetensorError):
            tensor, metadata = None, {}
        if tensor is not None and metadata.get("sha256") == _hash(tensor):
            return tensor
        if path.exists() and path not in self.damaged:
            self.damaged.append(path)
        return None


def _hash(tensor: torch.Tensor) -> str:
    return digest([str(tensor.dtype), list(tensor.shape), tensor_hash(tensor)])


def tensor_hash(tensor: torch.Tensor) -> str:
    """SHA-256 of a CPU tensor's bytes."""
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().data).hexdigest()


def component_files(folder: Path, parts: tuple[str, ...]) -> list[Path]:
    """The files of some components of a pipeline, in order."""
    return [file for part in parts for file in files_in(folder / part)]


def files_in(path: Path) -> list[Path]:
    """A file alone, or all in a folder, in order."""
    return [path] if path.is_file() else [file for file in sorted(path.rglob("*")) if file.is_file()]


def file_hashes(files: list[Path], cache: Path) -> str:
    """One hash of many files' names and contents."""
    names = [file.name for file in files]
    return digest([list(pair) for pair in zip(names, content_hashes(files, cache), strict=True)])


def are_hashed(files: list[Path], cache: Path) -> bool:
    """Whether the hashes of files are kept, so that `content_hashes` reads none."""
    known = _known_hashes(cache / "hashes.json")
    return all(known.get(_name(file), [])[:2] == _stamp(file) for file in files)


def _name(file: Path) -> str:
    return os.fsencode(file.resolve()).decode("latin-1")  # a file's name need not be text


def _stamp(file: Path) -> list[int]:
    status = file.stat()
    return [status.st_size, status.st_mtime_ns]


def content_hashes(files: list[Path], cache: Path) -> list[str]:
    """SHA-256 of each file. They are kept in `cache` by path, size and time, so that a file is read once."""
    sweep(cache)
    store = cache / "hashes.json"
    known = _known_hashes(store)
    found, changed, saved = [], False, time.monotonic()
    for number, file in enumerate(files):
        name, stamp = _name(file), _stamp(file)
        entry = known.get(name)
        if entry is None or entry[:2] != stamp:
            entry, changed = [*stamp, file_hash(file)], True
            known[name] = entry
        found.append(entry[2])
        if changed and (number + 1 == len(files) or time.monotonic() - saved > SAVED_EVERY_S):
            with contextlib.suppress(OSError):  # hashed again the next time
                cache.mkdir(parents=True, exist_ok=True)
                write_json(store, {**_known_hashes(store), **known})  # others may have added some
            changed, saved = False, time.monotonic()
    return found


def _known_hashes(store: Path) -> dict[str, Any]:
    """Size, time and hash by path, as far as they are kept: they only save time."""
    try:
        return {name: e for name, e in read_json(store, {str: list}).items() if [*map(type, e)] == [int, int, str]}
    except WeightsError:
        return {}
