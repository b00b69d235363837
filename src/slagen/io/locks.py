"""Locks on files, which the system frees when their holder dies; on a disk without locks there are none."""

import errno
import os
from contextlib import suppress
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


def release_lock(lock: BaseFileLock) -> None:
    """Give a lock back and delete its file, while it is held: so nobody's lock but this one is deleted."""
    with suppress(OSError):
        os.unlink(lock.lock_file)
    lock.release()
    if os.name == "nt":  # where it could not be deleted before
        with suppress(OSError):
            os.unlink(lock.lock_file)
