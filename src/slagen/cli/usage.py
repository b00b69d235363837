"""An error of any kind -> what to say of it, and the exit code."""

from __future__ import annotations

import difflib
import re
import shlex
import sys
from typing import Any

from slagen import packages
from slagen.errors import EnvironmentProblem, SlagenError, no_memory, of_memory
from slagen.generation import peers
from slagen.io.text import LONG_DASH, cut, line, quote

WITHOUT_DOCSTRINGS = (
    "Python runs with -OO or PYTHONOPTIMIZE=2, which removes the docstrings that transformers and diffusers need. "
    "Run Python without this option."
)
OF_A_PROMPT = ("slagen generate", "slagen plan")
EXTRA = "Unexpected arguments:"
WANTED = {"integer": "a whole number", "number": "a number", "float": "a number", "boolean": "true or false"}
NEAR = 0.75  # how alike two spellings must be, from 0 to 1, for the one to be suggested for the other
MAX_ARGUMENT = 200  # characters of one argument in a message


def explain(error: Exception, arguments: list[str]) -> tuple[str, int]:
    """One message, with at most a line of any argument, and the exit code."""
    text, code = _explain(error, arguments)
    for argument in arguments:
        if len(argument) > MAX_ARGUMENT or "\n" in argument:
            for part in (argument, argument.partition("=")[2]):
                for spelling in (part, line(part)) if part.strip() else ():
                    text = text.replace(spelling, line(cut(part, MAX_ARGUMENT)))
    return text, code


def _explain(error: Exception, arguments: list[str]) -> tuple[str, int]:
    if isinstance(error, SlagenError):
        return str(error), error.exit_code
    if hasattr(error, "format_message"):
        return _wrong_usage(error, arguments), 2
    if isinstance(error, UnicodeEncodeError):
        advice = "Rename it" if error.encoding == "utf-8" else "Use a UTF-8 locale (LC_ALL=C.UTF-8)"
        return f"{quote(error.object)} cannot be written as {error.encoding}. {advice}.", 2
    if no_memory(error):
        return of_memory(error, *arguments[:1]), 1
    if isinstance(error, OSError):
        what = line(str(error) if error.filename is None else f"{error.filename}: {error.strerror}")
        return f"{what}. Fix this and run again (SLAGEN_DEBUG=1 shows the traceback).", 1
    if isinstance(error, ImportError) and (lack := packages.explain(error)):
        return lack, EnvironmentProblem.exit_code
    if isinstance(error, RuntimeError) and (match := re.search(r".*(CUDA error|Triton Error \[CUDA\]).*", str(error))):
        advice = "Test the GPU with slagen doctor --selftest; SLAGEN_DEBUG=1 shows the traceback"
        return f"the GPU failed: {match[0].rstrip('.')}. {advice}.", EnvironmentProblem.exit_code
    if sys.flags.optimize > 1:
        return WITHOUT_DOCSTRINGS, EnvironmentProblem.exit_code
    return f"{type(error).__name__}: {error} (this is a bug in slagen; SLAGEN_DEBUG=1 shows the traceback)", 1


def _wrong_usage(error: Any, arguments: list[str]) -> str:
    """What Typer says of arguments that it cannot take, and what to type."""
    context = getattr(error, "ctx", None)
    named = " ".join(["slagen", *arguments[:1]]) if arguments and not arguments[0].startswith("-") else "slagen"
    command = named if context is None else context.command_path
    for argument in arguments:
        if match := re.match(rf"{LONG_DASH}+([A-Za-z]\S*)", argument):
            return f"{quote(argument)} begins with a long dash. An option begins with two hyphens: --{cut(match[1])}."
    if (shown := error.format_message().strip()).startswith("Usage: "):  # the help, where no arguments are given
        return shown
    text = _as_typed(_said(error), arguments, is_training=command == "slagen finetune")
    option = getattr(error, "option_name", None)
    if command == "slagen batch" and option and peers.normalize(option.lstrip("-")) == "num-videos":
        return (
            f"slagen batch has no {option}. Put --num-videos on a line of the file, or run "
            "slagen generate --prompts FILE --num-videos 2."
        )
    for argument in arguments:
        if option and command in OF_A_PROMPT and argument.startswith(option) and re.search(r"\s", argument):
            return (
                f"{quote(argument)} is not an option. Put a prompt that begins with a dash after --: "
                f"{command} -- {shlex.quote(line(cut(argument)))}"
            )
    if text.startswith(EXTRA) and command in OF_A_PROMPT:
        return f"{text} Put a prompt of several words in quotes."
    return f"{text} See {command} --help."


def _said(error: Any) -> str:
    """What Typer says, as whole sentences in slagen's words; what a parser says behind it is left out."""
    text = error.format_message().strip()
    if match := re.fullmatch(r"Invalid value for (.+?): (?:Value error, )?(.*)", text, re.DOTALL):
        name, reason = match[1].replace("'", ""), match[2]
        if (choice := re.fullmatch(r"'(.*)' is not one of (.*?)\.?", reason, re.DOTALL)) is not None:
            return f"{name} is {quote(choice[1])}, but must be one of {choice[2].replace(chr(39), '')}."
        for kind, wanted in WANTED.items():
            if f"a valid {kind}" in reason:
                given = _given(error)
                return f"{name} {'' if given is None else f'is {quote(given)}, but '}must be {wanted}."
    if match := re.fullmatch(r"Got unexpected extra arguments?(?:\(s\))? \((.*)\)\.?", text, re.DOTALL):
        return f"{EXTRA} {match[1]}."
    if possibilities := getattr(error, "possibilities", None):
        near = [name for name in possibilities if _is_near(error.option_name.lstrip("-"), name.lstrip("-"))]
        question = f" Did you mean {' or '.join(near)}?" if near else ""
        return f"No such option: {error.option_name}.{question}"
    return text if text.endswith(("?", "!")) else f"{text.rstrip('.')}."


def _is_near(typed: str, name: str) -> bool:
    return difflib.SequenceMatcher(None, typed.replace("_", "-").lower(), name).ratio() >= NEAR


def _as_typed(text: str, arguments: list[str], *, is_training: bool) -> str:
    """A message on an option of ours, with the option as another tool spells it where that was typed."""
    typed = {word.partition("=")[0] for word in arguments if word.startswith("--")}
    for word in sorted(typed):
        ours = f"--{peers.normalize(word[2:], is_training=is_training)}"
        found = None if ours in typed else re.search(rf"(?<![\w-]){re.escape(ours)}(?![\w-])", text)
        if found is not None:
            text = text[: found.start()] + word + text[found.end() :]
    return text


def _given(error: Any) -> str | None:
    """What was given where a number is wanted, if the parser behind Typer says it."""
    faults: list[Any] = getattr(error.__cause__, "errors", list)()
    return str(faults[0]["input"]) if faults else None
