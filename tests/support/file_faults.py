"""Every operation on files that a run does, numbered: how the disk looks if it dies there, and what if one fails.

Python's own operations are seen by an audit hook before they are done, and so is the start of ffmpeg; writing and
syncing bytes, and safetensors' writer, are replaced. A run that dies before operation N leaves exactly what is on the
disk then, so one run with a copy of the folder before each operation stands for all kills, and its copies, whose locks
are free, for what the next run finds. In between, a file that is half written is put there.
"""

import errno
import fnmatch
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
WITH_PATHS = {"os.remove": 1, "os.rename": 2, "os.mkdir": 1, "os.rmdir": 1, "os.link": 2, "os.chmod": 1}
TEMPORARY = (".slagen-*.tmp", "*.slagen-lock", "*.part", ".tmp??????")
FAULTS = (errno.ENOSPC, errno.EIO, errno.EACCES)
MAKING = {"open", "os.mkdir", "os.link", "write", "fsync", "safetensors"}  # what a full disk does not let one do


class Watch:
    """Numbers the operations on files below a folder.

    Args:
        before: called with the number, what is done, and to which path; what it raises, the operation raises.
        half: called with a path and half of what is written there.
    """

    active: "Watch | None" = None

    def __init__(
        self, root: Path, before: Callable[[int, str, str], None], half: Callable[[str, bytes], None] = lambda *_: None
    ) -> None:
        self.root, self.before, self.half = str(root.resolve()), before, half
        self.count = 0
        self.busy = False

    def told(self, what: str, path: str) -> None:
        if self.busy or not path.startswith(self.root):
            return
        self.busy = True
        try:
            self.count += 1
            self.before(self.count, what, path)
        finally:
            self.busy = False

    def half_written(self, path: str, data: bytes) -> None:
        if not self.busy and path.startswith(self.root):
            self.busy = True
            try:
                self.half(path, data)
            finally:
                self.busy = False


def _full(path: Any, directory: int) -> str:
    path = os.fsdecode(path)
    if directory >= 0 and not os.path.isabs(path):
        return os.path.join(os.readlink(f"/proc/self/fd/{directory}"), path)
    return os.path.abspath(path)


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    watch = Watch.active
    if watch is None or watch.busy:
        return
    if event == "open":
        path, _, flags = arguments
        if isinstance(path, str | bytes | os.PathLike) and flags & WRITING:
            watch.told(event, _full(path, -1))
    elif event in WITH_PATHS:
        path = arguments[WITH_PATHS[event] - 1]
        if not isinstance(path, int):
            watch.told(event, _full(path, arguments[-1]))  # the last is the folder that a relative path begins in
    elif event == "subprocess.Popen":
        for path in (argument for argument in arguments[1] if os.fsdecode(argument).startswith(watch.root)):
            if not os.path.exists(path):  # what it is to write
                watch.told("ffmpeg", os.fsdecode(path))
                watch.half_written(os.fsdecode(path), b"\0\0\0 ftypisom" + b"\0" * 100)


def _file(descriptor: int) -> str:
    return os.readlink(f"/proc/self/fd/{descriptor}")


_write, _fsync, _serialize = os.write, os.fsync, safetensors.torch.serialize_file
_installed: list[bool] = []


def _watched_write(descriptor: int, data: Any) -> int:
    if (watch := Watch.active) is not None and not watch.busy:
        path = _file(descriptor)
        watch.told("write", path)
        if os.path.isfile(path):
            watch.half_written(path, Path(path).read_bytes() + bytes(data)[: len(data) // 2])
    return _write(descriptor, data)


def _watched_fsync(descriptor: int) -> None:
    if (watch := Watch.active) is not None:
        watch.told("fsync", _file(descriptor))
    _fsync(descriptor)


def _watched_serialize(tensors: Any, path: Any, *rest: Any, **options: Any) -> None:
    if (watch := Watch.active) is not None:
        full = os.path.abspath(path)
        try:
            watch.told("safetensors", full)
        except OSError as error:
            raise safetensors.SafetensorError(f"Error while serializing: I/O error: {error}") from error
        watch.half_written(os.path.join(os.path.dirname(full), ".tmpAbC123"), b"\x40\0\0\0\0\0\0\0{")
    _serialize(tensors, path, *rest, **options)


@contextmanager
def watching(watch: Watch) -> Iterator[Watch]:
    """Have a watch told of all operations. The hook stays when it ends, for Python removes none."""
    if not _installed:
        sys.addaudithook(_hook)
        _installed.append(True)
    os.write, os.fsync, safetensors.torch.serialize_file = _watched_write, _watched_fsync, _watched_serialize
    Watch.active = watch
    try:
        yield watch
    finally:
        Watch.active = None
        os.write, os.fsync, safetensors.torch.serialize_file = _write, _fsync, _serialize


def kills(run: Callable[[], Any], root: Path, copies: Path) -> list[tuple[str, Path]]:
    """Run to the end once; returns what was about to be done, or half done, and a copy of the folder as it was then."""
    found: list[tuple[str, Path]] = []

    def copy(what: str) -> Path:
        place = copies / f"{len(found) + 1:05d}"
        shutil.copytree(root, place, symlinks=True)
        found.append((what, place))
        return place

    def half(path: str, data: bytes) -> None:
        place = copy(f"half {os.path.basename(path)}")
        (place / os.path.relpath(path, root.resolve())).write_bytes(data)

    with watching(Watch(root, lambda number, what, path: (copy(f"{what} {os.path.basename(path)}"), None)[1], half)):
        run()
    return found


def failing(run: Callable[[], int], root: Path, number: int, fault: int) -> tuple[int, bool]:
    """Run with operation `number` failing, and with a full disk all that follow and make something; returns the exit
    code, and whether it came to that operation."""
    reached = False

    def fail(count: int, what: str, path: str) -> None:
        nonlocal reached
        if count == number or (count > number and fault == errno.ENOSPC and what in MAKING):
            reached = True
            raise OSError(fault, os.strerror(fault), path)

    with watching(Watch(root, fail)):
        return run(), reached


def is_temporary(path: Path) -> bool:
    return any(fnmatch.fnmatch(part, pattern) for part in path.parts for pattern in TEMPORARY)


def names(root: Path) -> list[str]:
    """Every file below a folder, and every folder that is empty."""
    return sorted(
        str(path.relative_to(root)) for path in root.rglob("*") if path.is_file() or not any(path.iterdir())
    )  # fmt: skip


def state(root: Path) -> str:
    """A folder but for what differs from run to run: random names, times in reports."""
    rows = []
    for name in names(root):
        file = root / name
        stage = next((part for part in Path(name).parts if fnmatch.fnmatch(part, ".slagen-*.tmp")), "-")
        known = hashlib.sha256(file.read_bytes()).hexdigest() if file.suffix in (".mp4", ".safetensors") else ""
        lines = file.read_bytes().count(b"\n") if file.suffix == ".jsonl" else 0
        rows.append([name.replace(stage, "stage"), "" if is_temporary(Path(name)) else known, lines])
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def half_files(root: Path) -> list[str]:
    """Files under final names that are not whole, and reports that are of another video."""
    wrong = []
    for file in (path for path in root.rglob("*") if path.is_file()):
        name = file.relative_to(root)
        if is_temporary(name):
            continue
        data = file.read_bytes()
        try:
            if file.suffix == ".json":
                content = json.loads(data)
                video = file.with_suffix(".mp4")
                if "latents_hash" in content and video.is_file():
                    assert content["video"]["sha256"] == hashlib.sha256(video.read_bytes()).hexdigest()
            elif file.suffix == ".safetensors":
                safetensors.torch.load(data)
            elif file.suffix == ".mp4":
                assert _boxes(data) >= {b"ftyp", b"moov", b"mdat"}
            elif file.suffix == ".html":
                assert data.rstrip().endswith(b"</html>")
        except (AssertionError, ValueError, safetensors.SafetensorError) as error:
            wrong.append(f"{name}: {error!r}")
    return wrong


def _boxes(data: bytes) -> set[bytes]:
    """The kinds of an MP4's outermost boxes, which must fill it exactly."""
    at, found = 0, set()
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        found.add(data[at + 4 : at + 8])
        assert size >= 8
        at += size
    assert at == len(data)
    return found
