"""Read lists of videos and captions in other tools' formats: CSV, JSON and JSONL, recognised by their keys."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slagen.errors import UsageError
from slagen.io.documents import decode, parse_json, read_bytes, size_of
from slagen.io.forms import Fault, shown
from slagen.io.spreadsheet import open_csv, plain_name, without_empty_end

MAX_LIST = 256 * 2**20
NAMES = ("videos2caption.json", "metadata.json", "metadata.csv", "metadata.tsv")  # in a folder, beside any .jsonl
# Tool, key of the videos, keys of the captions (the first one present is used).
KEYS = (
    ("musubi", "video_path", ("caption",)),
    ("FastVideo", "path", ("cap",)),
    ("DiffSynth", "video", ("prompt",)),
    ("Hugging Face", "file_name", ("text", "caption", "prompt")),
)
MAX_SHOWN = 8


@dataclass(frozen=True)
class Entry:
    """One entry of a list: where it is, for messages, and its values by key; none where it is not an object."""

    where: str
    values: dict[str, Any]


def check_data_path(path: Path) -> None:
    """Raise UsageError where nothing lies at the path of a data set."""
    if not path.exists():
        raise UsageError(f"{path} does not exist. Give a folder of videos with a .txt caption beside each.")


def find_list(folder: Path) -> Path | None:
    """The list of videos in a folder; None where there is none.

    Raises: UsageError where there are two, or one of a format that is not read.
    """
    lists = [folder / name for name in NAMES] + sorted(folder.glob("*.jsonl"))
    lists = [file for file in lists if file.is_file() and not file.name.startswith(".")]
    if len(lists) > 1:
        raise UsageError(f"{folder} contains both {lists[0].name} and {lists[1].name}. Give one of them with --data.")
    if lists:
        return lists[0]
    others = [folder / "metadata.parquet", folder / "videos.txt"]
    for file in others:
        own_caption = any(other.suffix != ".txt" for other in folder.glob("videos.*"))  # videos.txt beside videos.mp4
        if file.is_file() and not own_caption:
            raise _not_read(file)
    return None


def find_list_below(folder: Path) -> Path | None:
    """The only metadata file in the subfolders, as Hugging Face has one for each split; None without any.

    Raises: UsageError where there are several, or they are not read.
    """
    found = sorted(
        file for name in ("csv", "jsonl", "parquet") for file in folder.glob(f"*/**/metadata.{name}") if file.is_file()
    )
    if len(found) > 1:
        names = " and ".join(str(file.relative_to(folder)) for file in found[:2])
        raise UsageError(f"{folder} contains several lists of videos, such as {names}. Give the folder of one of them.")
    if found and found[0].suffix == ".parquet":
        raise _not_read(found[0])
    return found[0] if found else None


def _not_read(file: Path) -> UsageError:
    advice = "Write a metadata.csv with the columns video and prompt beside the videos."
    if file.suffix == ".parquet":
        advice = "Write it as metadata.csv: pandas.read_parquet(...).to_csv('metadata.csv', index=False)."
    return UsageError(f"{file} is a list of videos in a format that slagen does not read. {advice}")


def read_list(file: Path, faults: list[str]) -> Iterator[tuple[str, Any, Any]]:
    """Where, video and caption of every entry of a list; a line that cannot be read is added to the faults.

    Raises: UsageError where the file is not a list, or has none of the known keys.
    """
    kind = file.suffix.lower()
    if file.name in ("videos.txt", "prompt.txt", "prompts.txt") or kind == ".parquet":
        raise _not_read(file)
    if kind not in (".csv", ".tsv", ".jsonl", ".json"):
        raise UsageError(
            f"{file} is not a list of videos. Give a folder of videos, or a list in a .csv, .tsv, .json or .jsonl file."
        )
    try:
        text = decode(read_bytes(file, MAX_LIST))
    except Fault as fault:
        raise UsageError(f"{file}{fault.place}: {fault}. Give UTF-8 text of at most {size_of(MAX_LIST)}.") from fault
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror}.") from error
    if kind in (".csv", ".tsv"):
        columns, entries = _csv(file, text, faults)
        known = {plain_name(key): key for _, video, captions in KEYS for key in (video, *captions)}
        entries = [Entry(e.where, {known.get(key, key): x for key, x in e.values.items()}) for e in entries]
        keys = [known.get(name, name) for name in columns]
    else:
        entries = _jsonl(file, text, faults) if kind == ".jsonl" else _json(file, text)
        keys = list(dict.fromkeys(key for entry in entries for key in entry.values))
    if not keys and kind not in (".csv", ".tsv"):  # the caller reports each entry, and an empty list
        return ((entry.where, None, None) for entry in entries)
    video, captions = _choose(file, keys, "column" if kind in (".csv", ".tsv") else "key")
    return ((e.where, e.values.get(video), _first(e.values, captions)) for e in entries)


def _choose(file: Path, keys: list[str], what: str) -> tuple[str, list[str]]:
    """The key of the videos and those of the captions. Raises UsageError with the keys found and those expected."""
    for _, video, captions in KEYS:
        there = [caption for caption in captions if caption in keys]
        if video in keys and there:
            return video, there
    found = ", ".join(shown(key) for key in keys[:MAX_SHOWN]) + (", ..." if len(keys) > MAX_SHOWN else "")
    wanted = "; ".join(f"{video} with {' or '.join(captions)} (as in {whose})" for whose, video, captions in KEYS)
    raise UsageError(
        f"{file} lacks a {what} for its videos or its captions. Found: {found or 'none'}. Expected: {wanted}. "
        f"Rename the {what}s."
    )


def _first(values: dict[str, Any], keys: list[str]) -> Any:
    """The first value that is present and not empty."""
    return next((values[key] for key in keys if values.get(key)), None)


def _csv(file: Path, text: str, faults: list[str]) -> tuple[list[str], list[Entry]]:
    """The columns, by plain names, and the rows."""
    first = re.search(r"\S[^\r\n]*", re.sub(r'^\s*"?sep=.*', "", text, count=1, flags=re.IGNORECASE))
    names = {plain_name(cell) for cell in re.split(r"[,;\t|]", first[0])} if first else set()
    column = next((plain_name(video) for _, video, _ in KEYS if plain_name(video) in names), "video")
    rows = open_csv(text, column)
    columns: list[str] | None = None
    entries: list[Entry] = []
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return columns or [], entries
        except csv.Error as error:
            faults.append(f"{file.name}:{rows.line_num}: the line is not valid CSV: {error}")
            continue
        if not row:
            continue
        if columns is None:
            columns = [plain_name(cell) for cell in without_empty_end(row)]
        elif len(without_empty_end(row, len(columns))) > len(columns):
            faults.append(f"{file.name}:{rows.line_num}: the line has too many columns; put the caption in quotes")
        else:
            entries.append(Entry(f"{file.name}:{rows.line_num}", dict(zip(columns, row, strict=False))))


def _jsonl(file: Path, text: str, faults: list[str]) -> list[Entry]:
    entries = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                content = parse_json(line)
            except Fault as fault:
                faults.append(f"{file.name}:{number}: {fault}.")
                continue
            entries.append(Entry(f"{file.name}:{number}", content if isinstance(content, dict) else {}))
    return entries


def _json(file: Path, text: str) -> list[Entry]:
    try:
        content = parse_json(text)
    except Fault as fault:
        raise UsageError(f"{file}{fault.place}: {fault}.") from fault
    if not isinstance(content, list):
        raise UsageError(
            f"{file} does not contain a list of videos. Give a JSON list of objects with the keys video and prompt."
        )
    return [
        Entry(f"{file.name}, entry {number}", entry if isinstance(entry, dict) else {})
        for number, entry in enumerate(content, 1)
    ]
