"""Text from users and files: refused unless it is UTF-8, shortened for messages, escaped for terminals."""

from __future__ import annotations

import json
import re
import unicodedata
from typing import Any

from slagen.errors import UsageError

MAX_PROMPT = 20_000  # characters of a prompt, a negative prompt or a caption; Wan reads 512 tokens of them
MAX_LINE = 600  # characters of a line in a message
MAX_QUOTE = 60
MAX_PATH = 300  # characters of a path in a message

# What a terminal obeys, or what changes how the rest reads: C0 but for the line feed, DEL and C1; marks, overrides and
# isolates of direction; line and paragraph separators; byte order marks; and halves of pairs, which stand for bytes
# that are no UTF-8.
UNSHOWN = re.compile(
    r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ufffe\uffff"
    r"\ud800-\udfff]"
)
LONG_DASH = "[\u2010-\u2015\u2212\ufe58\ufe63\uff0d]"  # what word processors make of two hyphens


def escaped(text: str) -> str:
    """Text as it may reach a terminal or a page: what is in UNSHOWN is escaped, an undecodable byte as \\xff."""
    return UNSHOWN.sub(_escape, text)


def line(text: str) -> str:
    """The same on one line: line feeds are escaped too."""
    return escaped(text).replace("\n", "\\n")


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    if 0xDC80 <= code <= 0xDCFF:  # a byte of an argument or a path that is no UTF-8
        code -= 0xDC00
    return {9: "\\t", 13: "\\r"}.get(code, f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}")


def message(text: str) -> str:
    """A message as it may be shown; of a line that is too long the middle is left out, for its end says what to do."""
    lines = escaped(text).split("\n")
    return "\n".join(row if len(row) <= MAX_LINE else f"{row[: MAX_LINE - 250]} [...] {row[-243:]}" for row in lines)


def columns_of(text: str) -> int:
    """Columns that text of one line takes in a terminal: wide characters, as of Chinese, take two."""
    if text.isascii():
        return len(text)
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    return len(text) + wide - sum(unicodedata.combining(character) > 0 for character in text)


def wrapped(text: str, width: int | None) -> list[str]:
    """Lines of at most so many columns, broken between words; a longer word, such as a path, is left whole.

    Args:
        width: None breaks at line feeds only.
    """
    if width is None:
        return text.split("\n")
    lines: list[str] = []
    for row in text.split("\n"):
        current, taken = "", 0
        for index, word in enumerate(row.split(" ")):
            more = columns_of(word)
            if index and taken + 1 + more > width and current.strip():
                lines.append(current.rstrip())
                current, taken = word, more
            else:
                current = f"{current} {word}" if index else word
                taken += more + (index > 0)
        lines.append(current.rstrip())
    return lines


def encodable(text: str, encoding: str | None) -> str:
    """Text that a stream of this encoding takes: what it lacks is escaped."""
    encoding = encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def cut(text: str, most: int = MAX_QUOTE) -> str:
    """Text of at most so many characters: the middle of a longer one is left out."""
    return text if len(text) <= most else f"{text[: most - most // 3]}...{text[3 - most // 3 :]}"


def counted(number: int, noun: str) -> str:
    """A number with its noun: 1 video, 2 passes."""
    plural = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{number} {noun if number == 1 else plural}"


def quote(text: str) -> str:
    """Text of the user's for a message: at most a line of it, in quotes."""
    return f"'{line(cut(text))}'"


def quote_path(path: object) -> str:
    """A path or a model's name for a message, in quotes: whole, unless it alone would fill half a message."""
    return f"'{line(cut(str(path), MAX_PATH))}'"


def to_json(content: Any, *, exact: bool = False, **options: Any) -> str:
    """JSON that is readable, and holds no character that a terminal obeys.

    Args:
        exact: bytes of a path that are no UTF-8 are halves of pairs when it is read, as Python has them; otherwise
            they are escaped as they are shown, for not every reader takes halves.
    """

    def escape(match: re.Match[str]) -> str:
        is_half = "\ud800" <= match[0] <= "\udfff"
        return "\\" + _escape(match) if is_half and not exact else f"\\u{ord(match[0]):04x}"

    return UNSHOWN.sub(escape, json.dumps(content, ensure_ascii=False, **options))


def read_device(text: str) -> str:
    """A device as it is typed: auto, cpu, cuda or cuda:N. Raises UsageError."""
    if re.fullmatch(r"auto|(cpu|cuda)(:\d{1,3})?", text) is None:
        raise UsageError(f"device is {quote(text)}, but must be auto, cpu, cuda or cuda:N. Try --device auto.")
    return text


def check_prompt(name: str, text: str) -> None:
    """Raise UsageError unless a prompt is text of a bearable length, in whole characters.

    Args:
        name: what it is, for the message.
    """
    if re.search(r"[\x00\ud800-\udfff]", text):
        raise UsageError(
            f"the {name} {quote(text)} is not valid UTF-8 text. Give UTF-8 text, in a UTF-8 locale (LC_ALL=C.UTF-8)."
        )
    if len(text) > MAX_PROMPT:
        raise UsageError(f"the {name} has {len(text):,} characters, but at most {MAX_PROMPT:,} are allowed.")
