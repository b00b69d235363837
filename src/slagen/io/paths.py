"""What the path of an output means: one video and of which kind, or a folder of videos."""

from __future__ import annotations

import os
import re
from pathlib import Path

from slagen.errors import UsageError
from slagen.io.forms import shown
from slagen.io.text import line, quote_path

VIDEO, WEBM, GIF, FRAMES = ".mp4", ".webm", ".gif", ".frames"  # what a video is written as, by the end of its name
KINDS = (VIDEO, WEBM, GIF, FRAMES)
WANTED = f"a file that ends in {VIDEO}, {WEBM} or {GIF}, or, for a folder of PNG frames, a name that ends in {FRAMES}"


def is_video(text: str) -> bool:
    """Whether an output is one video; otherwise a slash at the end makes a folder of any name."""
    return _suffix(text) in KINDS or _suffix(text.rstrip("/")) == FRAMES


def kind_of(path: str | Path) -> str:
    """What a video is written as, by its name: one of KINDS, an MP4 where it is none of them."""
    suffix = Path(path).suffix.lower()
    return suffix if suffix in KINDS else VIDEO


def kind_of_output(text: str) -> str:
    """What an output's videos are written as: of a folder they are MP4."""
    return kind_of(text) if is_video(text) else VIDEO


def is_frames(path: Path) -> bool:
    """Whether a folder is such as slagen writes frames into, and holds nothing else."""
    return kind_of(path) == FRAMES and path.is_dir() and all(re.fullmatch(r"\d{4,}\.png", n) for n in os.listdir(path))


def check_not_taken(path: Path, overwrite: bool, other: str = "--output") -> None:
    """Raise UsageError where something is there that must stay: anything unless it is to be overwritten, and in any
    case a folder of anything but frames.

    Args:
        other: the options that name another path.
    """
    if path.is_dir() and not is_frames(path):
        raise UsageError(f"{path} is a folder of other files, which slagen does not replace. Choose another {other}.")
    if os.path.lexists(path) and not overwrite:
        raise UsageError(f"{path} exists. Choose another {other}, or replace it with --overwrite.")


def check_output(text: str) -> None:
    """Raise UsageError where an output is neither a video that can be written nor a folder."""
    if not is_video(text):
        check_folder("output", text, f"a folder, {WANTED}")


def check_video(output: str | None) -> None:
    """Raise UsageError where an output is given that is no video's file."""
    if output is not None and not is_video(output):
        raise UsageError(f"output is {quote_path(output)}, but must be {WANTED}.")


def check_folder(name: str, text: str, wanted: str = "a folder") -> None:
    """Raise UsageError where what is to be a folder is called as a file would be, and no folder is there.

    Args:
        name: of the option, for the message. wanted: what it takes.
    """
    if not text.strip():
        raise UsageError(f"the {name} is empty. Give {wanted}.")
    suffix = _suffix(text.rstrip())
    if suffix and not os.path.isdir(os.path.expanduser(text)):
        raise UsageError(
            f"the {name} is {quote_path(text)}, but must be {wanted}. For a folder of that name, put a slash at its "
            f"end: {line(text)}/"
        )


def check_utf8(path: str | Path) -> None:
    """Raise UsageError for a path with other bytes than UTF-8, which safetensors and tokenizers do not open."""
    try:
        os.path.abspath(path).encode()
    except UnicodeEncodeError:
        raise UsageError(
            f"the path of {quote_path(path)} has bytes that are not UTF-8, so safetensors cannot open the file. "
            "Rename it."
        ) from None


def _suffix(text: str) -> str:
    """The suffix that shows a file's kind, in lower case; empty for `day:1`, `v1.2` and `outputs/`."""
    match = re.search(r"\.[a-z][a-z0-9]{0,11}$", os.path.basename(text), re.IGNORECASE)
    return match[0].lower() if match else ""


def user_path(text: str | Path) -> Path:
    """A path as a person writes it, `~` being their home. Raises UsageError for what no path can be."""
    if not str(text).strip():
        raise UsageError("a path is empty. Give a file or a folder, or leave the option out.")
    try:
        path = Path(text).expanduser()
        path.exists()
    except RuntimeError:
        name = str(text).split("/")[0]
        raise UsageError(
            f"{quote_path(text)} begins with {shown(name)}, but this machine has no such user. Write the full "
            f"path, or ./{name} for a file of that name."
        ) from None
    except OSError as error:
        raise UsageError(f"{quote_path(text)} cannot be used as a path ({error.strerror}).") from None
    if "\0" in str(text):
        raise UsageError(f"{quote_path(text)} contains a NUL byte, which is not allowed in a path. Remove it.")
    return path
