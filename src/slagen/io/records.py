"""Records, which are dataclasses, out of documents that hold their fields: what to check, and the reading."""

from __future__ import annotations

from dataclasses import MISSING, Field, fields, is_dataclass
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from slagen.io.forms import OrNull

Record = TypeVar("Record")


def form_of(kind: Any) -> Any:
    """The form, as `forms.check` takes it, of what `read_record` reads; a field with a default may be left out."""
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        return {f"{each.name}{'?' if _has_default(each) else ''}": form_of(hints[each.name]) for each in fields(kind)}
    inner = get_args(kind)
    if isinstance(kind, UnionType) and any(get_args(part) or is_dataclass(part) for part in inner):
        return OrNull(form_of(next(part for part in inner if part is not type(None))))
    if get_origin(kind) is list:
        return [form_of(inner[0])]
    if get_origin(kind) is dict:
        return {str: form_of(inner[1])}
    return object if kind is Any else kind


def read_record(kind: type[Record], content: Any) -> Record:
    """A record of what a document says, which has its form; other names in it are passed over.

    Args:
        kind: a dataclass whose fields are text, numbers, records, these or None, and lists and dicts of them. What
            is such a record already stays.
    """
    record: Record = _read(kind, content)
    return record


def _read(kind: Any, value: Any) -> Any:
    if isinstance(kind, type) and is_dataclass(kind) and not isinstance(value, kind):
        hints = get_type_hints(kind)
        return kind(**{name: _read(hint, value[name]) for name, hint in hints.items() if name in value})
    inner = get_args(kind)
    if isinstance(kind, UnionType):  # of None and something
        return None if value is None else _read(inner[0], value)
    if get_origin(kind) is list:
        return [_read(inner[0], item) for item in value]
    if get_origin(kind) is dict:
        return {name: _read(inner[1], item) for name, item in value.items()}
    return value


def _has_default(each: Field[Any]) -> bool:
    return each.default is not MISSING or each.default_factory is not MISSING
