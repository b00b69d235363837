"""Golden copies: what must stay as it is while the code is rearranged.

They lie in tests/golden/. After a change on purpose write them anew, and look at what `git diff` says of it:

    SLAGEN_GOLDEN=renew python -m pytest -n 0 tests/test_golden.py

An entry that no change may alter is not written anew: the key of a job in a batch, the tensors of the bundled weights,
what a command line means. Where only a name inside of the code changed, delete the golden file first, and compare.
"""

import dataclasses
import inspect
import io
import json
import os
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from slagen import (
    batch,
    bench,
    cli,
    cluster,
    convert,
    dataset,
    decode,
    doctor,
    finetune,
    generate,
    plan,
    replay,
    selftest,
)
from slagen.cli import ALIASES, run
from slagen.config import BatchConfig, BenchConfig, DataConfig, FinetuneConfig, GenerateConfig, SLAConfig

GOLDEN = Path(__file__).parent / "golden"
RENEW = os.environ.get("SLAGEN_GOLDEN") == "renew"
HOW = "If that is meant: SLAGEN_GOLDEN=renew python -m pytest -n 0 tests/test_golden.py, and look at git diff."

TASKS = (
    (generate, "generate"), (batch, "batch"), (cluster, "batch_on_ray"), (plan, "plan"), (plan, "models"),
    (replay, "describe"), (replay, "replay"), (decode, "decode"), (convert, "convert"), (convert, "merge"),
    (finetune, "finetune"), (dataset, "prepare"), (bench, "bench"), (doctor, "examine"), (doctor, "kernel_costs"),
    (selftest, "claim"),
)  # fmt: skip


def to_line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def compare(name: str, found: dict[str, Any], *, forever: bool = False) -> None:
    """Hold entries against those of a golden file. `forever`: an entry that is there is never written anew."""
    path = GOLDEN / name
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if RENEW:
        kept = {key: known.get(key, value) if forever else value for key, value in found.items()}
        lines = [f"{to_line(key)}: {to_line(value)}" for key, value in kept.items()]
        path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
        known = kept
    missing, added = known.keys() - found.keys(), found.keys() - known.keys()
    assert not missing and not added, f"{name}: gone: {sorted(missing)}; new: {sorted(added)}. {HOW}"
    for key, value in found.items():
        assert value == known[key], f"{name}, {key}. {'This may never change.' if forever else HOW}"


class Reached(BaseException):
    """A command has come to its task, with these arguments."""


def plain(value: Any) -> Any:
    """A value as JSON; of a config its class and the fields that are not at their defaults, wherever it is defined."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        set_fields = {"class": type(value).__name__}
        for field in dataclasses.fields(value):
            is_made = field.default_factory is not dataclasses.MISSING
            default = field.default_factory() if is_made else field.default
            found = getattr(value, field.name)
            if found != default:
                set_fields[field.name] = plain(found)
        return set_fields
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return value.as_posix().replace(Path.home().as_posix(), "~")
    return value if isinstance(value, str | int | float | None) else str(value)


def replacement(name: str, task: Any) -> Any:
    """What stands in for a task: it ends the command, and tells the arguments that differ from the task's defaults."""
    signature = inspect.signature(task)

    def stop(*args: Any, **kwargs: Any) -> None:
        given = signature.bind(*args, **kwargs).arguments
        told = {
            key: plain(value)
            for key, value in given.items()
            if not callable(value) and value != signature.parameters[key].default
        }
        raise Reached({"task": name, **told})

    return stop


@pytest.fixture
def no_tasks(monkeypatch, tmp_path):
    """Commands end where their work would begin; no CUDA device, no Ray, an empty folder, a prompt on stdin."""
    for module, name in TASKS:
        monkeypatch.setattr(module, name, replacement(name, getattr(module, name)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(cli, "app", typer.main.get_command(cli.app))  # built once, not for each line
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.chdir(tmp_path)


def meaning(line: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What a command line comes to: the task with its arguments, or the exit code."""
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a prompt from stdin\n"), "utf-8"))
    try:
        code = run(shlex.split(line.removeprefix("slagen ")))
    except Reached as end:
        return end.args[0]
    return {"exit": code}


def command_lines() -> list[str]:
    lines = (GOLDEN / "command_lines.txt").read_text(encoding="utf-8").splitlines()
    return list(dict.fromkeys(line for line in lines if line.startswith("slagen ")))


def test_every_former_command_line_means_what_it_meant(no_tasks, monkeypatch, capsys):
    """Of the README, the documents, the tests, and of every option and alias. Refused ones are refused."""
    compare("command_lines.json", {line: meaning(line, monkeypatch) for line in command_lines()}, forever=True)
    capsys.readouterr()


def test_defaults_of_the_configs():
    classes = (GenerateConfig, BatchConfig, DataConfig, FinetuneConfig, BenchConfig, SLAConfig)
    found = {}
    for config in classes:
        for field in dataclasses.fields(config):
            if field.default is not dataclasses.MISSING:
                found[f"{config.__name__}.{field.name}"] = plain(field.default)
    compare("defaults.json", found)


def parameters(command: Any, name: str = "slagen"):
    """(command's name, option's spellings) of every option of a command and its subcommands."""
    for parameter in command.params:
        if parameter.param_type_name == "option":
            yield name, [*parameter.opts, *parameter.secondary_opts]
    for sub, inner in getattr(command, "commands", {}).items():
        yield from parameters(inner, f"{name} {sub}")


def test_every_option_and_alias_is_in_a_golden_command_line():
    """So that whoever adds one writes down what it means."""
    words = [shlex.split(line) for line in command_lines()]
    for command, names in parameters(typer.main.get_command(cli.app)):
        if command == "slagen":
            continue  # --version does no task
        start = command.split()
        given = {word.partition("=")[0] for line in words if line[: len(start)] == start for word in line}
        assert set(names) <= given, f"{command}: add a line with {sorted(set(names) - given)}. {HOW}"
    given = {word.lstrip("-").replace("_", "-").partition("=")[0] for line in words for word in line}
    assert not ALIASES.keys() - given, f"add a line with {sorted(ALIASES.keys() - given)}. {HOW}"


def helps(command: Any, words: tuple[str, ...] = ()):
    yield words
    for name, inner in getattr(command, "commands", {}).items():
        yield from helps(inner, (*words, name))


def test_help_texts(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    found = {}
    for words in helps(typer.main.get_command(cli.app)):
        assert run([*words, "--help"]) == 0
        found["-".join(["slagen", *words]) + ".txt"] = capsys.readouterr().out
    folder = GOLDEN / "help"
    if RENEW:
        for name, text in found.items():
            (folder / name).write_text(text, encoding="utf-8")
    assert {path.name for path in folder.iterdir()} == found.keys()
    for name, text in found.items():
        assert text == (folder / name).read_text(encoding="utf-8"), f"slagen {name} --help reads otherwise. {HOW}"
