"""The three standard streams of the command: opened if they were closed, and silent once they have no reader."""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import Any

GONE = (errno.EPIPE, errno.EIO, errno.ESHUTDOWN)  # a pipe's reader has ended (`| head -0`), a terminal has hung up


class _Output(io.FileIO):
    """Writes to a stream, and drops what no reader takes. Any other failure, such as a full disk, is raised once."""

    failed = False

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except OSError as error:
            if error.errno in GONE or self.failed:
                return len(data)
            self.failed = True
            raise


def mend() -> None:
    """Put what every later line relies on in place of standard streams that are closed (`>&-`) or may end early.

    A closed one leads nowhere and gives nothing: otherwise the next file to be opened would take its number, and what
    is printed would go into that. The exit code reports the result, whether or not anyone reads the output.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if _is_closed(number):
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
        stream = getattr(sys, name)
        if number and (stream is None or isinstance(stream, io.TextIOWrapper)):
            encoding = "utf-8" if stream is None else stream.encoding
            raw = io.BufferedWriter(_Output(number, "w", closefd=False))
            if stream is not None:
                stream.flush()
            new = io.TextIOWrapper(raw, encoding, "backslashreplace", line_buffering=number == 2 or raw.isatty())
            setattr(sys, name, new)
        elif stream is None:
            sys.stdin = open(number, encoding="utf-8", closefd=False)  # noqa: SIM115


def _is_closed(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return True
    return False
