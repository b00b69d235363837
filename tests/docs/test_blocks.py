"""The code blocks of README and docs/: their commands and options exist, and they run as printed."""

import re
from unittest.mock import patch

import pytest
import typer
from doc_pages import PAGES, blocks, read, run_block, slagen_arguments, small_clips, statements

from slagen.cli.app import app
from slagen.errors import UsageError
from slagen.generation import peers

RUN = [name for name in PAGES if name != "docs/command-line.md" and any(block.runs for block in blocks(read(name)))]
NOT_OURS = {"--constraint", "--nproc-per-node", "--user"}  # of pip and torchrun


def parse(given: list[str]) -> None:
    """Parse a command line as slagen does, without running it or reading a file of options."""
    command, name = typer.main.get_command(app), "slagen"
    while given and given[0] in getattr(command, "commands", {}):
        name = f"{name} {given[0]}"
        command, given = command.commands[given[0]], given[1:]
    with patch("slagen.cli.parsing.read_config", return_value=None):
        command.make_context(name, list(given))


def wrong_commands(text: str) -> list[str]:
    """What is wrong with the commands in a page's blocks."""
    found = []
    for block in blocks(text):
        for statement in statements(block.code) if block.language == "bash" else ():
            given = slagen_arguments(statement)
            try:
                if given:
                    parse(given)
            except typer.Exit:
                pass  # --version and --help
            except Exception as error:  # of the parser behind Typer, which has a name of its own for each version
                if not isinstance(error, UsageError) and not hasattr(error, "format_message"):
                    raise
                found.append(f"{statement}: {error}")
    return found


@pytest.mark.parametrize("name", PAGES)
def test_every_command_is_one_that_slagen_takes(name):
    assert wrong_commands(read(name)) == []


def test_a_wrong_option_in_a_page_is_found():
    page = read("docs/first-video.md")
    assert "--sparsity 0.8" in page
    assert "--sparsty" in wrong_commands(page.replace("--sparsity 0.8", "--sparsty 0.8"))[0]
    assert "valid integer" in wrong_commands(page.replace("--steps 4", "--steps many"))[0]


def test_every_command_is_in_a_page():
    said = {
        given[0]
        for name in PAGES
        if name != "docs/command-line.md"
        for block in blocks(read(name))
        if block.language == "bash"
        for statement in statements(block.code)
        if (given := slagen_arguments(statement))
    }
    assert set(typer.main.get_command(app).commands) <= said


def test_the_readmes_python_has_six_lines():
    (block,) = (block for block in blocks(read("README.md")) if block.language == "python")
    assert block.runs and len(block.code.splitlines()) <= 6


def spellings() -> set[str]:
    """Every option of every command, and every one of other tools that is understood or refused with a reason."""
    own = {option for _, options in options_by_command() for option in options}
    theirs = {*peers.NAMES, *peers.TRAINER_NAMES, *peers.REFUSED, *peers.TRAINER_REFUSED, *peers.LETTERS}
    return own | {f"--{name}" for name in (*theirs, *peers.HEIGHT_FIRST)}


def options_by_command():
    waiting = [("slagen", typer.main.get_command(app))]
    while waiting:
        name, command = waiting.pop()
        yield name, {o for p in command.params for o in (*p.opts, *p.secondary_opts)} | {"--help"}
        waiting += getattr(command, "commands", {}).items()


@pytest.mark.parametrize("name", PAGES)
def test_every_option_in_the_text_exists(name):
    text = "".join(read(name).split("```")[::2])
    named = {found.replace("_", "-").lower() for found in re.findall(r"`(--[a-zA-Z][\w-]*)", text)}
    shell = {"--install-completion", "--show-completion", "--version", "--strict"}
    assert named - spellings() - NOT_OURS - shell == set()


@pytest.mark.parametrize("name", PAGES)
def test_a_block_that_is_not_run_says_why(name):
    marks = [block.mark for block in blocks(read(name)) if block.language in ("bash", "python") and block.mark]
    assert all(re.fullmatch(r"slow|not run: \w.{5,}", mark) for mark in marks)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUN)
def test_the_blocks_of_a_page_run_in_an_empty_folder(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    with small_clips():
        for block in blocks(read(name)):
            if block.runs:
                run_block(block, tmp_path, names)
