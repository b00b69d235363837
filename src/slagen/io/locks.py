"""Locks on files, which the system frees when their holder dies; on a disk without locks there are none."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

SWEEP_S = 1.0  # a sweep holds the locks that it tries for far less
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


def try_lock(path: Path) -> BaseFileLock | None:
    """A lock, which the system frees when its holder dies; None where another holds it."""
    lock = FileLock(path, thread_local=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return None
    return lock


def acquire_lock(path: Path) -> BaseFileLock | None:
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


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Create a folder and hold its lock. A folder that was not there is deleted again if a failure leaves it empty.

    Raises: Timeout where another holds the lock, OSError where the folder is not writable.
    """
    new = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", thread_local=False)
    lock.acquire(timeout=0)
    try:
        yield
    except BaseException:
        if new and os.listdir(folder) == [".lock"]:
            release_lock(lock)
            with suppress(OSError):  # another process uses the folder by now
                for place in new:
                    place.rmdir()
        raise
    finally:
        lock.release()


def release_lock(lock: BaseFileLock) -> None:
    """Give a lock back and delete its file, while it is held: so nobody's lock but this one is deleted."""
    with suppress(OSError):
        os.unlink(lock.lock_file)
    lock.release()
    if os.name == "nt":  # where it could not be deleted before
        with suppress(OSError):
            os.unlink(lock.lock_file)
