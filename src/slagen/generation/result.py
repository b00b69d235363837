"""What generate() returns: the finished videos with their frames, files and reports."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from functools import cached_property
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slagen.generation.video_report import VideoReport
from slagen.io.files import scratch
from slagen.io.paths import VIDEO, kind_of
from slagen.io.text import escaped
from slagen.video import encode_video

if TYPE_CHECKING:
    import numpy as np

MAX_SHOWN = 12  # videos of one result in a notebook, which keeps all that it shows


@dataclass(frozen=True, repr=False, eq=False)
class Video:
    """One finished video. In a notebook it shows itself.

    Args:
        path: its file, or the folder of its frames; None where it was not written.
        report_path: the JSON beside it, None as well then.
        record: what that says: settings, versions, times, cost. `report` is the same as a dict, with the names of the
            JSON.
        latents_path: of its final latents, where they were saved.
        frames: (T, H, W, 3) uint8 RGB, as they were before the MP4's lossy encoding; None where the caller is the
            command line.
    """

    path: Path | None
    report_path: Path | None
    record: VideoReport
    latents_path: Path | None = None
    frames: np.ndarray | None = None

    @cached_property
    def report(self) -> dict[str, Any]:
        """The report as the JSON beside the video has it."""
        return self.record.to_dict()

    def __repr__(self) -> str:
        video, place = self.record.video, "in memory" if self.path is None else repr(str(self.path))
        return (
            f"<Video {place}: {video.frames} frames of {video.width}x{video.height} at {video.fps} fps, "
            f"seed {self.record.settings['seed']}, {self.record.stages_s['total']:.1f} s>"
        )

    def mp4(self) -> bytes:
        """The video as an MP4, of its file or, where that is none, encoded from the frames. Raises OSError."""
        if self.path is not None and kind_of(self.path) == VIDEO and self.path.is_file():
            return self.path.read_bytes()
        if self.frames is None:
            raise FileNotFoundError(f"{self.path} is no MP4 that exists, and its frames were not kept in memory")
        with scratch() as folder:
            encode_video(self.frames, folder / "video.mp4", self.record.video.fps)
            return (folder / "video.mp4").read_bytes()

    def _repr_html_(self) -> str:
        settings, width = self.record.settings, max(256, self.record.video.width)
        data = base64.b64encode(self.mp4()).decode()
        caption = f"{settings['prompt']} (seed {settings['seed']})" + ("" if self.path is None else f", {self.path}")
        return (
            f'<figure style="margin: 0 1em 1em 0; display: inline-block; max-width: {width}px">'
            f'<video controls autoplay loop muted playsinline style="width: 100%" src="data:video/mp4;base64,{data}">'
            f"</video><figcaption>{escape(escaped(caption))}</figcaption></figure>"
        )


@dataclass(frozen=True, repr=False, eq=False)
class GenerateResult:
    """What one call made: the videos in the order of their seeds. In a notebook it shows them.

    `frames`, `path`, `report` and `latents_path` are those of the first one; see `Video`.
    """

    videos: list[Video]

    @property
    def frames(self) -> np.ndarray | None:
        """(T, H, W, 3) uint8 RGB of the first video."""
        return self.videos[0].frames

    @property
    def path(self) -> Path | None:
        """The first video's MP4."""
        return self.videos[0].path

    @property
    def report(self) -> dict[str, Any]:
        """The first video's report."""
        return self.videos[0].report

    @property
    def latents_path(self) -> Path | None:
        """The file of the first video's final latents, where they were saved."""
        return self.videos[0].latents_path

    def __repr__(self) -> str:
        return f"GenerateResult({self.videos!r})"

    def _repr_html_(self) -> str:
        shown = "".join(video._repr_html_() for video in self.videos[:MAX_SHOWN])
        more = len(self.videos) - MAX_SHOWN
        return shown + (f"<p>and {more} more in .videos</p>" if more > 0 else "")
