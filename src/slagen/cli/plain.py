"""What console.py and live.py take of rich, as plain text, for machines without rich."""

from __future__ import annotations

import sys
from typing import Any

from slagen.io.text import encodable, escaped


class Text(str):
    """A string whose style is not shown."""

    @classmethod
    def assemble(cls, *parts: tuple[str, str]) -> Text:
        """One text of several, each with its style."""
        return cls("".join(text for text, _ in parts))


class Console:
    """Prints to stdout or stderr, one line at a time."""

    is_terminal = False

    def __init__(self, stderr: bool = False, **style: Any) -> None:
        self._stderr = stderr

    @property
    def file(self) -> Any:
        """The stream that it prints to."""
        return sys.stderr if self._stderr else sys.stdout

    def print(self, text: str, **style: Any) -> None:
        """Print a line."""
        self.file.write(encodable(escaped(text), self.file.encoding) + "\n")


class Live:
    """A display that shows nothing."""

    def start(self) -> None:
        """Nothing is live."""

    stop = start


def live(console: Console, shown: Any) -> Live:
    """Nothing is live."""
    return Live()
