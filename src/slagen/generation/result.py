"""What generate() hands back: the finished videos with their files and reports."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Video:
    """One finished video: its file, its report (file and content), and its latents' file if they were kept."""

    path: Path
    report_path: Path
    report: dict[str, Any]
    latents_path: Path | None = None


@dataclass(frozen=True)
class GenerateResult:
    """What a call of `generate` made, in the order of the seeds."""

    videos: list[Video]
