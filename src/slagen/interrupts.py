"""Signals that ask a run to stop: finish the current work, or end now."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# What asks a process to end: SIGTERM, and SIGHUP, which a terminal or a connection sends when it goes.
ENDING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
INTERRUPTED = 130  # the exit code after these and after Ctrl-C


@contextmanager
def telling_what_is_kept(tell: Callable[[], str], *, instead: bool = False) -> Iterator[None]:
    """Where the block is interrupted, a note of the KeyboardInterrupt says what is kept and how to go on.

    Args:
        instead: it replaces the note of a block within this one, which otherwise stays.
    """
    try:
        yield
    except KeyboardInterrupt as stop:
        if instead or not getattr(stop, "__notes__", None):
            stop.__notes__ = [tell()]
        raise


@contextmanager
def stopping(
    stop: threading.Event, say: Callable[[], None], at_once: tuple[int, ...] = (), repeated_s: float = 0.0
) -> Iterator[None]:
    """Within it SIGINT, SIGTERM or SIGHUP sets `stop`, and the second of them is a KeyboardInterrupt. What is ignored,
    as nohup has SIGHUP ignored, stays so.

    Args:
        say: called when `stop` is set.
        at_once: signals whose first is a KeyboardInterrupt too.
        repeated_s: seconds after the first in which more signals count as the same one: torchrun sends its processes
            again what they have received already.

    In any thread but the main one nothing changes: signals go to that.
    """

    first = -math.inf

    def interrupt(number: int, frame: Any) -> None:
        nonlocal first
        if time.monotonic() - first < repeated_s:
            return
        if stop.is_set() or number in at_once:
            raise KeyboardInterrupt
        first = time.monotonic()
        stop.set()
        say()

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard = [number for number in (signal.SIGINT, *ENDING) if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, interrupt) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
