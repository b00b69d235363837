"""--config: a command's options from a YAML file, where its command line says nothing else."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from slagen.errors import UsageError
from slagen.generation import peers
from slagen.io.documents import decode, parse_yaml, read_bytes
from slagen.io.forms import Fault, shown
from slagen.io.paths import user_path
from slagen.io.text import cut

CONFIG = "--config"
ABOUT = typer.Option(
    CONFIG, metavar="FILE", help="A YAML file of options, such as num_frames: 17. Options on the command line win."
)
# Options that say the same thing: one of them on the command line takes the place of all of them in the file.
SAME = (
    {"--size", "--width", "--height", "--resolution", "--aspect-ratio"}, {"--sparsity", "--keep", "--sla-topk"},
    {"--prompt", "--prompts"},
)  # fmt: skip
NEAR = 0.7  # how alike two names must be, from 0 to 1, for the one to be suggested for the other


def takes_config(function: Callable[..., None]) -> Callable[..., None]:
    """Give a command the option --config, which the parser of its arguments reads."""
    signature = inspect.signature(function, eval_str=True)

    @functools.wraps(function)
    def command(*, config_file: str | None, **given: Any) -> None:
        function(**given)

    own = inspect.Parameter(
        "config_file", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[str | None, ABOUT]
    )
    parameters = [*signature.parameters.values(), own]
    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


@dataclass(frozen=True)
class ConfigFile:
    """What a file adds to a command line.

    Args:
        name: of the file, for messages. arguments: to be parsed before those that were typed.
        keys: by the name of the parameter that it sets, the key as the file has it.
    """

    name: str
    arguments: list[str]
    keys: Mapping[str, str]

    def explain(self, error: Any) -> None:
        """Say in an error of the parser that a value stands in the file, and under which key."""
        key = self.keys.get(getattr(getattr(error, "param", None), "name", None) or "")
        if key is not None:
            error.param_hint = f"{key} in {self.name}"

    def name_in(self, error: UsageError) -> None:
        """Begin a message with the file's name where it is about an option that the file has set."""
        for name in self.keys:
            is_about = error.message.startswith(f"{name} ") or f"--{name.replace('_', '-')} " in error.message
            if is_about and not error.message.startswith(self.name):  # the group of the command has it too
                error.message = f"{self.name}: {error.message}"


def read_config(
    arguments: Sequence[str], parameters: Iterable[Any], command: str, *, is_group: bool
) -> ConfigFile | None:
    """Read the file that arguments name with --config; None where they name none.

    Args:
        arguments: as typed, in our words. parameters: Typer's, of the command. command: its name, for messages.
        is_group: what follows the first word that is not an option belongs to a subcommand.
    Raises: UsageError for a file that cannot be read, and for a key that is no option.
    """
    options = {
        name: parameter
        for parameter in parameters
        if parameter.param_type_name == "option"
        for name in (*parameter.opts, *parameter.secondary_opts)
    }
    typed, files, has_words = _typed(arguments, options, is_group)
    if not files:
        return None
    if len(files) > 1:
        raise UsageError(f"{CONFIG} is given twice. Put all options into one file.")
    file = files[0]
    content = _read(file)
    found: dict[str, str] = {}
    keys: dict[str, str] = {}
    added: list[str] = []
    for key, value in content.items():
        option = _option(str(key), options, file, command)
        parameter = options[option]
        if (former := keys.setdefault(parameter.name, str(key))) != str(key):
            raise UsageError(f"{file}: {former} and {cut(str(key))} are the same option. Keep one of them.")
        same = next((group for group in SAME if option in group), {option})
        same = {*same, *parameter.opts, *parameter.secondary_opts}
        if value is None or same & typed or (has_words and "--prompt" in same):
            continue
        found[parameter.name] = str(key)
        added += _arguments(option, parameter, value, f"{file}: {key}")
    return ConfigFile(file, added, found)


def _typed(arguments: Sequence[str], options: Mapping[str, Any], is_group: bool) -> tuple[set[str], list[str], bool]:
    """The options that are typed, the values of --config, and whether there are words that are no options."""
    typed: set[str] = set()
    files: list[str] = []
    left, has_words = list(arguments), False
    while left:
        word = left.pop(0)
        if word == "--" or (is_group and not word.startswith("-")):
            return typed, files, has_words or (bool(left) and not is_group)
        if not word.startswith("-") or word == "-":
            has_words = True
            continue
        name, equals, value = word.partition("=")
        if not word.startswith("--") and name not in options:
            name, equals, value = word[:2], "=", word[2:]  # -o and its value in one word
        typed.add(name)
        if name in options and not equals and not options[name].is_flag:
            value, equals = (left.pop(0), "=") if left else ("", "")
        if name == CONFIG and equals:
            files.append(value)
    return typed, files, has_words


def _read(file: str) -> dict[str, Any]:
    path, advice = user_path(file), "Give a YAML file of options, such as num_frames: 17."
    try:
        content = parse_yaml(decode(read_bytes(path)))
    except Fault as fault:
        raise UsageError(f"{path}{fault.place}: {fault}. {advice}") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror or error}). {advice}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        found = "a list" if isinstance(content, list) else shown(content)
        raise UsageError(f"{path} contains {found}, but must contain options by name. {advice}")
    return content


def _option(key: str, options: Mapping[str, Any], file: str, command: str) -> str:
    """The option that a key names, with its dashes. Raises UsageError."""
    is_training = "--lora-rank" in options
    name = peers.normalize(key.strip().lstrip("-"), is_training=is_training)
    known = {option[2:] for option in options if option.startswith("--")} - {CONFIG[2:], "help"}
    if name in known:
        return f"--{name}"
    if (reason := peers.why_not(name, is_training=is_training)) is not None:
        raise UsageError(f"{file}: {reason.removeprefix('--')}")
    close = difflib.get_close_matches(name.lower(), sorted(known), n=1, cutoff=NEAR)
    advice = f"Did you mean {close[0].replace('-', '_')}?" if close else f"See {command} --help."
    raise UsageError(f"{file}: {cut(key)} is not an option of {command}. {advice}")


def _arguments(option: str, parameter: Any, value: Any, where: str) -> list[str]:
    """A value as it would be typed. Raises UsageError for what no option takes."""
    if parameter.is_flag:
        if not isinstance(value, bool):
            raise UsageError(f"{where} is {shown(value)}, but must be true or false.")
        if value:
            return [option]
        others = parameter.secondary_opts if option in parameter.opts else parameter.opts
        return list(others[:1])
    values = value if isinstance(value, list) and parameter.multiple else [value]
    for each in values:
        if not isinstance(each, str | int | float) or isinstance(each, bool):
            raise UsageError(f"{where} is {shown(each)}, but must be text or a number.")
    return [f"{option}={each}" for each in values]
