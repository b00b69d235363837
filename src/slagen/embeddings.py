"""Prompts as the text encoder gives them, kept on disk, so that a run whose prompts are known loads no text encoder."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from slagen.config import BatchConfig
from slagen.errors import SlagenError, WeightsError
from slagen.generate import Session
from slagen.manifest import digest
from slagen.models import read_header
from slagen.report import write_json
from slagen.resolve import Plan


class Embeddings:
    """Prompts as the text encoder gives them, in memory and, unless the config says no, on disk.

    A file is named by a hash of the encoder's and tokenizer's files, the text, its length and dtype: it is never stale.
    """

    def __init__(self, config: BatchConfig, plan: Plan) -> None:
        weights = plan.weights
        self.cache = Path(config.cache_dir).expanduser()
        self.folder = None if config.no_cache else self.cache / "embeddings"
        files = component_files(weights.source.folder, ("text_encoder", "tokenizer"))
        self.about = [
            file_hashes(files, self.cache), weights.source.defaults.max_sequence_length, str(weights.dtype)
        ]  # fmt: skip
        self.memory: dict[str, torch.Tensor] = {}

    def has(self, plan: Plan) -> bool:
        """Whether a plan's texts are all known."""
        return all(self._known(text) for text in _texts(plan))

    def put(self, plan: Plan, embeds: dict[str, torch.Tensor | None]) -> None:
        """Remember what `Session.encode` gave: on disk where that takes it, otherwise in memory."""
        for text, tensor in zip(_texts(plan), embeds.values(), strict=False):
            assert tensor is not None
            tensor, key = tensor.cpu().contiguous(), self._key(text)
            if self.folder is not None:
                try:
                    self.folder.mkdir(parents=True, exist_ok=True)
                    part = self.folder / f"{key}.{os.getpid()}.part"
                    save_file({"embeds": tensor}, part)
                    os.replace(part, self.folder / f"{key}.safetensors")
                    continue
                except (OSError, SafetensorError):
                    self.folder = None
            self.memory[key] = tensor

    def get(self, plan: Plan, session: Session) -> dict[str, torch.Tensor | None]:
        """A plan's embeddings as `Session.sample` takes them. Raises SlagenError if their file is gone or broken."""
        device = session.pipe._execution_device
        tensors: list[torch.Tensor | None] = [self._load(text).to(device) for text in _texts(plan)]
        return dict(zip(("prompt_embeds", "negative_prompt_embeds"), [*tensors, None], strict=False))

    def _key(self, text: str) -> str:
        return digest([*self.about, text])

    def _path(self, key: str) -> Path:
        return self.cache / "embeddings" / f"{key}.safetensors"

    def _known(self, text: str) -> bool:
        key = self._key(text)
        if key in self.memory or self.folder is None:
            return key in self.memory
        try:
            return "embeds" in read_header(self._path(key))
        except WeightsError:
            return False

    def _load(self, text: str) -> torch.Tensor:
        key = self._key(text)
        if key in self.memory:
            return self.memory[key]
        try:
            return load_file(self._path(key))["embeds"]
        except (OSError, SafetensorError, KeyError) as error:
            raise SlagenError(f"{self._path(key)} is gone or broken ({error}). Run the batch again.") from error


def _texts(plan: Plan) -> list[str]:
    guided = (plan.config.guidance_scale or 0) > 1
    return [plan.config.prompt, plan.config.negative_prompt or ""][: 2 if guided else 1]


def component_files(folder: Path, parts: tuple[str, ...]) -> list[Path]:
    """The files of some components of a pipeline, in order."""
    return [file for part in parts for file in sorted((folder / part).rglob("*")) if file.is_file()]


def file_hashes(files: list[Path], cache: Path) -> str:
    """One hash of many files' contents. Each file's is kept in `cache` by path, size and time, so it is read once."""
    store = cache / "hashes.json"
    try:
        known = json.loads(store.read_text())
    except (OSError, ValueError):
        known = None
    if not isinstance(known, dict):
        known = {}
    digests, changed = [], False
    for file in files:
        status = file.stat()
        name, stamp = str(file.resolve()), [status.st_size, status.st_mtime_ns]
        entry = known.get(name)
        if not isinstance(entry, list) or entry[:2] != stamp:
            with file.open("rb") as handle:
                entry = known[name] = [*stamp, hashlib.file_digest(handle, "sha256").hexdigest()]
            changed = True
        digests.append([file.name, entry[2]])
    if changed:
        try:
            cache.mkdir(parents=True, exist_ok=True)
            write_json(store, known)
        except OSError:
            pass  # hashed again the next time
    return digest(digests)
