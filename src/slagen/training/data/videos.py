"""Find the videos and captions of a data set, and every fault in it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slagen.errors import UsageError
from slagen.io.documents import decode, read_bytes
from slagen.io.forms import Fault
from slagen.io.text import MAX_PROMPT
from slagen.training.data.video_lists import NAMES, check_data_path, find_list, find_list_below, read_list

SUFFIXES = {
    ".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".gif", ".wmv", ".asf", ".flv", ".mpg", ".mpeg", ".ts", ".m2ts",
    ".mts", ".3gp", ".ogv",
}  # fmt: skip
MAX_CAPTION = MAX_PROMPT
MAX_CAPTION_FILE = 2**20
UNFINISHED = "tensors.jsonl"  # of a prepared set


@dataclass(frozen=True)
class SourceVideo:
    """A video and its caption.

    Args:
        where: the line or file that names it, for messages.
    """

    path: Path
    caption: str
    where: str


def find_videos(path: Path) -> tuple[list[SourceVideo], list[str]]:
    """Find the videos and captions of a data set, and what is wrong with it.

    Args:
        path: a folder of videos with a .txt beside each; a .csv, .json or .jsonl with the keys of musubi (`video_path`,
            `caption`), FastVideo (`path`, `cap`), DiffSynth (`video`, `prompt`) or Hugging Face (`file_name`, and
            `text`, `caption` or `prompt`); or a folder with one.
    Returns: the videos, and the faults, which `plan_clips` raises together with its own.
    Raises: UsageError where the path is not a data set.
    """
    check_data_path(path)
    file = path
    if path.is_dir():
        if (path / UNFINISHED).is_file():
            raise UsageError(
                f"{path} is a data set prepared by slagen, not a folder of videos. If it is complete, give it to "
                "finetune --data; if its preparation was interrupted, prepare it again from its videos."
            )
        listed = find_list(path)
        if listed is None:
            videos = _videos(path)
            if any(_text_beside(video).is_file() for video in videos) or (listed := find_list_below(path)) is None:
                return _folder(path, videos)
        file = listed
    faults: list[str] = []
    found: list[SourceVideo] = []
    for where, video, caption in read_list(file, faults):
        if not isinstance(video, str) or not video.strip():
            faults.append(f"{where}: the entry has no video")
            continue
        caption = _caption(caption)
        if not caption:
            faults.append(f"{where}: the entry needs a caption of 1 to {MAX_CAPTION} characters")
            continue
        place = next((p for p in _places(file.parent, video) if _is_file(p)), None)
        if place is None:
            pictures = any(_is_folder(p) for p in _places(file.parent, video))
            what = "is a folder (of images?), not a video" if pictures else "does not exist"
            faults.append(f"{where}: {video:.200} {what}")
        else:
            found.append(SourceVideo(place, caption, where))
    if not found and not faults:
        raise UsageError(f"{file} lists no videos. Give a list of videos and captions, or a folder of videos.")
    return found, faults


def _videos(path: Path) -> list[Path]:
    """All videos below a folder, and broken links to videos."""
    return sorted(
        file for file in _files(path) if file.suffix.lower() in SUFFIXES and (file.is_file() or file.is_symlink())
    )


def _text_beside(video: Path) -> Path:
    return next((t for t in map(video.with_suffix, (".txt", ".TXT")) if t.is_file()), video.with_suffix(".txt"))


def _folder(path: Path, videos: list[Path]) -> tuple[list[SourceVideo], list[str]]:
    """Videos with a caption file beside each."""
    if not videos:
        raise UsageError(
            f"{path} contains no videos ({', '.join(sorted(SUFFIXES))}) and no list of them ({', '.join(NAMES)}, "
            "*.jsonl). Give a folder that does."
        )
    faults, found = [], []
    for video in videos:
        where = str(video.relative_to(path))
        text = _text_beside(video)
        if not video.is_file():
            faults.append(f"{where}: the video is a broken link")
            continue
        try:
            caption = _caption(decode(read_bytes(text, MAX_CAPTION_FILE)))
        except (OSError, Fault):
            faults.append(f"{where}: the caption file {text.name} is missing or not UTF-8")
            continue
        if not caption:
            faults.append(f"{where}: the caption file {text.name} must contain 1 to {MAX_CAPTION} characters of text")
            continue
        found.append(SourceVideo(video, caption, where))
    return found, faults


def _files(path: Path) -> Iterator[Path]:
    """All files below a folder except hidden ones; links are followed, and each folder is visited once."""
    seen = set()
    for folder, folders, names in os.walk(path, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(folder, name) for name in names if not name.startswith("."))


def _caption(value: Any) -> str:
    """A caption as one line, empty where there is none; of a list, as FastVideo has it, the first one."""
    if isinstance(value, list):
        value = value[0] if value else ""
    caption = " ".join(value.split()) if isinstance(value, str) else ""
    is_text = all(char != "\0" and not "\ud800" <= char <= "\udfff" for char in caption)
    return caption if is_text and len(caption) <= MAX_CAPTION else ""


def _places(folder: Path, name: str) -> list[Path]:
    """Where a listed video may be: beside the list, in `videos` beside it (FastVideo), or relative to here (musubi)."""
    return [folder / name, folder / "videos" / name, Path(name)]


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # not a valid file name
        return False


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False
