"""The one place that prints: results go to stdout; notes, warnings and errors go to stderr."""

from __future__ import annotations

import json
import os
import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from slagen.cli.table import Segments, Table
from slagen.io.text import encodable, escaped, line, message, to_json, wrapped

WIDTH = 80  # columns if the terminal's width is unknown

if TYPE_CHECKING or find_spec("rich") is not None:
    from rich.console import Console as RichConsole
    from rich.text import Text

    class Console(RichConsole):
        """Shows every string as it is: nothing in it is markup."""

        def __init__(self, **options: Any) -> None:
            if os.environ.get("COLUMNS", "").strip() == "0":  # rich would print nothing
                options["width"] = WIDTH
            super().__init__(markup=False, highlight=False, emoji=False, **options)

else:
    from slagen.cli.plain import Console, Text

stderr = Console(stderr=True)


def show_error(text: str) -> None:
    """One message on stderr, prefixed so that it is found in a log; it may have several lines."""
    _print_message(stderr, message(text), "error:", "bold red")


def log_as(kind: str, style: str, text: str) -> None:
    """A message of one kind on stderr, such as a warning."""
    _print_message(stderr, line(message(text)), f"{kind}:", style)


def note(text: str) -> None:
    """A message on stderr about what is going on."""
    log_as("note", "dim", text)


def log(text: str) -> None:
    """A sentence on stderr."""
    _print_message(stderr, line(text))


def log_table(table: Table) -> None:
    """A table on stderr."""
    _print_table(stderr, table)


def write(text: str) -> None:
    """One line of result on stdout, such as a path; it is not wrapped."""
    write_text(line(text))


def write_sentence(text: str) -> None:
    """A sentence on stdout."""
    _print_message(Console(), line(text))


def write_table(table: Table) -> None:
    """A table on stdout."""
    _print_table(Console(), table)


def write_json(content: Any, **options: Any) -> None:
    """JSON on stdout, exactly the content when it is read."""
    write_text(json_text(content, indent=2, **options))


def json_text(content: Any, **options: Any) -> str:
    """JSON that stdout takes: in ASCII where it does not take the rest."""
    text = to_json(content, exact=True, **options)
    return text if encodable(text, sys.stdout.encoding) == text else json.dumps(content, **options)


def write_text(text: str) -> None:
    """Text on stdout as it is, whose lines are escaped already."""
    sys.stdout.write(encodable(text, sys.stdout.encoding) + "\n")
    sys.stdout.flush()


def stdout_is_terminal() -> bool:
    """Whether a person reads stdout, and no other program."""
    return sys.stdout.isatty()


def terminal_width(stream: Any) -> int | None:
    """Columns of the terminal that a stream leads to; None where it leads to a file or a pipe: nothing is wrapped."""
    if not stream.isatty():
        return None
    if (columns := os.environ.get("COLUMNS", "")).isdecimal() and int(columns):
        return int(columns)
    try:
        return os.get_terminal_size(stream.fileno()).columns or WIDTH
    except (OSError, ValueError):
        return WIDTH


def _print_message(console: Any, text: str, prefix: str = "", style: str = "") -> None:
    text = f"{prefix} {text}" if prefix else text
    lines = wrapped(encodable(text, console.file.encoding), terminal_width(console.file))
    _print(console, [(lines[0][: len(prefix)], style), (lines[0][len(prefix) :], "")])
    for rest in lines[1:]:
        _print(console, [(rest, "")])


def _print_table(console: Any, table: Table) -> None:
    for segments in table.lines(terminal_width(console.file)):
        _print(console, segments)


def _print(console: Any, segments: Segments) -> None:
    """Print a line that is wrapped already."""
    encoding = console.file.encoding
    text = Text.assemble(*((encodable(escaped(text), encoding), style) for text, style in segments))
    console.print(text, soft_wrap=True)
