"""Stages: what is being written is whole under its final name or not there, also when the process is killed.

What is to be written lies in a stage until it is whole: a folder `.slagen-<host>-<random>.tmp` beside its final place,
which only its maker may enter and whose lock it holds while it lives. So nothing that was planted there is followed,
and what a writer such as ffmpeg or safetensors leaves when it dies lies in the stage too. Publishing syncs the files,
gives them the permissions that the umask asks for, and renames the stage's `new` to `ready`: from then on it can be
finished by anyone. What lies at the final places is moved to `old`, what is ready is moved in, and the stage goes.
"""

import errno
import hashlib
import os
import secrets
import shutil
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import BaseFileLock, Timeout

from slagen.io.locks import acquire_lock, try_lock

NEW, READY, OLD, LOCK = "new", "ready", "old", "lock"
STAGES = ".slagen-*.tmp"
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


def _new_stage(folder: Path) -> tuple[Stage, BaseFileLock | None]:
    """A stage of one's own, with its lock held, where the disk has locks."""
    while True:
        root = folder / f".slagen-{_host()}-{secrets.token_hex(8)}.tmp"
        root.mkdir(mode=0o700)
        try:
            try:
                lock = acquire_lock(root / LOCK)
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


def clear_stage(root: Path, target: Path) -> None:
    """Finish or undo what a dead run left, and delete its stage; the living hold their lock."""
    if not _is_own(root):
        return
    if f"-{_host()}-" not in root.name and time.time() - root.stat().st_mtime < OTHER_HOST_S:
        return
    lock = try_lock(root / LOCK)
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
