"""A video's final latents in a file, with all that its video and report are made of: what `generate --save-latents`
writes, what is kept where a video could not be written, and what `slagen decode` reads."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shlex
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slagen.errors import WeightsError
from slagen.formats.headers import read_header, read_strings
from slagen.generation import video_report
from slagen.generation.video_report import VideoReport
from slagen.io.files import writing
from slagen.io.forms import sha256, whole
from slagen.io.reading import no_file
from slagen.io.text import to_json

if TYPE_CHECKING:  # what a file says of itself is read without torch
    from torch import Tensor

SUFFIX = ".latents.safetensors"
NAME, METADATA, VERSION = "latents", "slagen_latents", 1
AGAIN = "Generate the video again with --save-latents."
FORM: dict[str, Any] = {"version": whole(1, 10**6), "vae_hash": sha256(), "report": video_report.FORM}


@dataclass(frozen=True)
class About:
    """What a file of latents says of itself. vae_hash: of the VAE that they are for. report: of their video."""

    vae_hash: str
    report: VideoReport


@dataclass(frozen=True)
class LatentsInfo:
    """What `slagen info` says of a file of latents. decode: the command that turns them into a video."""

    path: str
    kind: str
    meaning: str
    decode: str
    shape: list[int]
    vae_hash: str
    latents_hash: str
    settings: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """What --json prints."""
        return dict(vars(self))


def write_latents(path: Path, latents: Tensor, vae_hash: str, report: VideoReport, *, replace: bool = True) -> None:
    """Write a file that `read_latents` reads.

    Args:
        latents: (1, C, T, h, w) float32 on the CPU, as the sampler ended with them.
        vae_hash: of the VAE that they are for. report: of their video, as far as it is known.
    Raises: OSError or SafetensorError where the disk does not take it; FileExistsError.
    """
    from safetensors.torch import save

    video = dataclasses.replace(report.video, sha256=None)  # this file makes another
    content = dataclasses.replace(report, video=video).to_dict()
    about = {"version": VERSION, "vae_hash": vae_hash, "report": content}
    data = save({NAME: latents.contiguous()}, metadata={METADATA: to_json(about)})
    with writing(path, replace=replace) as part:
        part.write_bytes(data)  # safetensors itself opens no path that is not UTF-8


def keep_latents(video: Path, latents: Tensor, vae_hash: str, report: VideoReport) -> Path | None:
    """Write the latents of a video that could not be written: beside it, or where temporary files go.

    Returns: their file, under a name that was free; None where neither disk takes it.
    """
    from safetensors import SafetensorError

    for folder in (video.parent, Path(tempfile.gettempdir())):
        for number in range(1, 100):
            path = folder / f"{video.stem}{'' if number == 1 else f'-{number}'}{SUFFIX}"
            try:
                write_latents(path, latents, vae_hash, report, replace=False)
            except FileExistsError:
                continue
            except (OSError, SafetensorError):
                break
            return path
    return None


def latents_beside(video: Path) -> list[str]:
    """The name of the latents that slagen wrote beside a video, which are of no other; empty without one of them."""
    path = video.with_suffix(SUFFIX)
    if not os.path.lexists(video) or not path.is_file():
        return []
    try:
        about = read_header(path).get("__metadata__", {})
    except (WeightsError, OSError):
        return []
    return [path.name] if METADATA in about else []


def read_latents(path: Path) -> tuple[Tensor, About]:
    """Latents (1, C, T, h, w) float32, and what their file says of them, each held against the other.

    Raises: WeightsError for a file that holds something else, is damaged, or does not say how it was made.
    """
    about = read_about(path)
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        latents = load(path.read_bytes())[NAME]
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} cannot be read ({error}). {AGAIN}") from error
    if not torch.isfinite(latents).all():
        raise WeightsError(f"{path} contains NaN or Inf. {AGAIN}")
    if latents_hash(latents) != about.report.latents_hash:
        raise WeightsError(f"{path} was changed or damaged: its latents do not match the recorded hash. {AGAIN}")
    return latents, about


def read_about(path: Path) -> About:
    """What a file of latents says of itself, which has the form FORM. Raises as `read_latents`, but for its numbers."""
    if not path.is_file():
        raise no_file(path, f"Give a file that ends in {SUFFIX}.")
    header = read_header(path)
    about = header.pop("__metadata__", {})
    if set(header) != {NAME}:
        raise WeightsError(f"{path} does not contain the latents of a video. Give a file written with --save-latents.")
    if METADATA not in about:
        raise WeightsError(
            f"{path} contains latents, but not the settings that they were generated with, so they cannot be "
            f"decoded. {AGAIN}"
        )
    content = read_strings(path, about[METADATA], FORM)
    try:
        to_json(content, allow_nan=False)
    except ValueError:
        raise WeightsError(f"{path} has metadata with NaN or Inf. {AGAIN}") from None
    if content["version"] > VERSION:
        raise WeightsError(
            f"{path} was written by a newer version of slagen (format {content['version']}). Upgrade slagen."
        )
    entry = header[NAME]
    if entry["dtype"] != "F32" or len(entry["shape"]) != 5 or entry["shape"][0] != 1:
        raise WeightsError(
            f"{path} contains {entry['dtype']} latents of shape {entry['shape']}, but must contain float32 latents of "
            f"one video. {AGAIN}"
        )
    return About(content["vae_hash"], VideoReport.from_dict(content["report"]))


def describe_latents(path: Path) -> LatentsInfo | None:
    """What a file of latents says of itself, and how to make its video; None for a file of anything else.

    Raises: as `read_latents`.
    """
    if not path.is_file() or not path.name.endswith(".safetensors"):
        return None
    if METADATA not in read_header(path).get("__metadata__", {}):
        return None
    latents, about = read_latents(path)
    return LatentsInfo(
        path=str(path), kind="latents", meaning="the final latents of a video, which the VAE decodes",
        decode=f"slagen decode {shlex.quote(str(path))}", shape=list(latents.shape), vae_hash=about.vae_hash,
        latents_hash=about.report.latents_hash, settings=about.report.settings,
    )  # fmt: skip


def latents_hash(latents: Tensor) -> str:
    """SHA-256 of latents' bytes, as a report has it."""
    return hashlib.sha256(latents.contiguous().numpy().tobytes()).hexdigest()
