"""Asked to stop: finish what is at hand, or end now."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def stopping(stop: threading.Event, say: Callable[[], None], at_once: tuple[int, ...] = ()) -> Iterator[None]:
    """Within it SIGINT or SIGTERM sets `stop`, and the second of them is a KeyboardInterrupt.

    Args:
        say: called when `stop` is set.
        at_once: signals whose first is a KeyboardInterrupt too.

    In any thread but the main one nothing changes: signals go to that.
    """

    def interrupt(number: int, frame: Any) -> None:
        if stop.is_set() or number in at_once:
            raise KeyboardInterrupt
        stop.set()
        say()

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
