"""Text that people and other programs wrote -> values whose size, depth and types are known. The one reader of it.

JSON, lines of JSON, and YAML are read in bounded time and memory: text that is too long, too deep or not
UTF-8, a repeated key, a number too large to be useful and a tag that would create an object are refused, with the
place. A form (see `forms.py`) says what a document should hold, and each deviation from it is reported by its path.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slagen.errors import SlagenError, WeightsError
from slagen.io.forms import Fault, check, is_of, shown
from slagen.io.reading import open_regular

MAX_BYTES = 16 * 2**20
MAX_DEPTH = 64
MAX_DIGITS = 1000
JSON_FAULTS = {  # what Python's parser says, as whole clauses
    "Expecting value": "expected a value",
    "Expecting property name enclosed in double quotes": "expected a key in double quotes",
    "Expecting ':' delimiter": "expected a colon",
    "Expecting ',' delimiter": "expected a comma",
    "Extra data": "there is extra text after the value",
}
MAX_VALUES = 4_000_000  # of JSON, which bounds the memory that it takes
MAX_YAML_BYTES = 2 * 2**20
MAX_YAML_VALUES = 1_000_000  # with every alias written out
TOO_DEEP = f"it is nested too deeply (more than {MAX_DEPTH} levels)"
TOO_LONG = f"it contains a number with {{:,}} digits, but at most {MAX_DIGITS:,} are allowed"


def read_json(
    path: Path, form: Any = dict, error: type[SlagenError] = WeightsError, advice: str = "Copy or download it again.",
    most: int = MAX_BYTES,
) -> Any:  # fmt: skip
    """The JSON in a file. Raises `error`, with the file's name and the place, where it is not of the form."""
    try:
        return parse_json(read_bytes(path, most), form)
    except Fault as fault:
        raise error(f"{path}{fault.place}: {fault}. {advice}") from fault
    except OSError as problem:
        raise error(f"{path} cannot be read: {problem.strerror or problem}. {advice}") from problem


def read_bytes(path: Path, most: int = MAX_BYTES) -> bytes:
    """A regular file's bytes. Raises Fault where there are more than `most` of them, OSError for another kind."""
    with open_regular(path) as handle:
        data = handle.read(most + 1)
    if len(data) > most:
        raise Fault(f"it is larger than {size_of(most)}")
    return data


def size_of(count: int) -> str:
    """A number of bytes as a person says it."""
    return f"{count / 2**20:g} MiB" if count >= 2**20 else f"{count / 2**10:g} KiB"


def decode(data: bytes) -> str:
    """UTF-8 with or without a byte order mark. Raises Fault with the place of the first byte that is none."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        start = error.start + (3 if data.startswith(b"\xef\xbb\xbf") else 0)
        raise Fault(
            f"byte {data[start]:#04x} is not UTF-8", data[:start].count(b"\n") + 1, start - data.rfind(b"\n", 0, start)
        ) from None
    if "\0" in text:
        raise Fault("it contains a NUL byte", text[: text.index("\0")].count("\n") + 1)
    return text


def parse_json(data: str | bytes, form: Any = None) -> Any:
    """A value from JSON. Without a form nothing but its bounds is looked at. Raises Fault."""
    text = decode(data) if isinstance(data, bytes) else data
    if sum(map(text.count, "[{,")) > MAX_VALUES:
        raise Fault(f"it contains more than {MAX_VALUES:,} values")
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_int=_whole)
    except json.JSONDecodeError as error:
        reason = JSON_FAULTS.get(error.msg, f"{error.msg[:1].lower()}{error.msg[1:]}")
        raise Fault(f"it is not valid JSON: {reason}", error.lineno, error.colno) from None
    except RecursionError:
        raise Fault(TOO_DEEP) from None
    _check_depth(value)
    if form is not None:
        if re.search(r"\\u[dD][89a-fA-F]", text):
            _check_halves(value)
        check(value, form)
    return value


def read_lines(path: Path, form: Any, most: int = 2**20) -> Iterator[Any]:
    """The values in a file of JSON lines that are of a form; other lines, and such as a crash tore, are passed over.

    A line has at most `most` bytes; the file may be of any length, and need not be there.
    """
    try:
        with open_regular(path) as handle:
            while line := handle.readline(most):
                try:
                    yield parse_json(line, form)
                except Fault:
                    continue
    except OSError:
        return


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise Fault(f"it contains the key {shown(name)} twice")
        found[name] = value
    return found


def _whole(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise Fault(TOO_LONG.format(len(digits)))
    return int(digits)


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        inner = [x for item in level for x in _children(item) if isinstance(x, dict | list)]
        if not inner:
            return
        level = inner
    raise Fault(TOO_DEEP)


def _children(item: Any) -> Any:
    return item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()


def _check_halves(value: Any) -> None:
    """Refuse half of a pair, which JSON can write and no file or terminal takes."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise Fault("it contains an incomplete character (a lone surrogate)") from None


def parse_yaml(text: str) -> Any:
    """A value from YAML: text, numbers, true, false, null (as YAML 1.2 has them), lists and objects.

    Aliases and merges are written out as long as the whole stays within bounds. A list is an `Entries`, which knows its
    lines. Raises Fault.
    """
    import yaml

    if len(text) > MAX_YAML_BYTES:
        raise Fault(f"it is larger than {size_of(MAX_YAML_BYTES)}")
    tree = _Tree()
    try:
        for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
            tree.take(event)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        what = str(getattr(error, "problem", None) or getattr(error, "reason", None) or error).splitlines()[0]
        raise Fault(f"it is not valid YAML: {what}", *((mark.line + 1, mark.column + 1) if mark else ())) from None
    return tree.root


class Entries(list):
    """A list in YAML; `lines` has the line that each entry begins on."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[int] = []


class _Open:
    """A list or an object that has not ended: its entries so far, and how many values those are, written out."""

    def __init__(self, value: Any, event: Any) -> None:
        self.value, self.event, self.count = value, event, 1
        self.key: str | None = None
        self.merged: list[dict[str, Any]] = []


TAG = "tag:yaml.org,2002:"
TAGGED = {"str": str, "int": int, "float": float, "bool": bool, "null": None}


class _Tree:
    """YAML's events, one after the other -> one value, without recursion."""

    def __init__(self) -> None:
        self.root: Any = None
        self.open: list[_Open] = []
        self.anchors: dict[str, tuple[Any, int]] = {}
        self.documents = 0

    def take(self, event: Any) -> None:
        """The next event. Raises Fault with its place."""
        try:
            self._take(type(event).__name__, event)
        except Fault as fault:
            mark = event.start_mark
            raise Fault(str(fault), mark.line + 1, mark.column + 1) from None

    def _take(self, name: str, event: Any) -> None:
        if name == "DocumentStartEvent":
            self.documents += 1
            if self.documents > 1:
                raise Fault("it contains a second YAML document, but only one is allowed")
        elif name == "ScalarEvent":
            self._add(_scalar(event), 1, event, event.anchor)
        elif name == "AliasEvent":
            if event.anchor not in self.anchors:
                raise Fault(f"the alias *{event.anchor:.60} refers to a value that is not defined before it")
            self._add(*self.anchors[event.anchor], event)
        elif name in ("SequenceStartEvent", "MappingStartEvent"):
            plain = "seq" if name.startswith("S") else "map"
            if event.tag not in (None, "!", TAG + plain):
                raise Fault(f"the YAML tag {event.tag:.60} is not supported")
            if len(self.open) >= MAX_DEPTH:
                raise Fault(TOO_DEEP)
            self.open.append(_Open(Entries() if plain == "seq" else {}, event))
        elif name in ("SequenceEndEvent", "MappingEndEvent"):
            done = self.open.pop()
            for merged in done.merged:
                for key, value in merged.items():
                    done.value.setdefault(key, value)
            self._add(done.value, done.count, done.event, done.event.anchor)

    def _add(self, value: Any, count: int, event: Any, anchor: str | None = None) -> None:
        """Put a value that has ended where it belongs."""
        if anchor is not None:
            self.anchors[anchor] = value, count
        if not self.open:
            self.root = value
            return
        parent = self.open[-1]
        parent.count += count
        if parent.count > MAX_YAML_VALUES:
            raise Fault(f"it contains more than {MAX_YAML_VALUES:,} values once its aliases are expanded")
        if isinstance(parent.value, Entries):
            parent.value.append(value)
            parent.value.lines.append(event.start_mark.line + 1)
        elif parent.key is None:
            if isinstance(value, dict | list):
                raise Fault("a key must be text, but this one is a list or an object")
            parent.key = event.value if type(event).__name__ == "ScalarEvent" else str(value)
            if parent.key in parent.value:
                raise Fault(f"it contains the key {shown(parent.key)} twice")
        else:
            key, parent.key = parent.key, None
            if key != "<<":
                parent.value[key] = value
                return
            parts = value if isinstance(value, list) else [value]
            if not all(isinstance(part, dict) for part in parts):
                raise Fault("<< must be followed by an object or a list of objects")
            parent.merged += parts


def _scalar(event: Any) -> Any:
    """A value from YAML's text, by the core schema of YAML 1.2. Raises Fault."""
    text, tag = event.value, event.tag
    if tag in (None, "!"):
        return text if event.style or tag else _plain(text)
    name = tag.removeprefix(TAG)
    if not tag.startswith(TAG) or name not in TAGGED:
        raise Fault(f"the YAML tag {tag:.60} is not supported")
    if name == "str":
        return text
    value = _plain(text)
    if not is_of(value, TAGGED[name]) and not (name == "float" and isinstance(value, float)):
        raise Fault(f"{shown(text)} is tagged {name}, but is not a valid {name}")
    return value


def _plain(text: str) -> Any:
    if text in ("", "~", "null", "Null", "NULL"):
        return None
    if text.lower() in ("true", "false") and text in (text.lower(), text.capitalize(), text.upper()):
        return text.lower() == "true"
    if re.fullmatch(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", text):
        if len(text) > MAX_DIGITS:
            raise Fault(TOO_LONG.format(len(text)))
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
    if re.fullmatch(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", text):
        return float(text)
    if re.fullmatch(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", text):
        return float(text.replace(".", ""))
    return text
