"""Choose the size and length of each video's clip, and decode it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slagen.errors import EnvironmentProblem, UsageError
from slagen.io.text import counted
from slagen.training.data.deinterlace import is_interlaced, whole_frames
from slagen.training.data.videos import SourceVideo

RATIOS = (1.0, 4 / 3, 3 / 4)  # aspect ratios, beside the model's own and its inverse
LENGTHS = (1.0, 0.75, 0.5, 0.25)  # of the model's
MIN_FRAMES = 5  # unless still images are asked for
FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,mpegts,mpeg,flv,ogg,asf"  # none refers to other files


@dataclass(frozen=True)
class ClipSpec:
    """The clip that is made of a video: its beginning, resampled in time, scaled and center-cropped.

    Args:
        width, height: in pixels. num_frames: 4k + 1. fps: of the clip.
        interlaced: the video is interlaced, so it is deinterlaced.
    """

    width: int
    height: int
    num_frames: int
    fps: int
    interlaced: bool = False


def raise_faults(faults: list[str]) -> None:
    """Raise UsageError with every fault of a data set, if there are any."""
    if faults:
        count = "one fault" if len(faults) == 1 else f"{len(faults)} faults"
        raise UsageError(f"the data set has {count}:", *faults)


def plan_clips(
    videos: list[SourceVideo], full: ClipSpec, grid: int, faults: Sequence[str] = (),
    on_look: Callable[[int], None] = lambda number: None, *, upscale: bool = True, own_length: int | None = None,
) -> list[ClipSpec]:  # fmt: skip
    """Probe every video and choose its clip: the nearest of a few aspect ratios, the longest of a few lengths.

    Args:
        full: the largest area and length. grid: width and height are multiples of this.
        faults: of the data set, known before. on_look: called with each video's number before it is probed.
        upscale: whether a video of a smaller area is enlarged; otherwise its clip has the sizes of its own area.
        own_length: the model's number of frames, which a clip may have too where `full` is longer.
    Raises: UsageError with those, and every video that cannot be read, has no frames, or is too short.
    """
    fewest = min(full.num_frames, MIN_FRAMES)
    choices = {max(fewest, (int(full.num_frames * part) - 1) // 4 * 4 + 1) for part in LENGTHS}
    lengths = sorted(choices | {min(own_length or full.num_frames, full.num_frames)}, reverse=True)
    found, specs = list(faults), []
    for number, item in enumerate(videos):
        on_look(number)
        try:
            video = _probe(item.path, full.num_frames / full.fps + 1)
        except _Unreadable as error:
            found.append(f"{item.where}: {item.path.name} {error}")
            continue
        frames = math.floor((video.duration_s + _slack(video.time_base_s, full)) * full.fps) + 1
        length = next((length for length in lengths if length <= frames), None)
        if length is None:
            least = (lengths[-1] - 1) / full.fps
            found.append(
                f"{item.where}: {item.path.name} is {video.duration_s:.2f} s long, but must be at least {least:.2f} s "
                "long"
            )
            continue
        sizes = _sizes(full if upscale else _no_larger(full, video, grid), grid)
        best = min(sizes, key=lambda size: abs(math.log(size[0] / size[1] * video.height / video.width)))
        specs.append(ClipSpec(*best, length, full.fps, video.interlaced))
    raise_faults(found)
    return specs


def _slack(unit: float, spec: ClipSpec) -> float:
    """Tolerance for timestamps in seconds: containers round them to their time base, Matroska to milliseconds."""
    return min(unit, 0.25 / spec.fps) + 1e-6


def _no_larger(full: ClipSpec, video: _Video, grid: int) -> ClipSpec:
    """The largest clip of a video that is not to be enlarged: its own size, where that is the smaller area."""
    width, height = (max(grid, int(side) // grid * grid) for side in (video.width, video.height))
    return full if width * height >= full.width * full.height else dataclasses.replace(full, width=width, height=height)


def _sizes(full: ClipSpec, grid: int) -> list[tuple[int, int]]:
    """Sizes of about the same area: the model's own, its transpose, and a few aspect ratios between."""
    sizes = [(full.width, full.height), (full.height, full.width)]
    for ratio in RATIOS:
        width = int(math.sqrt(full.width * full.height * ratio) / grid + 1e-6) * grid
        height = int(full.width * full.height / max(width, 1) / grid + 1e-6) * grid
        if width and height:
            sizes.append((width, min(height, round(width / ratio / grid) * grid or grid)))
    return list(dict.fromkeys(sizes))


class _Unreadable(Exception):
    """Why a video cannot be used."""


def _av() -> Any:
    try:
        import av
    except ImportError as error:
        raise EnvironmentProblem("reading videos needs PyAV. Install it: pip install 'slagen[finetune]'") from error
    return av


def _open(path: Path) -> Any:
    """Open a video; formats that refer to other files are refused."""
    return _av().open(str(path.absolute()), metadata_errors="replace", options={"format_whitelist": FORMATS})


def _shape(stream: Any, frame: Any) -> tuple[float, float, int]:
    """Displayed width and height in pixels, and the rotation to apply, in quarter turns to the left."""
    turns = round(frame.rotation / 90) % 4
    width, height = frame.width * float(stream.sample_aspect_ratio or 1), float(frame.height)
    return (height, width, turns) if turns % 2 else (width, height, turns)


@dataclass(frozen=True)
class _Video:
    """What choosing a clip needs to know of a video: times in seconds, the displayed size in pixels."""

    duration_s: float
    time_base_s: float
    width: float
    height: float
    interlaced: bool


def _probe(path: Path, enough: float) -> _Video:
    """Read the times of a video's packets, up to `enough` seconds, and its first few frames."""
    av = _av()
    try:
        with _open(path) as container:
            if not container.streams.video:
                raise _Unreadable("has audio but no video")
            stream = container.streams.video[0]
            frames = container.decode(stream)
            frame = next(frames, None)
            if frame is None:
                raise _Unreadable("contains no frames")
            width, height, _ = _shape(stream, frame)
            interlaced = frame.interlaced_frame or is_interlaced(frames)
        with _open(path) as container:
            stream = container.streams.video[0]
            packets = (packet for packet in container.demux(stream) if not packet.is_discard)
            unit = float(stream.time_base)
            first = last = frame.pts  # packets before the first decodable frame are never shown
            for packet in packets:
                if packet.pts is not None:
                    first = packet.pts if first is None else first
                    last = packet.pts if last is None else max(last, packet.pts)
                    if (last - first) * unit > enough:
                        break
    except (av.FFmpegError, OSError, ValueError) as error:
        raise _Unreadable(f"cannot be decoded ({error})") from error
    duration = (last - first) * unit if first is not None and last is not None else 0.0
    return _Video(duration, unit, width, height, interlaced)


def read_clip(path: Path, spec: ClipSpec) -> np.ndarray:
    """Decode a clip: for each of its times, the frame that the video shows then by its own timestamps.

    Returns: (num_frames, height, width, 3) uint8 RGB.
    Raises: UsageError where the video is too short or cannot be decoded.
    """
    av = _av()
    picked: list[np.ndarray] = []
    shown: Any = None
    start = last = math.nan
    try:
        with _open(path) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            slack = _slack(float(stream.time_base), spec)
            for frame, time in whole_frames(container, stream):
                start = time if shown is None else start
                if shown is not None and time < last:
                    raise UsageError(
                        f"{path} has timestamps that go backwards. Re-encode it: ffmpeg -i {path.name} new.mp4"
                    )
                while shown is not None and len(picked) < spec.num_frames:
                    if len(picked) / spec.fps + start >= time - slack:
                        break
                    picked.append(_fit(shown, stream, spec))
                shown, last = frame, time
                if len(picked) == spec.num_frames:
                    break
            while shown is not None and len(picked) < spec.num_frames:
                if len(picked) / spec.fps + start > last + slack:
                    break
                picked.append(_fit(shown, stream, spec))
    except (av.FFmpegError, OSError, ValueError, IndexError) as error:
        raise UsageError(f"{path} cannot be decoded ({error}).") from error
    if len(picked) < spec.num_frames:
        raise UsageError(
            f"{path} has only {counted(len(picked), 'frame')} at {spec.fps} fps, but {spec.num_frames} are needed."
        )
    return np.stack(picked)


def _fit(frame: Any, stream: Any, spec: ClipSpec) -> np.ndarray:
    """A frame as displayed, scaled to cover the size of the clip and center-cropped."""
    width, height, turns = _shape(stream, frame)
    factor = max(spec.width / width, spec.height / height)
    size = max(spec.width, round(width * factor)), max(spec.height, round(height * factor))
    lying = size[::-1] if turns % 2 else size
    picture = frame.to_ndarray(format="rgb24", width=lying[0], height=lying[1], interpolation="BICUBIC")
    left, top = (size[0] - spec.width) // 2, (size[1] - spec.height) // 2
    return np.ascontiguousarray(np.rot90(picture, turns)[top : top + spec.height, left : left + spec.width])
