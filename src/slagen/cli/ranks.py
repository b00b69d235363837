"""Several processes of one command, as torchrun starts them: the first prints, and all end with one message."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout

from slagen import torchrun
from slagen.errors import FAILED_IN, Interrupted, PeerFailed, UsageError
from slagen.io.text import counted

TOGETHER = ("slagen generate",)  # commands of one process each do the same work in all, and write the same files
FIRST_S = 10.0  # in which the first process says of an error what every process would
SAID_S = 2.0  # in which a process that has failed says so


def check_command(path: str) -> None:
    """Raise UsageError for a command that processes do not run together, by its words, if there are several."""
    if torchrun.size() > 1 and path not in TOGETHER:
        more = " Give --ray to use all GPUs." if path == "slagen batch" else ""
        raise UsageError(
            f"{path} runs in one process, but torchrun started {counted(torchrun.size(), 'process')}. Start it without "
            f"torchrun.{more}"
        )


@contextmanager
def quiet() -> Iterator[None]:
    """In all processes but the first, drop what is printed within the block."""
    if torchrun.rank() == 0:
        yield
        return
    with open(os.devnull, "w") as null, redirect_stdout(null), redirect_stderr(null):
        yield


def worded(error: BaseException, text: str) -> str | None:
    """What this process is to say of an error; None where another process says it.

    Ends as late as that: torchrun ends all processes as soon as one has ended.
    """
    if isinstance(error, PeerFailed):
        _wait(SAID_S)
        return None
    if torchrun.rank() == 0:
        return text
    if isinstance(error, Interrupted | KeyboardInterrupt):
        return None
    where = next((note for note in getattr(error, "__notes__", []) if note.startswith(FAILED_IN)), "")
    if where:  # it was the first to fail
        return f"{where}: {text}"
    return text if _wait(FIRST_S) else None


def _wait(seconds: float) -> bool:
    """False where torchrun ends this process meanwhile."""
    try:
        time.sleep(seconds)
    except KeyboardInterrupt:
        return False
    return True
