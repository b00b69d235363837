"""Prompt files: text, JSON lines, CSV or YAML -> requests, every fault with its file, line and column. No torch."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import difflib
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal, get_args, get_origin

from slagen.attention import registry
from slagen.attention.schedule_file import method_of, names_file
from slagen.errors import UsageError
from slagen.generation import peers
from slagen.generation.config import GenerateConfig
from slagen.generation.sizes import clip_size
from slagen.io.documents import Entries, decode, parse_json, parse_yaml, size_of
from slagen.io.forms import Fault, shown
from slagen.io.paths import user_path
from slagen.io.spreadsheet import open_csv, plain_name, without_empty_end
from slagen.io.text import LONG_DASH, counted, cut
from slagen.settings import settings_of, with_complements

MAX_FILE = 16 * 2**20
MAX_PROMPTS = 100_000
MAX_FAULTS = 1000  # after which no more are looked for
OWN = {setting.field: setting for setting in registry.own_settings(GenerateConfig)}  # of attention methods
SETTINGS = {setting.field: setting for setting in settings_of(GenerateConfig)} | OWN
SIZES = ("size", "width", "height", "resolution", "aspect_ratio")
TYPES = {  # of what a line may say beside its prompt, by option: all that may differ within one loaded model
    **{"size": str, "resolution": str, "aspect-ratio": str, "id": str},
    **{name: s.kind for s in SETTINGS.values() if s.about.prompt_line for name in (s.name, s.about.complement) if name},
}
ELSEWHERE = {*(setting.name for setting in SETTINGS.values()), *peers.NAMES.values(), "json"} - {*TYPES, "prompt"}


@dataclass(frozen=True)
class Request:
    """One line of a prompt file.

    Args:
        prompt: what the video shows.
        fields: what the line says of GenerateConfig's fields.
        id: its own name, empty unless given.
        where: file and line, for messages.
    """

    prompt: str
    fields: dict[str, Any]
    id: str
    where: str


class _Fault(UsageError):
    """What is wrong with a line, and at which column, 1 being the first."""

    def __init__(self, text: str, column: int | None = None) -> None:
        super().__init__(text)
        self.text, self.column = text, column


def read_prompts(source: str) -> list[Request]:
    """Read and check a whole prompt file.

    Args:
        source: a .txt, .jsonl, .csv, .tsv or .yaml file, or "-" for text on stdin.
    Raises: UsageError with every fault, up to ten, each with file, line and column.
    """
    name, suffix, data = _load(source)
    text = _decode(name, data)
    requests: list[Request] = []
    faults: list[str] = []
    ids: dict[str, str] = {}
    for line, entry in PARSERS[suffix](name, text):
        if len(requests) == MAX_PROMPTS:
            raise UsageError(f"{name} contains more than {MAX_PROMPTS:,} prompts. Split it into several files.")
        if len(faults) == MAX_FAULTS:
            break
        where = f"{name}:{line}"
        try:
            if isinstance(entry, _Fault):
                raise entry
            request = _request(entry, where)
            if request.id in ids:
                raise _Fault(f"id {shown(request.id)} is already used in {ids[request.id]}")
            if request.id:
                ids[request.id] = where
            requests.append(request)
        except _Fault as fault:
            column = "" if fault.column is None else f":{fault.column}"
            faults.append(f"{where}{column}: {fault.text}")
    if faults:
        more = [f"... and {len(faults) - 10} more faults"] if len(faults) > 10 else []
        raise UsageError(*faults[:10], *more)
    if not requests:
        raise UsageError(f"{name} contains no prompts. Write one on each line.")
    return requests


def _load(source: str) -> tuple[str, str, bytes]:
    if source == "-":
        return "stdin", ".txt", _bounded("stdin", sys.stdin.buffer)
    path = user_path(source)
    try:
        with path.open("rb") as handle:  # which may be a pipe
            if (suffix := path.suffix.lower()) not in PARSERS:
                kinds = ".txt, .jsonl, .csv, .tsv, .yaml or .yml"
                raise UsageError(f"{path} ends in {cut(suffix)}, but prompt files end in {kinds}.")
            return str(path), suffix, _bounded(str(path), handle)
    except OSError as error:
        raise UsageError(
            f"{path} cannot be read ({error.strerror}). Give a file of prompts, or - for stdin."
        ) from error


def _bounded(name: str, handle: BinaryIO) -> bytes:
    data = handle.read(MAX_FILE + 1)
    if len(data) > MAX_FILE:
        raise UsageError(f"{name} is larger than {size_of(MAX_FILE)}. Split it into several files.")
    return data


def _decode(name: str, data: bytes) -> str:
    try:
        return decode(data)
    except Fault as fault:
        raise UsageError(f"{name}{fault.place}: {fault}. Save it as plain UTF-8 text.") from None


Entry = dict[str, Any] | _Fault


def _text(name: str, text: str) -> Iterator[tuple[int, Entry]]:
    """`prompt --option value --option value`; a value runs to the next " --"."""
    for number, line in enumerate(text.split("\n"), 1):
        if not line or line.isspace() or line.lstrip().startswith("#"):
            continue
        try:
            yield number, _text_line(line.rstrip("\r"))
        except _Fault as fault:
            yield number, fault


def check_dashes(line: str) -> None:
    """Raise UsageError where an option begins with what word processors make of two hyphens, or with one of them.

    It would be a part of the prompt, unseen.
    """
    for match in re.finditer(rf"(?:^|(?<=\s))((?:{LONG_DASH}|-)+)([A-Za-z][\w-]*)(?=\s|[=:]|$)", line):
        dash, name = match.groups()
        plain = _plain(name)
        known = plain in TYPES or plain in ELSEWHERE
        if dash == "--" or not known or (len(name) == 1 and not re.match(r"\s*[=:]?\s*\d", line[match.end() :])):
            continue
        raise _Fault(
            f"{dash}{name} does not begin with two hyphens. Write --{name} for the option, or put a space after the "
            "dash if it is a part of the prompt",
            match.start() + 1,
        )


def _text_line(line: str) -> dict[str, Any]:
    check_dashes(line)
    pieces = re.split(r"(?:^|(?<=\s))--(?=\S)", line)
    entry: dict[str, Any] = {"prompt": pieces[0].strip()}
    spelt: dict[str, str] = {}
    column = len(pieces[0]) + 1
    for piece in pieces[1:]:
        match = re.match(r"([^\s=]+)(?:\s*=\s*|\s+|$)(.*)", piece, re.DOTALL)
        name, value = match.groups() if match else (piece, "")
        option = _option(name, column)
        _check_once(f"--{cut(name)}", option, spelt, column)
        entry[option] = _convert(option, value.strip(), column)
        column += len(piece) + 2
    return entry


def _check_once(name: str, option: str, spelt: dict[str, str], column: int | None = None) -> None:
    """Raise _Fault where an option is set already; `spelt`: how the former ones are spelt."""
    former = spelt.setdefault(option, "")
    spelt[option] = name
    if former == name:
        raise _Fault(f"{name} is given twice", column)
    if former:
        raise _Fault(f"{former} and {name} both set the {option.replace('-', ' ')}", column)


def _option(name: str, column: int | None = None) -> str:
    """An option's name as we spell it. In a line of text it has a column; as a key of JSON, YAML or CSV none."""
    plain, typed = _plain(name), f"{'--' * bool(column)}{cut(name)}"
    if plain in TYPES:
        return plain
    if plain in ELSEWHERE:
        raise _Fault(f"{typed} is the same for all prompts and belongs on the command line", column)
    reason = peers.why_not(plain)
    if reason is not None:
        raise _Fault(f"{typed} {reason.partition(' ')[2].removesuffix('.')}", column)
    known = list(TYPES) if column else ["prompt", *TYPES]
    near = [f"; did you mean {_spelt(n, column)}?" for n in difflib.get_close_matches(plain, known, n=1, cutoff=0.75)]
    lead = f"{near[0]} A" if near else "; a"
    raise _Fault(f"{typed} is unknown{lead} line can set {', '.join(_spelt(n, column) for n in known)}", column)


def _spelt(option: str, column: int | None) -> str:
    """An option of ours as it is in a line of text, or as a key."""
    return f"--{option}" if column else option.replace("-", "_")


def _plain(name: str) -> str:
    return peers.LETTERS.get(plain := plain_name(name), peers.normalize(plain))


def _convert(option: str, value: Any, column: int | None = None) -> Any:
    """A value of an option's type, from text or from JSON."""
    kind, name = TYPES[option], _spelt(option, column)
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            choices = ", ".join(map(str, get_args(kind)))
            raise _Fault(f"{name} is {shown(value)}, but must be one of {choices}", column)
        return value
    if kind is bool:
        truth = {"true": True, "yes": True, "": True, "false": False, "no": False}.get(str(value).lower())
        if truth is None:
            raise _Fault(f"{name} is {shown(value)}, but must be true or false", column)
        return truth
    if kind is str:
        if not isinstance(value, str | int | float) or isinstance(value, bool):
            raise _Fault(f"{name} is {shown(value)}, but must be text", column)
        return _readable(option, str(value))
    if not isinstance(value, bool) and isinstance(value, str | int | float):
        with contextlib.suppress(ValueError, OverflowError):  # no number, or one beyond all bounds
            number = kind(value)
            if isinstance(value, str) or number == value:
                return number
    raise _Fault(f"{name} is {shown(value)}, but must be a{' whole' * (kind is int)} number", column)


def _readable(name: str, text: str) -> str:
    """The text itself; half of a pair that JSON can write is no character. Raises _Fault."""
    if any("\ud800" <= char <= "\udfff" for char in text):
        raise _Fault(f"{name} is {shown(text)}, which contains an incomplete character (a lone surrogate)")
    return text


def _mapping(content: Any) -> Entry:
    """An entry of JSON, YAML or CSV, its keys spelt as options are."""
    if isinstance(content, str):
        content = {"prompt": content}
    if not isinstance(content, dict):
        return _Fault(f"the entry is {shown(content)}, but must be an object with a prompt")
    entry: dict[str, Any] = {}
    spelt: dict[str, str] = {}
    try:
        for key, value in content.items():
            if plain_name(str(key)) == "prompt":
                if "prompt" in entry:
                    raise _Fault("prompt is given twice")
                if not isinstance(value, str):
                    raise _Fault(f"prompt is {shown(value)}, but must be text")
                entry["prompt"] = _readable("prompt", value.strip())
            elif value is not None:
                option = _option(str(key))
                _check_once(cut(str(key)), option, spelt)
                entry[option] = _convert(option, value)
    except _Fault as fault:
        return fault
    return entry


def _jsonl(name: str, text: str) -> Iterator[tuple[int, Entry]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line or line.isspace():
            continue
        try:
            yield number, _mapping(parse_json(line))
        except Fault as fault:
            yield number, _Fault(fault.text, fault.column)


def _csv(name: str, text: str) -> Iterator[tuple[int, Entry]]:
    rows = open_csv(text, "prompt")
    header: list[str] | None = None
    try:
        for row in rows:
            if not any(cell.strip() for cell in row):
                continue
            if header is None:
                header = [plain_name(cell) for cell in without_empty_end(row)]
                if "prompt" not in header:
                    yield rows.line_num, _Fault("the table has no column named prompt")
                    return
                if len(set(header)) < len(header):
                    yield rows.line_num, _Fault("the table has two columns of the same name")
                    return
                continue
            row = without_empty_end(row, len(header))
            if len(row) != len(header):
                cells = counted(len(row), "cell")
                yield rows.line_num, _Fault(f"the line has {cells}, but the first line has {len(header)} column names")
                continue
            yield (
                rows.line_num,
                _mapping({k: v.strip() for k, v in zip(header, row, strict=True) if v.strip() or k == "prompt"}),
            )
    except csv.Error as error:
        yield rows.line_num, _Fault(f"the file is not valid CSV: {error}")


def _yaml(name: str, text: str) -> Iterator[tuple[int, Entry]]:
    try:
        content = parse_yaml(text)
    except Fault as fault:
        yield fault.line or 1, _Fault(fault.text, fault.column)
        return
    if isinstance(content, dict) and set(content) == {"prompts"}:
        content = content["prompts"]
    if content is None:
        return
    if not isinstance(content, Entries):
        yield 1, _Fault("the file must contain a list of prompts")
        return
    for line, value in zip(content.lines, content, strict=True):
        yield line, _mapping(value)


PARSERS = {
    "": _text, ".txt": _text, ".jsonl": _jsonl, ".ndjson": _jsonl, ".csv": _csv, ".tsv": _csv, ".yaml": _yaml,
    ".yml": _yaml,
}  # fmt: skip


def _request(entry: dict[str, Any], where: str) -> Request:
    """Check a line by making the config that it would run with, model apart."""
    prompt = entry.pop("prompt", "")
    if not prompt:
        raise _Fault("the line has no prompt", 1)
    name = entry.pop("id", "")
    if name and not re.fullmatch(r"[\w][\w.-]{0,79}", name):
        raise _Fault(f"id is {shown(name)}, but must be at most 80 letters, digits, dots, dashes and underscores")
    try:
        fields = with_complements(GenerateConfig, {name.replace("-", "_"): value for name, value in entry.items()})
        size = clip_size(**{key: fields.pop(key) for key in SIZES if key in fields})
    except UsageError as error:
        raise _Fault(str(error)) from None
    if size != (None, None):
        fields["width"], fields["height"] = size
    for key, read in [(key, SETTINGS[key].about.read) for key in fields]:
        if read is not None and (value := read(fields[key])) != fields[key]:
            fields[key] = value
    fields = {key: value for key, value in fields.items() if value is not None}
    own = tuple((key, fields.pop(key)) for key in OWN if key in fields)
    if own:
        fields["attention_options"] = own
    try:
        method = _method_with(own) | method_of(fields.get("sparsity_schedule"))
        config = GenerateConfig(prompt=prompt, **fields, **method)
    except UsageError as error:
        raise _Fault(str(error)) from None
    fields = {key: value if names_file(value) else getattr(config, key) for key, value in fields.items()}
    return Request(prompt, fields, name, where)


def _method_with(own: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
    """As fields of GenerateConfig, a method that has such options; none where any will do. Raises UsageError.

    Which one will run, the command line says: `apply` raises where that one has not these options.
    """
    names = [name for name, _ in own]
    fitting = [set(registry.with_option(name)) for name in names]
    if not fitting:
        return {}
    common = [name for name in registry.names() if all(name in methods for methods in fitting)]
    if not common:
        raise UsageError(f"{' and '.join(names)} are options of different attention methods. Leave one out")
    return {"attention": common[0]}


def check_count(requests: list[Request], each: int) -> None:
    """Raise UsageError where a file asks for too many videos in all; `each`: of a prompt that does not say how many."""
    count = sum(request.fields.get("num_videos", each) for request in requests)
    if count > MAX_PROMPTS:
        raise UsageError(
            f"the prompts ask for {count:,} videos, but one run generates at most {MAX_PROMPTS:,}. Split the file."
        )


def apply(base: GenerateConfig, request: Request) -> GenerateConfig:
    """The command line's settings, with what a line says in place of theirs."""
    fields = dict(request.fields)
    if "sparsity" in fields:
        fields["sla_topk"] = None
    elif "sla_topk" in fields:
        fields["sparsity"] = None
    if own := fields.get("attention_options"):
        fields["attention_options"] = tuple({**dict(base.attention_options), **dict(own)}.items())
    return dataclasses.replace(base, prompt=request.prompt, **fields)
