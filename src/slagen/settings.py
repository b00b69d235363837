"""An option is a field of a config, with metadata for the command line, prompt files and manifests."""

import dataclasses
import difflib
import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, get_args, get_type_hints

from slagen.errors import UsageError

KEY = "option"  # of a field's metadata


@dataclass(frozen=True)
class Option:
    """What is known of a field.

    Args:
        help: one or two sentences for `--help`; empty: not an option of the command line.
        panel: the heading of the help that it stands under; empty for the first one.
        name: its spelling, where that is not the field's name with dashes.
        short: a second spelling with one dash.
        metavar: what stands for its value in the help.
        hidden: understood, but not shown in the help.
        of_methods: the field holds (name, value) of options that only some attention methods have; on the command line
            each of these stands in its place.
        trainable: of these, only options of methods with a backward pass.
        is_size: it is shown as --size WxH, and --width, --height, --resolution and --aspect-ratio are understood.
        kind: type of what is typed, where that is not the field's.
        read: from what is typed to the field's value. Raises UsageError.
        prompt_line: a line of a prompt file may set it.
        pixels: its value changes the video (of a training: the weights).
        in_key: its value, if it changes the video, is a part of a manifest's key; not where something else stands for
            it there, as the hash of a file for its path.
        complement: another name that takes 1 minus its value, or values.
        training: of an attention method's config: only training uses it. Other commands understand it, do not show it,
            and say that it has no effect.
        later: of an attention method's config: it came when files had been written without it. At its default it is
            not written, so that files and reports stay as they were.
    """

    help: str = ""
    panel: str = ""
    name: str = ""
    short: str = ""
    metavar: str | None = None
    hidden: bool = False
    of_methods: bool = False
    trainable: bool = False
    is_size: bool = False
    kind: type | None = None
    read: Callable[[Any], Any] | None = None
    prompt_line: bool = False
    pixels: bool = True
    in_key: bool = True
    complement: str = ""
    training: bool = False
    later: bool = False


def option(default: Any, help: str = "", **about: Any) -> Any:
    """A field of a config with its default, and what `Option` says of it."""
    return dataclasses.field(default=default, metadata={KEY: Option(help, **about)})


@dataclass(frozen=True)
class Setting:
    """A field of a config with its metadata; `kind`: its type, without None where it may be None."""

    field: str
    default: Any
    kind: Any
    about: Option

    @property
    def name(self) -> str:
        """As it is typed, without the two dashes."""
        return self.about.name or self.field.replace("_", "-")


def settings_of(config: type) -> tuple[Setting, ...]:
    """Every field of a config, in order."""
    return _settings_of(config)


@functools.cache  # a command asks hundreds of times, and type hints are evaluated from their text
def _settings_of(config: type) -> tuple[Setting, ...]:
    hints = get_type_hints(config)
    return tuple(
        Setting(field.name, field.default, _plain(hints[field.name]), field.metadata.get(KEY, Option()))
        for field in dataclasses.fields(config)
    )


def _plain(kind: Any) -> Any:
    """A type without None: int of `int | None`."""
    kinds = [part for part in get_args(kind) if part is not type(None)]
    return kinds[0] if len(kinds) == 1 and type(None) in get_args(kind) else kind


def names_where(config: type, holds: Callable[[Option], bool]) -> set[str]:
    """The fields of a config whose option is such."""
    return {setting.field for setting in settings_of(config) if holds(setting.about)}


def changed(values: Any) -> dict[str, Any]:
    """The fields of a config that count in a key and differ from their defaults, so that a new option counts in no
    key until it is used."""
    return {
        setting.field: getattr(values, setting.field)
        for setting in settings_of(type(values))
        if setting.about.pixels and setting.about.in_key and getattr(values, setting.field) != setting.default
    }


def with_complements(config: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by field, in which a complement of one, such as keep of sparsity, is said as that field."""
    said = dict(values)
    for setting in settings_of(config):
        if setting.about.complement:
            said = without_complement(said, setting.about.complement, setting.field)
    return said


def without_complement(values: Mapping[str, Any], name: str, field: str) -> dict[str, Any]:
    """Values in which what `name` says is said as 1 minus it, by `field`, to 12 digits.

    Raises: UsageError where both are given, or a value is no number above 0 and at most 1.
    """
    said = dict(values)
    given = said.pop(name, None)
    if given is None or given == []:
        return said
    if said.get(field) not in (None, []):
        raise UsageError(f"{name} and {field} are both given, but {name} is 1 - {field}. Give one of them.")
    fractions = given if isinstance(given, list) else [given]
    for x in fractions:
        if not isinstance(x, int | float) or isinstance(x, bool) or not 0 < x <= 1:
            text = repr(x)[:60]
            raise UsageError(f"{name} is {text}, but must be a number above 0 and at most 1. Try --{name} 0.05.")
    rest = [round(1 - x, 12) for x in fractions]
    said[field] = rest if isinstance(given, list) else rest[0]
    return said


def to_fields(config: Any) -> dict[str, Any]:
    """The fields of an attention method's config by name, ready for JSON; those that came later where not at their
    default."""
    return {
        setting.field: value
        for setting in settings_of(type(config))
        if (value := getattr(config, setting.field)) != setting.default or not setting.about.later
    }


def no_argument(function: str, name: str, known: Iterable[str], *, ours: str = "", reason: str = "") -> TypeError:
    """The error for an argument that a function does not have, with what to give instead.

    Args:
        known: what it has. ours: its own name for the argument; empty: the nearest. reason: what to say instead.
    """
    close = [ours] if ours else difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.75)
    said = f". Did you mean {close[0]}?" if close else f". Its arguments are {', '.join(sorted(known)) or 'none'}."
    return TypeError(f"{function}() has no argument {name[:60]!r}{reason or said}")
