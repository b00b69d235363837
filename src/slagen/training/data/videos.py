"""Data sets of videos as people have them -> clips of one length and size; every fault of a set is told at once."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slagen.errors import EnvironmentProblem, UsageError
from slagen.io.documents import decode, read_bytes
from slagen.io.forms import Fault
from slagen.io.text import MAX_PROMPT, counted
from slagen.training.data.deinterlace import is_interlaced, whole_frames
from slagen.training.data.video_lists import NAMES, find_list, find_list_below, read_list

SUFFIXES = {
    ".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".gif", ".wmv", ".asf", ".flv", ".mpg", ".mpeg", ".ts", ".m2ts",
    ".mts", ".3gp", ".ogv",
}  # fmt: skip
RATIOS = (1.0, 4 / 3, 3 / 4)  # of width to height, beside the model's own and that upside down
LENGTHS = (1.0, 0.75, 0.5, 0.25)  # of the model's
MIN_FRAMES = 5  # unless still pictures are asked for
MAX_CAPTION = MAX_PROMPT
MAX_CAPTION_FILE = 2**20
FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,mpegts,mpeg,flv,ogg,asf"  # no lists that lead to other files
UNFINISHED = "tensors.jsonl"  # of a prepared set


@dataclass(frozen=True)
class Footage:
    """A video and what it shows.

    Args:
        where: the line or file that names it, for messages.
    """

    path: Path
    caption: str
    where: str


@dataclass(frozen=True)
class Cut:
    """The part of a video that becomes a clip: its beginning, resampled in time, scaled and cropped around the middle.

    Args:
        width, height: in pixels. num_frames: 4k + 1. fps: of the clip.
        interlaced: the video's frames are two fields of different moments, of which whole frames are made.
    """

    width: int
    height: int
    num_frames: int
    fps: int
    interlaced: bool = False


def read_footage(path: Path) -> tuple[list[Footage], list[str]]:
    """Find the videos and captions of a data set, and what is wrong with it.

    Args:
        path: a folder of videos with a .txt beside each; a .csv, .json or .jsonl with the keys of musubi (`video_path`,
            `caption`), FastVideo (`path`, `cap`), DiffSynth (`video`, `prompt`) or Hugging Face (`file_name`, and
            `text`, `caption` or `prompt`); or a folder with one.
    Returns: them and the faults, for `plan_cuts` to tell with its own.
    Raises: UsageError where that is no data set at all.
    """
    if not path.exists():
        raise UsageError(f"{path} does not exist. Give a folder of videos with a .txt beside each.")
    file = path
    if path.is_dir():
        if (path / UNFINISHED).is_file():
            raise UsageError(
                f"{path} holds no videos, but a data set that slagen prepares. Where it is done it is for finetune "
                "--data; where it was not prepared to its end, prepare it again from its videos."
            )
        listed = find_list(path)
        if listed is None:
            videos = _videos(path)
            if any(_text_beside(video).is_file() for video in videos) or (listed := find_list_below(path)) is None:
                return _folder(path, videos)
        file = listed
    faults: list[str] = []
    found: list[Footage] = []
    for where, video, caption in read_list(file, faults):
        if not isinstance(video, str) or not video.strip():
            faults.append(f"{where}: names no video")
            continue
        caption = _caption(caption)
        if not caption:
            faults.append(f"{where}: has no caption of 1 to {MAX_CAPTION} characters of text")
            continue
        place = next((p for p in _places(file.parent, video) if _is_file(p)), None)
        if place is None:
            pictures = any(_is_folder(p) for p in _places(file.parent, video))
            what = "is a folder, of pictures perhaps, and no video" if pictures else "does not exist"
            faults.append(f"{where}: {video:.200} {what}")
        else:
            found.append(Footage(place, caption, where))
    if not found and not faults:
        raise UsageError(f"{file} names no video. Give a list of videos and captions, or a folder of them.")
    return found, faults


def _videos(path: Path) -> list[Path]:
    """All videos below a folder, and links that lead to none."""
    return sorted(
        file for file in _files(path) if file.suffix.lower() in SUFFIXES and (file.is_file() or file.is_symlink())
    )


def _text_beside(video: Path) -> Path:
    return next((t for t in map(video.with_suffix, (".txt", ".TXT")) if t.is_file()), video.with_suffix(".txt"))


def _folder(path: Path, videos: list[Path]) -> tuple[list[Footage], list[str]]:
    """Videos with a text beside each."""
    if not videos:
        raise UsageError(
            f"{path} holds no videos ({', '.join(sorted(SUFFIXES))}) and no list of them ({', '.join(NAMES)}, *.jsonl)."
        )
    faults, found = [], []
    for video in videos:
        where = str(video.relative_to(path))
        text = _text_beside(video)
        if not video.is_file():
            faults.append(f"{where}: is a link that leads nowhere")
            continue
        try:
            caption = _caption(decode(read_bytes(text, MAX_CAPTION_FILE)))
        except (OSError, Fault):
            faults.append(f"{where}: {text.name} beside it is missing, or no UTF-8")
            continue
        if not caption:
            faults.append(f"{where}: {text.name} beside it has not 1 to {MAX_CAPTION} characters of text")
            continue
        found.append(Footage(video, caption, where))
    return found, faults


def _files(path: Path) -> Iterator[Path]:
    """All files below a folder, through links too, but for hidden ones; each folder once."""
    seen = set()
    for folder, folders, names in os.walk(path, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(folder, name) for name in names if not name.startswith("."))


def _caption(value: Any) -> str:
    """A caption as one line; FastVideo gives a list, of which the first counts. Empty where there is none."""
    if isinstance(value, list):
        value = value[0] if value else ""
    caption = " ".join(value.split()) if isinstance(value, str) else ""
    is_text = all(char != "\0" and not "\ud800" <= char <= "\udfff" for char in caption)
    return caption if is_text and len(caption) <= MAX_CAPTION else ""


def _places(folder: Path, name: str) -> list[Path]:
    """Where a list may mean: beside it, in its folder `videos`, as FastVideo has it, or from here, as musubi has it."""
    return [folder / name, folder / "videos" / name, Path(name)]


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # no name that a file can have
        return False


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def tell(faults: list[str]) -> None:
    """Raise UsageError with all that is wrong with a data set, if anything is."""
    if faults:
        count = "one fault" if len(faults) == 1 else f"{len(faults)} faults"
        raise UsageError(f"the data set has {count}:", *faults)


def plan_cuts(
    footage: list[Footage], full: Cut, grid: int, faults: Sequence[str] = (),
    on_look: Callable[[int], None] = lambda number: None,
) -> list[Cut]:  # fmt: skip
    """Look at every video and choose the form of its clip: the nearest of a few sizes, the longest of a few lengths.

    Args:
        full: the largest area and length. grid: width and height are multiples of this.
        faults: of the set, known before. on_look: told of each video's number before it is looked at.
    Raises: UsageError with those, and every video that cannot be read, has no pictures, or is too short.
    """
    sizes = _sizes(full, grid)
    fewest = min(full.num_frames, MIN_FRAMES)
    lengths = sorted({max(fewest, (int(full.num_frames * part) - 1) // 4 * 4 + 1) for part in LENGTHS}, reverse=True)
    found, cuts = list(faults), []
    for number, item in enumerate(footage):
        on_look(number)
        try:
            duration, unit, width, height, interlaced = _probe(item.path, full.num_frames / full.fps + 1)
        except _Unreadable as error:
            found.append(f"{item.where}: {item.path.name} {error}")
            continue
        frames = math.floor((duration + _slack(unit, full)) * full.fps) + 1
        length = next((length for length in lengths if length <= frames), None)
        if length is None:
            least = (lengths[-1] - 1) / full.fps
            found.append(
                f"{item.where}: {item.path.name} is {duration:.2f} s long, but at least {least:.2f} s are needed"
            )
            continue
        best = min(sizes, key=lambda size: abs(math.log(size[0] / size[1] * height / width)))
        cuts.append(Cut(*best, length, full.fps, interlaced))
    tell(found)
    return cuts


def _slack(unit: float, cut: Cut) -> float:
    """How far a timestamp may be off, in seconds: containers round it to units of theirs, Matroska to milliseconds."""
    return min(unit, 0.25 / cut.fps) + 1e-6


def _sizes(full: Cut, grid: int) -> list[tuple[int, int]]:
    """Sizes of about one area: the model's own, that upside down, and a few ratios between."""
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
    """A container of a kind that holds its own pictures."""
    return _av().open(str(path.absolute()), metadata_errors="replace", options={"format_whitelist": FORMATS})


def _shape(stream: Any, frame: Any) -> tuple[float, float, int]:
    """Width and height as they are to be seen, in pixels, and by how many quarters of a turn to the left they are."""
    turns = round(frame.rotation / 90) % 4
    width, height = frame.width * float(stream.sample_aspect_ratio or 1), float(frame.height)
    return (height, width, turns) if turns % 2 else (width, height, turns)


def _probe(path: Path, enough: float) -> tuple[float, float, float, float, bool]:
    """Seconds from the first frame to the last, or `enough`, and of a unit of time; width and height of one frame, and
    whether the first few are interlaced."""
    av = _av()
    try:
        with _open(path) as container:
            if not container.streams.video:
                raise _Unreadable("has sound but no pictures")
            stream = container.streams.video[0]
            frames = container.decode(stream)
            frame = next(frames, None)
            if frame is None:
                raise _Unreadable("holds no frame")
            width, height, _ = _shape(stream, frame)
            interlaced = frame.interlaced_frame or is_interlaced(frames)
        with _open(path) as container:
            stream = container.streams.video[0]
            packets = (packet for packet in container.demux(stream) if not packet.is_discard)
            unit = float(stream.time_base)
            first = last = frame.pts  # what lies before the first frame that can be decoded is never shown
            for packet in packets:
                if packet.pts is not None:
                    first = packet.pts if first is None else first
                    last = packet.pts if last is None else max(last, packet.pts)
                    if (last - first) * unit > enough:
                        break
    except (av.FFmpegError, OSError, ValueError) as error:
        raise _Unreadable(f"cannot be decoded ({error})") from error
    duration = (last - first) * unit if first is not None and last is not None else 0.0
    return duration, unit, width, height, interlaced


def read_cut(path: Path, cut: Cut) -> np.ndarray:
    """A clip of a video: at each of its times, the frame that is shown then by the video's own timestamps.

    Returns: (num_frames, height, width, 3) uint8 RGB.
    Raises: UsageError where the video ends too soon or cannot be decoded.
    """
    av = _av()
    picked: list[np.ndarray] = []
    shown: Any = None
    start = last = math.nan
    try:
        with _open(path) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            slack = _slack(float(stream.time_base), cut)
            for frame, time in whole_frames(container, stream):
                start = time if shown is None else start
                if shown is not None and time < last:
                    raise UsageError(
                        f"{path} has timestamps that go back. Write it anew: ffmpeg -i {path.name} new.mp4"
                    )
                while shown is not None and len(picked) < cut.num_frames:
                    if len(picked) / cut.fps + start >= time - slack:
                        break
                    picked.append(_fit(shown, stream, cut))
                shown, last = frame, time
                if len(picked) == cut.num_frames:
                    break
            while shown is not None and len(picked) < cut.num_frames:
                if len(picked) / cut.fps + start > last + slack:
                    break
                picked.append(_fit(shown, stream, cut))
    except (av.FFmpegError, OSError, ValueError, IndexError) as error:
        raise UsageError(f"{path} cannot be decoded ({error}).") from error
    if len(picked) < cut.num_frames:
        raise UsageError(
            f"{path} gives {counted(len(picked), 'frame')} at {cut.fps} a second, but {cut.num_frames} are needed."
        )
    return np.stack(picked)


def _fit(frame: Any, stream: Any, cut: Cut) -> np.ndarray:
    """A frame as it is to be seen, scaled to cover the clip's size, and cropped around its middle."""
    width, height, turns = _shape(stream, frame)
    factor = max(cut.width / width, cut.height / height)
    size = max(cut.width, round(width * factor)), max(cut.height, round(height * factor))
    lying = size[::-1] if turns % 2 else size
    picture = frame.to_ndarray(format="rgb24", width=lying[0], height=lying[1], interpolation="BICUBIC")
    left, top = (size[0] - cut.width) // 2, (size[1] - cut.height) // 2
    return np.ascontiguousarray(np.rot90(picture, turns)[top : top + cut.height, left : left + cut.width])
