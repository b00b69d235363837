"""Tables of text: every cell whole at any width, wrapped only between words."""

from __future__ import annotations

from itertools import zip_longest
from typing import Any

from slagen.io.text import columns_of, escaped, line, wrapped

GAP = 2  # columns between cells
MIN_TEXT = 24  # columns that the last cell of a row needs beside the others; with fewer, rows become paragraphs
INDENT = 2

Segments = list[tuple[str, str]]  # the texts of a line, each with its style


class Cell(str):
    """The text of a cell, with a style; a line feed in it starts a new line."""

    style: str

    def __new__(cls, text: str, style: str = "") -> Cell:
        cell = super().__new__(cls, text)
        cell.style = style
        return cell

    def with_text(self, text: str) -> Cell:
        """Another text in the same style."""
        return Cell(text, self.style)


class Table:
    """Columns as wide as their longest cell.

    Where that is too wide for the terminal, a table with a header gets its header wrapped, and is then shown in parts
    that each begin with the first column; one without a header gets its last column wrapped.
    """

    def __init__(self, *names: str, right: bool = False) -> None:
        """`names` are the columns, none for a table without a header; `right` aligns all but the first to the right."""
        self._names = [Cell(name, "dim") for name in names]
        self._right = right
        self._rows: list[list[Cell]] = []

    def add_row(self, *cells: Any) -> None:
        """Add a row; a cell that is no `Cell` is one line."""
        self._rows.append([
            cell.with_text(escaped(cell)) if isinstance(cell, Cell) else Cell(line(str(cell))) for cell in cells
        ])  # fmt: skip

    def __str__(self) -> str:
        return "\n".join("".join(text for text, _ in segments) for segments in self.lines(None))

    def lines(self, width: int | None) -> list[Segments]:
        """The table's lines in a terminal of so many columns; None is as many as it takes."""
        if self._names:
            return self._with_header(width)
        if width is None:
            return _laid_out(self._rows, False)
        label_widths = _widths([row[:-1] for row in self._rows])
        room = width - sum(label_widths) - GAP * len(label_widths)
        if room < MIN_TEXT:
            return [segments for row in self._rows for segments in _paragraph(row, width)]
        found: list[Segments] = []
        for row in self._rows:
            *labels, text = row
            lines = wrapped(text, room)
            if max(map(columns_of, lines)) <= room:
                found += _laid_out([[*labels, text.with_text("\n".join(lines))]], False, label_widths)
            else:  # a path or a hash that needs a line of its own
                found += [*_laid_out([labels], False, label_widths), *_indented(text, width)]
        return found

    def _with_header(self, width: int | None) -> list[Segments]:
        rows = [self._names, *self._rows]
        if width is None or sum(_widths(rows)) + GAP * (len(self._names) - 1) <= width:
            return _laid_out(rows, self._right)
        bodies = [*_widths(self._rows), *[0] * len(self._names)]  # a table may have no rows
        names = [name.with_text("\n".join(wrapped(name.replace("\n", " "), bodies[index])))
                 for index, name in enumerate(self._names)]  # fmt: skip
        rows = [names, *self._rows]
        widths = _widths(rows)
        parts: list[list[int]] = [[0]]
        for column in range(1, len(widths)):
            taken = sum(widths[index] + GAP for index in parts[-1])
            if taken + widths[column] > width and len(parts[-1]) > 1:
                parts.append([0])
            parts[-1].append(column)
        found: list[Segments] = []
        for part in parts:
            found += [[]] if found else []
            found += _laid_out([[row[index] for index in part if index < len(row)] for row in rows], self._right)
        return found


def _widths(rows: list[list[Cell]]) -> list[int]:
    columns = zip_longest(*rows, fillvalue=Cell(""))
    return [max(columns_of(part) for cell in column for part in cell.split("\n")) for column in columns]


def _laid_out(rows: list[list[Cell]], right: bool, widths: list[int] | None = None) -> list[Segments]:
    """Rows with their cells side by side, without blanks at the ends of lines."""
    widths = widths or _widths(rows)
    found: list[Segments] = []
    for row in rows:
        for parts in zip_longest(*(cell.split("\n") for cell in row), fillvalue=""):
            segments: Segments = []
            for index, (part, cell) in enumerate(zip(parts, row, strict=True)):
                blanks = " " * ((widths[index] if index < len(widths) else 0) - columns_of(part))
                gap = " " * GAP if index else ""
                to_the_right = right and index > 0
                segments += [(gap + blanks if to_the_right else gap, ""), (part, cell.style)]
                segments += [] if to_the_right else [(blanks, "")]
            found.append(_stripped(segments))
    return found


def _stripped(segments: Segments) -> Segments:
    while segments and not segments[-1][0].strip():
        segments.pop()
    if segments:
        text, style = segments[-1]
        segments[-1] = (text.rstrip(), style)
    return segments


def _paragraph(row: list[Cell], width: int) -> list[Segments]:
    """A row in a narrow terminal: its labels on one line, its text indented below."""
    *labels, text = row
    first = wrapped("  ".join(label for label in labels if label), width)
    style = labels[0].style if len(labels) == 1 else ""
    return [[(part, style)] for part in first if part] + _indented(text, width)


def _indented(text: Cell, width: int) -> list[Segments]:
    return [[(" " * INDENT, ""), (part, text.style)] for part in wrapped(text, width - INDENT)]
