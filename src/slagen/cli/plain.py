"""Tables that are never cut; and what console.py takes of rich, as plain text, for machines without rich."""

from __future__ import annotations

import sys
from itertools import zip_longest
from typing import Any

from slagen.io.text import encodable, escaped, line

TaskID = int


class Text(str):
    """A string whose style is not shown."""

    def __new__(cls, text: str, style: str = "") -> Text:
        return super().__new__(cls, text)


class Table:
    """Columns as wide as their longest cell, nothing cut or wrapped; a header or a Text may have several lines."""

    def __init__(self, show_header: bool = True, **style: Any) -> None:
        self._show_header = show_header
        self._header: list[str] = []
        self._to_the_right: list[bool] = []
        self._rows: list[list[str]] = []

    def add_column(self, name: str = "", justify: str = "left", **style: Any) -> None:
        self._header.append(name)
        self._to_the_right.append(justify == "right")

    def add_row(self, *cells: Any) -> None:
        self._rows.append([line(cell) if type(cell) is str else escaped(str(cell)) for cell in cells])

    def __str__(self) -> str:
        rows = [self._header, *self._rows] if self._show_header else self._rows
        lines = [part for row in rows for part in zip_longest(*(cell.split("\n") for cell in row), fillvalue="")]
        widths = [max(map(len, column)) for column in zip_longest(*lines, fillvalue="")]
        to_the_right = self._to_the_right + [False] * len(widths)

        def padded(cell: str, width: int, right: bool) -> str:
            return cell.rjust(width) if right else cell.ljust(width)

        return "\n".join("  ".join(map(padded, part, widths, to_the_right)).rstrip() for part in lines)


class Console:
    """Prints to stdout or stderr, one line or table at a time."""

    is_terminal = False

    def __init__(self, stderr: bool = False, **style: Any) -> None:
        self._stderr = stderr

    def print(self, *what: str | Table, **style: Any) -> None:
        text = " ".join(str(part) if isinstance(part, Table) else escaped(part) for part in what)
        stream = sys.stderr if self._stderr else sys.stdout
        stream.write(encodable(text, stream.encoding) + "\n")


class Progress:
    """Shows nothing but what its console prints."""

    def __init__(self, *columns: Any, console: Console, **style: Any) -> None:
        self.console = console

    def start(self) -> None:
        """Nothing is live."""

    stop = start

    def add_task(self, text: str, **fields: Any) -> TaskID:
        """One name for all: nothing is told apart."""
        return 0

    def update(self, task: TaskID, **fields: Any) -> None:
        """Nothing is live."""

    remove_task = update


class Column:
    """A part of the live line that is not shown."""

    def __init__(self, *text: str, **style: Any) -> None:
        pass


BarColumn = MofNCompleteColumn = TextColumn = TimeElapsedColumn = Column
