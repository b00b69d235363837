"""What a video, or the report beside it, says of how it was made; one that slagen did not write may say anything."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from slagen.errors import UsageError, WeightsError
from slagen.generation.video_report import FORM, SCHEMA_VERSION, RestoredReport, VideoFile, VideoReport, named_hashes
from slagen.io.documents import parse_json, read_json
from slagen.io.forms import Fault, check, matching, sha256, whole
from slagen.io.paths import GIF, WEBM, is_frames, kind_of
from slagen.io.reading import kind_of_path
from slagen.video import is_matroska, is_mp4, other_kind, read_comment

SETTINGS = {
    **{f"{name}?": str | None for name in (
        "prompt", "negative_prompt", "model", "weights", "vae", "attention", "backend", "sampler", "dtype", "device")},
    **{f"{name}?": int | None for name in (
        "num_frames", "fps", "steps", "seed", "num_videos", "block_m", "block_n", "crf", "processes")},
    **{f"{name}?": float | None for name in ("guidance_scale", "flow_shift", "sigma_max", "sparsity", "sla_topk")},
    **{f"{name}?": bool | None for name in ("allow_untrained", "ode", "no_metadata")},
    "lora?": [str], "lora_merge?": bool, "image?": str, "image_sha256?": sha256(),
    "size?": matching(r"\d{1,5}x\d{1,5}", "width x height in pixels"),
}  # fmt: skip
RECORDED = {
    "schema_version?": whole(1, 10**6), "settings": SETTINGS, "latents_hash": str, "versions?": {str: str},
    "video?": {"file?": str | None, "frames_hash?": str, "sha256?": str},
    "weights?": {
        "model_hash?": str | None, "sla_hash?": str | None,
        "loras?": [{"file": str, "sha256": sha256(), "scale": float}],
    },
}  # fmt: skip


@dataclass(frozen=True)
class Made:
    """What a video or its report says of how it was made.

    Args:
        kind: "video" or "report". content: all that it says, of the form RECORDED.
    """

    path: Path
    kind: str
    content: dict[str, Any]

    @property
    def settings(self) -> dict[str, Any]:
        """By option name."""
        settings: dict[str, Any] = self.content["settings"]
        return settings

    @property
    def suffix(self) -> str:
        """Of the name of its video, such as ".mp4"."""
        return kind_of(self.path if self.kind == "video" else self.content.get("video", {}).get("file") or "")

    @property
    def versions(self) -> dict[str, str]:
        """Of packages; empty in old reports."""
        versions: dict[str, str] = self.content.get("versions", {})
        return versions

    @property
    def hashes(self) -> dict[str, str]:
        """Hashes by name, as `named_hashes`; a video has none of its own file, and old reports have fewer."""
        video, weights = self.content.get("video", {}), self.content.get("weights", {})
        return named_hashes(
            self.content["latents_hash"], weights.get("model_hash"), weights.get("sla_hash"), video.get("frames_hash"),
            video.get("sha256"),
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """What `slagen info --json` prints."""
        rest = {name: value for name, value in self.content.items() if name not in ("path", "kind")}
        return {"path": str(self.path), "kind": self.kind, **rest}


def describe(path: Path) -> Made | None:
    """What a video or its report says of how it was made; None for a file that is neither.

    Raises: WeightsError for a video without slagen's words in it or of another kind, for JSON that is no report, and
        for a pipe or device.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise WeightsError(
            f"{path} {kind_of_path(path)}. Give a regular file or a folder: a video, its .json report, or weights."
        )
    if is_mp4(path) or (kind_of(path) == WEBM and is_matroska(path)):
        return read_video(path)
    if (is_frames(path) or kind_of(path) == GIF) and path.with_suffix(".json").is_file():
        raise WeightsError(f"{path} has no metadata. Give its report, {path.with_suffix('.json').name}.")
    if (kind := other_kind(path)) is not None:
        raise WeightsError(
            f"{path} is {kind}. Give an MP4 or WebM that slagen generated, its .json report, or (for slagen "
            "info) weights."
        )
    if path.suffix.lower() != ".json" or not path.is_file():
        return None
    return _of_this_version(
        Made(path, "report", read_json(path, RECORDED, advice="Give a complete report that slagen wrote."))
    )


def _of_this_version(made: Made) -> Made:
    """Raise WeightsError for what a newer version of slagen recorded."""
    if (version := made.content.get("schema_version", SCHEMA_VERSION)) > SCHEMA_VERSION:
        raise WeightsError(f"{made.path} was written by a newer version of slagen (format {version}). Upgrade slagen.")
    return made


def timed_report(made: Made) -> VideoReport | None:
    """The report with times that was given, or lies beside a video and is its own; None where there is none."""
    try:
        if made.kind == "report":
            check(made.content, FORM)
            return VideoReport.from_dict(made.content)
        content = read_json(made.path.with_suffix(".json"), FORM)
    except (Fault, WeightsError):  # restored, of an older version, or not there
        return None
    return VideoReport.from_dict(content) if content["latents_hash"] == made.content["latents_hash"] else None


def read_made(path: Path) -> Made:
    """What a video or its report says of how it was made. Raises as `describe`, and UsageError for all else."""
    made = describe(path)
    if made is not None:
        return made
    if not path.exists():
        raise UsageError(f"{path} does not exist. Give a video that slagen generated, or its .json report.")
    raise UsageError(
        f"{path} is neither a video that slagen generated nor its report. Give a video or its .json report."
    )


def needed_all_of_torch(path: Path) -> bool:
    """Whether a LoRA was computed beside the weights of a video, or blocks were compiled, as it or its report says.

    Raises: as `read_made`.
    """
    settings = read_made(path).settings
    return settings.get("lora_merge") is False or bool(settings.get("compile"))


def read_video(path: Path) -> Made:
    """What a video's metadata say. Raises WeightsError unless slagen made it."""
    foreign = f"{path} is a video, but slagen did not generate it, or its metadata is lost"
    advice = f". Give its report, {report.name}" if (report := path.with_suffix(".json")).is_file() else ""
    text = read_comment(path)
    if not text:
        raise WeightsError(f"{foreign}{advice}.")
    try:
        return _of_this_version(Made(path, "video", parse_json(text, RECORDED)))
    except Fault as fault:
        raise WeightsError(f"{foreign} ({fault}){advice}.") from fault


def restored_report(path: Path, settings: dict[str, Any], result: dict[str, Any]) -> RestoredReport:
    """A report without times, from what a video and its entry in the manifest say.

    Args:
        settings, result: what the video was made with and its result, from the manifest.
    Raises: WeightsError if the video lacks something that a report needs, or is a different one.
    """
    recorded = read_video(path)
    made, hashes = {**recorded.settings}, recorded.hashes
    made["prompt"] = made.get("prompt") or settings["prompt"]  # a long one is in the video as its hash
    width, _, height = made.get("size", "").partition("x")
    frames, fps, hashed = made.get("num_frames"), made.get("fps"), hashes.get("frames")
    if not (width and frames and fps and hashed) or hashes["latents"] != result.get("latents_hash"):
        raise WeightsError(f"{path} lacks some of its metadata, or is not the video that was expected here.")
    return RestoredReport(
        created=datetime.fromtimestamp(path.stat().st_mtime, UTC).isoformat(timespec="seconds"),
        video=VideoFile(path.name, frames, int(width), int(height), fps, frames / fps, hashed, result["sha256"]),
        settings=made, versions=recorded.versions, weights=recorded.content.get("weights", {}),
        latents_hash=hashes["latents"],
    )  # fmt: skip
