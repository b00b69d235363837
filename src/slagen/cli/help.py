"""Lay out a command's help: usage, text and options, wrapped between words at any width of the terminal."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from slagen.io.text import columns_of, wrapped

MAX_WIDTH = 98  # columns; longer lines are hard to read
MAX_TERM = 30  # columns of an option's spellings beside its text
MIN_TEXT = 24  # columns of the text beside them; where fewer are left, it goes below
INDENT = 2


class HelpText:
    """Collects help; it has the methods of Click's `HelpFormatter` that Typer calls."""

    def __init__(self) -> None:
        self._width = min(shutil.get_terminal_size().columns, MAX_WIDTH + INDENT) - INDENT
        self._indent = 0
        self._lines: list[str] = []

    def write_usage(self, prog: str, args: str = "") -> None:
        """Add the line of usage."""
        self._add(wrapped(f"Usage: {prog} {args}", self._width))

    def write_paragraph(self) -> None:
        """Add an empty line."""
        self._lines.append("")

    def write_text(self, text: str) -> None:
        """Add paragraphs, which empty lines part."""
        for index, paragraph in enumerate(text.split("\n\n")):
            if index:
                self.write_paragraph()
            self._add(wrapped(" ".join(paragraph.split()), self._width - self._indent))

    def write_dl(self, rows: Sequence[tuple[str, str]]) -> None:
        """Add a list of terms, such as options, with a text beside or below each."""
        beside = min(max(columns_of(term) for term, _ in rows), MAX_TERM) + INDENT
        room = self._width - self._indent - beside
        if room < MIN_TEXT:
            beside, room = 2 * INDENT, self._width - self._indent - 2 * INDENT
        for term, text in rows:
            lines = [" " * beside + part for part in wrapped(" ".join(text.split()), room) if part]
            if lines and columns_of(term) + INDENT <= beside:
                lines[0] = term + lines[0][len(term) :]
            else:
                lines = [*wrapped(term, self._width - self._indent), *lines]
            self._add(lines)

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """A panel of options: its name, and what is added in here indented."""
        self.write_paragraph()
        self._lines.append(f"{name}:")
        with self.indentation():
            yield

    @contextmanager
    def indentation(self) -> Iterator[None]:
        """What is added in here is indented."""
        self._indent += INDENT
        yield
        self._indent -= INDENT

    def __str__(self) -> str:
        return "\n".join(self._lines)

    def _add(self, lines: Sequence[str]) -> None:
        self._lines += [" " * self._indent + text for text in lines]
