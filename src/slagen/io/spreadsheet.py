"""CSV as programs and spreadsheets write it: with commas, semicolons or tabs, and perhaps a line that says which."""

from __future__ import annotations

import csv
import io
import re
from typing import Any


def open_csv(text: str, column: str) -> Any:
    """A csv.reader of a text, which yields its rows as cells and knows their line numbers; it may raise csv.Error.

    The separator is what Excel's line `sep=;` says, or that which gives the first line a column of this name.
    """
    said = re.match(r'\s*"?sep=([^"\r\n])"?[^\S\r\n]*(?=\r|\n|$)', text, re.IGNORECASE)
    if said:
        separator, text = said[1], text[said.end() :]  # what is left of the line keeps the numbers right
    else:
        first = re.match(r"\s*([^\r\n]*)", text)
        names = first[1] if first else ""
        separator = next((s for s in ",;\t|" if column in map(plain_name, names.split(s))), ",")
    return csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)


def plain_name(cell: str) -> str:
    """A column's name, whatever its case, quotes, and what is between its words: `Num Frames` is num-frames."""
    return re.sub(r"[\s_]+", "-", cell.strip().strip('"').strip()).lower()


def without_empty_end(cells: list[str], count: int = 0) -> list[str]:
    """Cells but for empty ones behind the first `count`, as spreadsheets write them."""
    while len(cells) > count and not cells[-1].strip():
        cells = cells[:-1]
    return cells
