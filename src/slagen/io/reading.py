"""Files to read: regular ones only, what lies at a path in words, and hashes of files and of JSON content."""

import errno
import hashlib
import json
import os
import stat
from io import BufferedReader
from pathlib import Path
from typing import Any

from slagen.errors import MissingPath, WeightsError


def open_regular(path: Path) -> BufferedReader:
    """A regular file to read. Raises OSError, also for one of another kind: reading a pipe could block forever."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
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
        return "is a broken link" if path.is_symlink() else "does not exist"
    except OSError as error:
        return f"cannot be accessed ({error.strerror})"
    kinds = {stat.S_IFREG: "file", stat.S_IFDIR: "folder", stat.S_IFIFO: "named pipe", stat.S_IFSOCK: "socket"}
    return f"is a {kinds.get(stat.S_IFMT(mode), 'device')}"


def no_file(path: Path, advice: str) -> WeightsError:
    """The error for a path that was given and holds no file; where nothing lies at all, it is wrong usage."""
    kind = WeightsError if path.exists() else MissingPath
    return kind(f"{path} {kind_of_path(path)}. {advice}")


def digest(content: Any) -> str:
    """SHA-256 of JSON content, whatever the order of its keys."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()  # a path need not be text
