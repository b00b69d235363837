"""Files and folders to write: whole under their final name or not there, and two runs never in each other's way.

A file is written in a stage beside its final place and moved there when it is whole; `stages.py` says how.
`sweep` clears up after killed runs: it finishes what was ready, or puts everything back, and deletes the rest.
`reserved` gives a final name to one run at a time.
"""

from __future__ import annotations

import errno
import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import Timeout

from slagen.errors import SlagenError
from slagen.io.locks import acquire_lock, release_lock, try_lock
from slagen.io.stages import NOT_LINKED, STAGES, clear_stage, staging
from slagen.io.text import to_json

RESERVATIONS = ".*.slagen-lock"


@contextmanager
def writing(path: Path, *, replace: bool = True) -> Iterator[Path]:
    """Where to write a file or folder, which gets its final name when the block has ended well.

    Args:
        path: its final place, in a folder that is there.
        replace: what lies there is replaced; otherwise it stays, and FileExistsError is raised.
    Raises: OSError, with `path` as it was before.
    """
    path = Path(os.path.abspath(path))
    with staging(path.parent) as stage:
        yield stage.folder / path.name
        stage.publish(replace=replace)


def write_bytes(path: Path, data: bytes, *, replace: bool = True) -> None:
    """Write a file, whole or not at all. Raises as `writing`."""
    with writing(path, replace=replace) as part:
        _put(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, data)


def write_text(path: Path, text: str, *, replace: bool = True) -> None:
    """Write a text file in UTF-8, whole or not at all. Raises as `writing`."""
    write_bytes(path, text.encode(), replace=replace)


def write_json(path: Path, content: dict[str, Any], *, replace: bool = True) -> None:
    """Write a JSON file, whole or not at all. Raises as `writing`."""
    write_text(path, to_json(content, indent=2, allow_nan=False) + "\n", replace=replace)


def append(path: Path, data: bytes) -> None:
    """Add lines to a file, which is made if need be, synced; a line that a crash tore is closed first.

    Raises: OSError where the disk does not take it, and for a link, whose target is no file of this folder.
    """
    if path.is_symlink():  # not all systems know O_NOFOLLOW
        raise OSError(errno.ELOOP, "it is a link, and slagen does not write through links", str(path))
    _put(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, data)


def replace_bytes(path: Path, old: bytes, new: bytes) -> None:
    """Put other bytes, as many, in the place of those that a file holds once. Raises OSError where it does not."""
    assert len(old) == len(new)
    with open(path, "r+b") as handle:
        data = handle.read()
        if data.count(old) != 1:
            raise OSError(f"the file holds what it says of itself {data.count(old)} times")
        handle.seek(data.index(old))
        handle.write(new)


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder for what is of no use afterwards, on the disk for temporary files; what killed runs left there goes."""
    place = Path(tempfile.gettempdir())
    sweep(place)
    with staging(place) as stage:
        yield stage.folder


def check_writable(folder: Path) -> None:
    """Make a folder and see that it takes files. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    with staging(folder) as stage:
        (stage.folder / "probe").write_bytes(b"\0" * 4096)


@contextmanager
def reserved(*paths: Path) -> Iterator[None]:
    """Be the only run that writes some paths, and clear away what killed runs left beside them.

    Raises: SlagenError where another run has one of them, or where their folders take no files.
    """
    for folder in dict.fromkeys(path.parent for path in paths):
        try:
            check_writable(folder)
        except OSError as error:
            raise SlagenError(
                f"{folder} is not writable ({error.strerror or error}). Choose another output."
            ) from error
        sweep(folder)
    with ExitStack() as held:
        for path in paths:
            try:
                lock = acquire_lock(_reservation(path))
            except Timeout as error:
                raise SlagenError(
                    f"another slagen run is writing {path}. Wait until it ends, or choose another output."
                ) from error
            if lock is not None:
                held.callback(release_lock, lock)
        yield


def sweep(folder: Path) -> None:
    """Finish or undo what killed runs left in a folder, and delete their temporary files; those of the living stay."""
    for root in folder.glob(STAGES):
        with suppress(OSError):
            clear_stage(root, folder)
    for file in folder.glob(RESERVATIONS):
        with suppress(OSError):
            if (lock := try_lock(file)) is not None:
                release_lock(lock)


def delete(path: Path) -> None:
    """Delete a file, or a folder so that it is never there in part. Raises OSError; what is not there is no error."""
    with suppress(FileNotFoundError):
        if path.is_symlink() or not path.is_dir():
            path.unlink()
            return
        with staging(path.parent) as stage:
            os.rename(path, stage.folder / path.name)


def _reservation(path: Path) -> Path:
    """The lock of a final name, beside it; where the name is too long to have one, by its hash."""
    name = f".{path.name}.slagen-lock"
    if len(os.fsencode(name)) > 255:
        name = f".{hashlib.sha256(os.fsencode(path.name)).hexdigest()}.slagen-lock"
    return path.with_name(name)


def _put(path: Path, flags: int, data: bytes) -> None:
    """Write bytes and sync them; through no link. Where they are appended to a torn line, that is closed first."""
    descriptor = os.open(path, flags | NOT_LINKED, 0o666)
    try:
        if flags & os.O_APPEND and os.lseek(descriptor, 0, os.SEEK_END):
            os.lseek(descriptor, -1, os.SEEK_END)
            if os.read(descriptor, 1) != b"\n":
                data = b"\n" + data
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
