"""Every write to the disk: whole under its final name or not there, and two runs never in each other's way.

What is to be written lies in a stage until it is whole: a folder `.slagen-<host>-<random>.tmp` beside its final place,
which only its maker may enter and whose lock it holds while it lives. So nothing that was planted there is followed,
and what a writer such as ffmpeg or safetensors leaves when it dies lies in the stage too. Publishing syncs the files,
gives them the permissions that the umask asks for, and renames the stage's `new` to `ready`: from then on it can be
finished by anyone. What lies at the final places is moved to `old`, what is ready is moved in, and the stage goes.

`sweep` clears stages whose locks are free, for their makers are dead: it finishes what was ready, or puts everything
back, and deletes the rest. `reserved` gives a final name to one run at a time.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, Timeout

from slagen.errors import MissingPath, SlagenError, WeightsError
from slagen.io.text import to_json

NEW, READY, OLD, LOCK = "new", "ready", "old", "lock"
STAGES, RESERVATIONS = ".slagen-*.tmp", ".*.slagen-lock"
SWEEP_S = 1.0  # a sweep holds the locks that it tries for far less
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
OTHER_HOST_S = 86400.0  # on some network disks locks do not reach other hosts
NOT_LINKED = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)


class Stage:
    """Files and folders that are being written, to be published in one folder.

    Args:
        target: the folder that they are for.
        root: the stage's own folder. folder: what is written here is published.
    """

    def __init__(self, target: Path, root: Path) -> None:
        self.target, self.root, self.folder = target, root, root / NEW

    def publish(self, *, replace: bool = True, without: tuple[str, ...] = ()) -> None:
        """Move everything to its final place: all of it, also when the process is killed now and the folder is swept.

        Args:
            replace: what lies there goes; otherwise FileExistsError is raised, and nothing changes.
            without: names that go as well, though nothing takes their place.
        Raises: OSError, with everything as it was before.
        """
        for left in self.folder.rglob(STAGES):  # of a file that was written within, and could not be deleted
            shutil.rmtree(left)
        _settle(self.folder)
        names = sorted(os.listdir(self.folder))
        for name in names:
            if (self.folder / name).is_file() and (self.target / name).is_dir():  # whose content nobody named
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(self.target / name))
        going = [name for name in (*names, *without) if replace and os.path.lexists(self.target / name)]
        if replace and len(names) == 1 and going in ([], names) and (self.folder / names[0]).is_file():
            os.replace(self.folder / names[0], self.target / names[0])  # in one step
            return
        ready = self.root / READY
        os.rename(self.folder, ready)
        try:
            (self.root / OLD).mkdir()
            for name in going:
                os.rename(self.target / name, self.root / OLD / name)
            for name in names:
                _move(ready / name, self.target / name, replace)
        except BaseException:
            self._take_back(names)
            raise

    def _take_back(self, names: list[str]) -> None:
        """Undo what has been moved. Where that fails too, the stage stays for the next sweep."""
        ready = self.root / READY
        for name in names:
            if not os.path.lexists(ready / name):
                os.rename(self.target / name, ready / name)
            elif _is_same(ready / name, self.target / name):
                (self.target / name).unlink()
        _put_back(self.root, self.target)
        os.rename(ready, self.folder)


@contextmanager
def staging(folder: Path) -> Iterator[Stage]:
    """A stage beside what is to be written in a folder, which must be there; what is not published is deleted."""
    stage, lock = _new_stage(folder)
    try:
        yield stage
    finally:
        if not any((stage.root / READY).glob("*")):  # otherwise the disk let it neither go on nor back
            _delete_stage(stage.root)
        if lock is not None:
            lock.release()


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


def open_regular(path: Path) -> BufferedReader:
    """A regular file to read. Raises OSError, also for one of another kind: a pipe may wait for its writer for ever."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return open(descriptor, "rb")


def file_hash(path: Path) -> str:
    """SHA-256 of a regular file, in hex. Raises OSError, as `open_regular`."""
    with open_regular(path) as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def kind_of_path(path: Path) -> str:
    """What lies at a path, as a message says it: "does not exist", or "is a named pipe"."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return "is a link to nothing" if path.is_symlink() else "does not exist"
    except OSError as error:
        return f"cannot be looked at ({error.strerror})"
    kinds = {stat.S_IFREG: "file", stat.S_IFDIR: "folder", stat.S_IFIFO: "named pipe", stat.S_IFSOCK: "socket"}
    return f"is a {kinds.get(stat.S_IFMT(mode), 'device')}"


def no_file(path: Path, advice: str) -> WeightsError:
    """The error for a path that was given and holds no file; where nothing lies at all, it is wrong usage."""
    kind = WeightsError if path.exists() else MissingPath
    return kind(f"{path} {kind_of_path(path)}. {advice}")


def write_json(path: Path, content: dict[str, Any], *, replace: bool = True) -> None:
    """Write a JSON file, whole or not at all. Raises as `writing`."""
    write_text(path, to_json(content, indent=2, allow_nan=False) + "\n", replace=replace)


def append(path: Path, data: bytes) -> None:
    """Add lines to a file, which is made if need be, synced; a line that a crash tore is closed first.

    Raises: OSError where the disk does not take it, and for a link, whose target is no file of this folder.
    """
    if path.is_symlink():  # not all systems know O_NOFOLLOW
        raise OSError(errno.ELOOP, "it is a link, and slagen writes through none", str(path))
    _put(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, data)


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
                f"{folder} takes no files ({error.strerror or error}). Give an output that you can write to."
            ) from error
        sweep(folder)
    with ExitStack() as held:
        for path in paths:
            try:
                lock = _take_if_known(_reservation(path))
            except Timeout as error:
                raise SlagenError(
                    f"another slagen run is writing {path}. Wait until it has ended, or give another --output."
                ) from error
            if lock is not None:
                held.callback(_free, lock)
        yield


def sweep(folder: Path) -> None:
    """Finish or undo what killed runs left in a folder, and delete their temporary files; those of the living stay."""
    for root in folder.glob(STAGES):
        with suppress(OSError):
            _clear_stage(root, folder)
    for file in folder.glob(RESERVATIONS):
        with suppress(OSError):
            if (lock := _take(file)) is not None:
                _free(lock)


def delete(path: Path) -> None:
    """Delete a file, or a folder so that it is never there in part. Raises OSError; what is not there is no error."""
    with suppress(FileNotFoundError):
        if path.is_symlink() or not path.is_dir():
            path.unlink()
            return
        with staging(path.parent) as stage:
            os.rename(path, stage.folder / path.name)


# Stages


def _new_stage(folder: Path) -> tuple[Stage, BaseFileLock | None]:
    """A stage of one's own, with its lock held, where the disk has locks."""
    while True:
        root = folder / f".slagen-{_host()}-{secrets.token_hex(8)}.tmp"
        root.mkdir(mode=0o700)
        try:
            try:
                lock = _take_if_known(root / LOCK)
            except Timeout:  # nobody else knows of it: so some versions of filelock say that a disk has no locks
                lock = None
            (root / NEW).mkdir()
        except FileNotFoundError:
            if not folder.is_dir():
                raise
            continue  # swept before its lock was held
        except BaseException:
            shutil.rmtree(root, ignore_errors=True)
            raise
        return Stage(folder, root), lock


def _host() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def _clear_stage(root: Path, target: Path) -> None:
    """Finish or undo what a dead run left, and delete its stage; the living hold their lock."""
    if not _is_own(root):
        return
    if f"-{_host()}-" not in root.name and time.time() - root.stat().st_mtime < OTHER_HOST_S:
        return
    lock = _take(root / LOCK)
    if lock is None:
        return
    try:
        _finish(root, target)
        _delete_stage(root)
    finally:
        lock.release()


def _is_own(root: Path) -> bool:
    """Whether a stage is this user's, and nothing in it leads elsewhere: what was planted is not touched."""
    about = root.lstat()
    if not stat.S_ISDIR(about.st_mode) or (hasattr(os, "geteuid") and about.st_uid != os.geteuid()):
        return False
    return not any((root / name).is_symlink() for name in (NEW, READY, OLD, LOCK))


def _finish(root: Path, target: Path) -> None:
    """Bring a publishing that was killed to its end, or, where a place is taken, back to its beginning."""
    ready = root / READY
    left = [path for path in sorted(ready.glob("*")) if not _is_same(path, target / path.name)]
    if any(os.path.lexists(target / path.name) for path in left):
        _put_back(root, target)
        return
    for path in left:
        _move(path, target / path.name, replace=False)


def _put_back(root: Path, target: Path) -> None:
    for path in (root / OLD).glob("*"):
        if not os.path.lexists(target / path.name):
            os.rename(path, target / path.name)


def _is_same(one: Path, other: Path) -> bool:
    """Whether a file has been moved but for the removal of its first name."""
    return one.is_file() and other.is_file() and not other.is_symlink() and os.path.samefile(one, other)


def _move(source: Path, target: Path, replace: bool) -> None:
    """Give a file or folder its final name. Raises FileExistsError for a name that is taken, unless it is replaced."""
    if replace:
        os.replace(source, target)
        return
    if source.is_file():
        try:
            os.link(source, target)  # unlike a renaming it fails where something is there
        except FileExistsError:
            raise
        except OSError:
            pass  # a disk without hard links
        else:
            source.unlink()
            return
    if os.path.lexists(target) and not (target.is_dir() and not any(target.iterdir())):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    os.replace(source, target)


def _settle(folder: Path) -> None:
    """Sync every file of a stage, and let the umask decide who may read it: safetensors lets the owner alone.

    Folders that the stage's maker makes have such permissions. Files with a second name are another's too.
    """
    mode = stat.S_IMODE(folder.stat().st_mode)
    for place, folders, names in os.walk(folder):
        for name in folders:
            os.chmod(os.path.join(place, name), mode)
        for name in names:
            file = os.path.join(place, name)
            if os.stat(file).st_nlink == 1:
                os.chmod(file, mode & 0o666)
                descriptor = os.open(file, (os.O_RDWR if os.name == "nt" else os.O_RDONLY) | NOT_LINKED)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)


def _delete_stage(root: Path) -> None:
    """Delete a stage as far as that goes, its lock last: a part that is left is swept another time."""
    for path in root.glob("*"):
        if path.name != LOCK:
            shutil.rmtree(path, ignore_errors=True)
    with suppress(OSError):
        (root / LOCK).unlink()
        root.rmdir()
    if os.name == "nt":  # where a lock that is held cannot be deleted
        shutil.rmtree(root, ignore_errors=True)


# Locks and bytes


def _reservation(path: Path) -> Path:
    """The lock of a final name, beside it; where the name is too long to have one, by its hash."""
    name = f".{path.name}.slagen-lock"
    if len(os.fsencode(name)) > 255:
        name = f".{hashlib.sha256(os.fsencode(path.name)).hexdigest()}.slagen-lock"
    return path.with_name(name)


def _take(path: Path) -> BaseFileLock | None:
    """A lock, which the system frees when its holder dies; None where another holds it."""
    lock = FileLock(path, thread_local=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return None
    return lock


def _take_if_known(path: Path) -> BaseFileLock | None:
    """A lock that none but a sweep should hold now; None on a disk without locks. Raises Timeout."""
    lock = FileLock(path, thread_local=False)
    try:
        lock.acquire(timeout=SWEEP_S)
    except NotImplementedError:
        return None
    except OSError as error:
        if isinstance(error, Timeout) or error.errno not in NO_LOCKS:
            raise
        return None
    return lock


def _free(lock: BaseFileLock) -> None:
    """Give a lock back and delete its file, while it is held: so nobody's lock but this one is deleted."""
    with suppress(OSError):
        os.unlink(lock.lock_file)
    lock.release()
    if os.name == "nt":  # where it could not be deleted before
        with suppress(OSError):
            os.unlink(lock.lock_file)


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


def digest(content: Any) -> str:
    """SHA-256 of JSON content, whatever the order of its keys."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()  # a path need not be text
