"""The tensors of a prepared data set on disk: shards, and an index with the SHA-256 of each tensor."""

import json
import re
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from slagen.errors import SlagenError, WeightsError
from slagen.formats.headers import read_header
from slagen.generation.embeddings import tensor_hash
from slagen.io import forms
from slagen.io.documents import read_lines
from slagen.io.files import append, delete, sweep, writing
from slagen.io.forms import Kind
from slagen.io.reading import digest

SET_FILE, INDEX_FILE, DECODED_FILE = "dataset.json", "tensors.jsonl", "decoded.txt"
SHARD_BYTES = 256 * 2**20
SHARD_TENSORS = 16
AGAIN = "Prepare it again with the same command, which encodes only what is missing."
SHARD_S = 20.0  # a killed run loses at most this much work
SHAPE = Kind("a shape of 1 to 8 dimensions", [forms.whole(1, 2**31)], lambda shape: 1 <= len(shape) <= 8)
INDEX = {
    "name": str, "shard": forms.matching(r"\w[\w.-]*\.safetensors", "a plain file name"), "sha256": str,
    "shape": SHAPE,
}  # fmt: skip


class Store:
    """Tensors by name, stored in shards. Added ones are on disk once `flush` has returned."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.places: dict[str, tuple[str, str]] = {}  # name -> shard, SHA-256
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._waiting: dict[str, Tensor] = {}
        self._flushed = time.monotonic()
        self.named = whole = dict[str, bool]()  # shards that the index lists
        for entry in read_lines(folder / INDEX_FILE, INDEX):  # a line may be torn by a kill
            name, shard, sha256, shape = entry["name"], entry["shard"], entry["sha256"], entry["shape"]
            if shard not in whole:
                whole[shard] = _is_whole(folder / shard)
            if whole[shard]:
                self.places[name], self.shapes[name] = (shard, sha256), tuple(shape)

    def __contains__(self, name: str) -> bool:
        return name in self.places or name in self._waiting

    def add(self, name: str, tensor: Tensor, what: str) -> None:
        """Keep a tensor that was made from `what`. Raises SlagenError where it has NaN or Inf, or the disk is full."""
        if not torch.isfinite(tensor).all():
            self.flush()
            raise SlagenError(
                f"{what} produced NaN or Inf. Remove it from the data. If other inputs fail too, download the model "
                "again."
            )
        self._waiting[name] = tensor.detach().cpu().contiguous()
        size = sum(t.numel() * t.element_size() for t in self._waiting.values())
        late = time.monotonic() - self._flushed > SHARD_S
        if late or len(self._waiting) >= SHARD_TENSORS or size >= SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write the tensors added since: a shard, and then its lines in the index.

        `dataset.json`, which says that the set is complete, is deleted first; it is written again at the end.
        """
        self._flushed = time.monotonic()
        if not self._waiting:
            return
        shard = f"{digest(sorted(self._waiting))[:16]}.safetensors"
        entries: list[dict[str, Any]] = [
            {"name": name, "shard": shard, "sha256": tensor_hash(tensor), "shape": list(tensor.shape)}
            for name, tensor in self._waiting.items()
        ]
        lines = map(json.dumps, entries)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            delete(self.folder / SET_FILE)
            with writing(self.folder / shard) as part:
                save_file(self._waiting, part)
            append(self.folder / INDEX_FILE, ("\n".join(lines) + "\n").encode())
        except (OSError, SafetensorError) as error:
            raise SlagenError(
                f"{self.folder} could not be written ({error}). Free some space and run again."
            ) from error
        for entry in entries:
            self.places[entry["name"]] = shard, entry["sha256"]
            self.shapes[entry["name"]] = tuple(entry["shape"])
        self._waiting = {}

    def sweep(self) -> None:
        """Delete the leftovers of killed runs: temporary files, and shards without a complete line in the index.

        The caller holds the folder's lock, so nobody is writing them.
        """
        sweep(self.folder)
        for path in self.folder.glob("*.safetensors"):
            if self.named and re.fullmatch(r"[0-9a-f]{16}", path.stem) and path.name not in self.named:
                delete(path)
        for path in [*self.folder.glob("*.safetensors.part"), *self.folder.glob(".tmp*")]:  # of earlier versions
            if path.suffix == ".part" or re.fullmatch(r"\.tmp[A-Za-z0-9]{6}", path.name):
                delete(path)

    def drop_changed(self) -> None:
        """Forget every tensor whose bytes have changed, so that it is made again."""
        for name in list(self.places):
            try:
                self.load(name)
            except WeightsError:
                del self.places[name], self.shapes[name]

    def load(self, name: str) -> Tensor:
        """Read a tensor. Raises WeightsError if its bytes have changed since they were written."""
        shard, sha256 = self.places[name]
        try:
            with safe_open(self.folder / shard, framework="pt") as handle:
                tensor = handle.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise WeightsError(f"{self.folder / shard} is corrupt ({error}). {AGAIN}") from error
        if tensor_hash(tensor) != sha256:
            raise WeightsError(f"{self.folder / shard} has changed since it was written. {AGAIN}")
        return tensor


def _is_whole(path: Path) -> bool:
    try:
        read_header(path)
    except WeightsError:
        return False
    return True
