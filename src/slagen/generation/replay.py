"""replay(path) -> a comparison of a video with the same one generated again from its report or metadata."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slagen import packages
from slagen.errors import WeightsError
from slagen.events import Event
from slagen.generation.config import GenerateConfig
from slagen.generation.generate import generate
from slagen.generation.provenance import Made, read_made
from slagen.generation.recorded import fields_again, reproducible
from slagen.interrupts import telling_what_is_kept
from slagen.io.files import scratch
from slagen.io.paths import user_path
from slagen.io.reading import file_hash


@dataclass(frozen=True)
class Compared:
    """One hash of the old and of the new video."""

    before: str
    now: str
    same: bool


@dataclass(frozen=True)
class ReplayResult:
    """A comparison of a video with the same one generated again.

    Args:
        path: of what was replayed. output: where the new video was kept; None if it was not.
        hashes: by what they are of: latents, weights, frames, from a report the file.
        versions_changed: by package, the old version and the new; None where it was or is not installed.
    """

    path: Path
    hashes: dict[str, Compared]
    versions_changed: dict[str, tuple[str | None, str | None]]
    output: str | None

    @property
    def same(self) -> bool:
        """Whether every hash is; with the same frames, a file differs in its metadata only."""
        decisive = self.hashes.keys() - ({"file"} if "frames" in self.hashes else set())
        return all(self.hashes[name].same for name in decisive)

    def to_dict(self) -> dict[str, Any]:
        """What --json prints."""
        return {
            "path": str(self.path), "same": self.same,
            "hashes": {name: dict(vars(row)) for name, row in self.hashes.items()},
            "versions_changed": {name: list(pair) for name, pair in self.versions_changed.items()},
            "output": self.output,
        }  # fmt: skip


def replay(
    path_text: str, output: str | None = None, on_event: Callable[[Event], None] = lambda event: None, *,
    model: str | None = None, weights: str | None = None, vae: str | None = None,
    local_files_only: bool = False,
) -> ReplayResult:  # fmt: skip
    """Make a video again and compare.

    Args:
        path_text: a video that slagen made, or the JSON beside it.
        output: keep the new video here; None throws it away.
        model, weights, vae: where they are now, if they have moved.
        local_files_only: download nothing.
    Returns: the old and new hashes of what both recorded, and which versions differ.
    Raises: UsageError for a file that is neither, weights that are not found, a hub model that only the
        file names and that is not on this machine, or settings that slagen does not support;
        WeightsError for other weights; and what `generate` raises.
    """
    path = user_path(path_text)
    recorded = read_made(path)
    given = {"model": model, "vae": vae, "weights": _checked(weights, recorded) if weights else None}
    fields, settings = fields_again(recorded, given), recorded.settings
    if (count := settings.get("processes")) is not None:
        text = f"{count} processes made this video. One rounds differently, so the latents may differ slightly"
        on_event(Event("note", text))
    with scratch() as folder, reproducible(path):
        config = GenerateConfig(
            **fields, local_files_only=local_files_only, output=output or str(folder / f"replay{recorded.suffix}"),
            crf=settings.get("crf"), no_metadata=bool(settings.get("no_metadata")), no_cache=True,
        )  # fmt: skip
        with telling_what_is_kept(lambda: "Nothing was written. Run the same command again.", instead=True):
            made = generate(config, on_event).videos[0].record
    before, after = recorded.hashes, made.hashes
    compared = {
        name: Compared(before[name], after[name], before[name] == after[name]) for name in before if name in after
    }
    old, new = recorded.versions, packages.versions()
    changed = {name: (old.get(name), new.get(name)) for name in sorted({*old, *new}) if old.get(name) != new.get(name)}
    return ReplayResult(path, compared, changed, output)


def _checked(weights: str, recorded: Made) -> str:
    """Weights that are given, if they are those that made the video. Raises WeightsError."""
    path, expected = user_path(weights), recorded.hashes.get("SLA weights")
    if expected is not None and path.is_file() and file_hash(path) != expected:
        raise WeightsError(
            f"{path} is not the weights file that this video was made with. Give the file that has "
            f"the SHA-256 {expected}."
        )
    return weights
