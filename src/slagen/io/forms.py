"""Check a document against a form, and say in words where it does not match.

A form is `str`, `int`, `float` (any finite number), `bool`, `dict`, `list`, `None`, `object` for anything, a union of
these (`int | None`), `[form]` for a list, `(form, form)` for a list of just these, `{"name": form, "other?": form}` for
an object that has the one and may have the other, `{str: form}` for an object of any names, a `Kind`, or `OrNull`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from types import UnionType
from typing import Any, get_args

from slagen.io.text import counted


class Fault(ValueError):
    """What is wrong with a document, and where, line and column counted from 1, as far as that is known."""

    def __init__(self, text: str, line: int | None = None, column: int | None = None) -> None:
        super().__init__(text)
        self.text, self.line, self.column = text, line, column

    @property
    def place(self) -> str:
        """What goes behind the file's name."""
        return "".join(f":{number}" for number in (self.line, self.column) if number is not None)


@dataclass(frozen=True)
class Kind:
    """A form with words of its own, and a condition.

    Args:
        words: what is wanted, as "a whole number from 1 to 8".
        form: of the value. holds: asked of a value of that form.
    """

    words: str
    form: Any
    holds: Callable[[Any], bool] = lambda value: True


@dataclass(frozen=True)
class OrNull:
    """A form of its own, such as that of a list, or null."""

    form: Any


def whole(least: int, most: int) -> Kind:
    """A whole number within bounds."""
    return Kind(f"a whole number from {least} to {most}", int, lambda value: least <= value <= most)


def one_of(*choices: str) -> Kind:
    """One of some texts."""
    return Kind(f"one of {', '.join(choices)}", str, lambda value: value in choices)


def matching(pattern: str, words: str) -> Kind:
    """A text that a pattern matches from end to end."""
    return Kind(words, str, lambda value: re.fullmatch(pattern, value) is not None)


def sha256() -> Kind:
    """A hash as we write it."""
    return matching(r"[0-9a-f]{64}", "a SHA-256 hash of 64 hexadecimal digits")


WORDS: dict[Any, str] = {
    str: "text", int: "a whole number", float: "a number", bool: "true or false", dict: "an object", list: "a list",
    None: "null", type(None): "null", object: "anything",
}  # fmt: skip
PLURALS = {"text": "texts", "a whole number": "whole numbers", "a number": "numbers", "an object": "objects"}
NUMBERS = ("no", "one", "two", "three", "four")


def check(value: Any, form: Any, path: str = "") -> None:
    """Raise Fault, with the path of what is wrong, unless a value is of a form."""
    if isinstance(form, Kind):
        check(value, form.form, path)
        if not form.holds(value):
            raise _unfit(path, shown(value), form)
    elif isinstance(form, OrNull):
        if value is not None:
            check(value, form.form, path)
    elif isinstance(form, dict):
        if not isinstance(value, dict):
            raise _unfit(path, kind_of(value), dict)
        _check_object(value, form, path)
    elif isinstance(form, list):
        if not isinstance(value, list):
            raise _unfit(path, kind_of(value), form)
        for number, item in enumerate(value):
            check(item, form[0], f"{path}[{number}]")
    elif isinstance(form, tuple):
        if not isinstance(value, list) or len(value) != len(form):
            what = f"a list of {counted(len(value), 'item')}" if isinstance(value, list) else kind_of(value)
            raise _unfit(path, what, form)
        for number, (item, inner) in enumerate(zip(value, form, strict=True)):
            check(item, inner, f"{path}[{number}]")
    elif not is_of(value, form):
        if is_of(0.0, form) and not isinstance(value, bool) and isinstance(value, int | float) and abs(value) >= 1e300:
            raise Fault(f"{_named(path)} is {shown(value)}, which is too large")
        bad = isinstance(value, float) and not math.isfinite(value)
        raise _unfit(path, str(value) if bad else kind_of(value), form)


def _check_object(value: dict[str, Any], form: dict[Any, Any], path: str) -> None:
    for name, inner in form.items():
        if name is str:
            for key, item in value.items():
                check(item, inner, _below(path, key))
            return
        plain = name.removesuffix("?")
        if plain in value:
            check(value[plain], inner, _below(path, plain))
        elif plain == name:
            raise Fault(f'{_named(path)} has no "{plain}"')


def is_of(value: Any, form: Any) -> bool:
    """Whether a value is of a plain form, or of one of a union."""
    if isinstance(form, UnionType):
        return any(is_of(value, part) for part in get_args(form))
    if form is object:
        return True
    if form is None or form is type(None):
        return value is None
    if isinstance(value, bool):
        return form is bool
    if form is float:
        return isinstance(value, int | float) and -1e300 < value < 1e300
    return isinstance(value, form)


def _unfit(path: str, found: str, form: Any) -> Fault:
    return Fault(f"{_named(path)} is {found}, but must be {_words(form)}")


def _named(path: str) -> str:
    return f'"{path}"' if path else "it"


def _below(path: str, name: str) -> str:
    name = name if name.isprintable() and len(name) <= 80 else shown(name)
    return f"{path}.{name}" if path else name


def _words(form: Any) -> str:
    """A form in words."""
    if isinstance(form, Kind):
        return form.words
    if isinstance(form, UnionType):
        return " or ".join(map(_words, get_args(form)))
    if isinstance(form, dict):
        return "an object"
    if isinstance(form, list):
        inner = _words(form[0])
        return f"a list of {PLURALS[inner]}" if inner in PLURALS else "a list"
    if isinstance(form, tuple):
        inner = " and ".join(dict.fromkeys(map(_words, form)))
        count = NUMBERS[len(form)] if len(form) < len(NUMBERS) else str(len(form))
        return f"a list of {count} {PLURALS.get(inner, f'entries ({inner})')}"
    return WORDS[form]


def kind_of(value: Any) -> str:
    """What a value is, in words."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return "a number"
    return WORDS.get(type(value), type(value).__name__)


def shown(value: Any) -> str:
    """A value as a message shows it: within a line, whatever it holds, and in no more time than that takes."""
    if isinstance(value, str):
        return repr(value if len(value) <= 60 else value[:57] + "...")
    if isinstance(value, int) and not isinstance(value, bool):
        if abs(value) >= 10**1000:  # Python writes out no more than some thousands of digits
            return "a number of more than 1000 digits"
        return str(value) if abs(value) < 10**30 else f"{str(value)[:27]}... ({len(str(abs(value)))} digits)"
    return kind_of(value) if isinstance(value, dict | list | tuple) else repr(value)[:60]
