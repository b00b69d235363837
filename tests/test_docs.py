"""README and CONTRIBUTING name what is there: packages on their floors, files, make targets. Issue forms are whole."""

import re
from pathlib import Path

import pytest
import typer
import yaml
from test_layers import FLOORS

from slagen import methods
from slagen.cli.app import app

ROOT = Path(__file__).parent.parent
DOCUMENTS = ("README.md", "CONTRIBUTING.md")
PAGES = tuple(sorted(f"docs/{file.name}" for file in (ROOT / "docs").glob("*.md")))


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["docs/architecture.md", "CONTRIBUTING.md"])
def test_the_picture_is_that_of_the_floors(name):
    picture = re.search(r"```(?:text)?\n(errors .*?)```", read(name), re.S)
    rows = [set(re.split(r" {3,}", line)[0].split()) for line in picture[1].splitlines()]
    assert rows == list(FLOORS[:-1])


@pytest.mark.parametrize("name", DOCUMENTS)
def test_lines_are_no_longer_than_those_of_the_code(name):
    assert [line for line in read(name).splitlines() if len(line) > 120] == []


def test_the_page_of_methods_has_every_method_and_option_and_no_other():
    page, found = read("docs/methods.md"), methods()
    names = set(re.findall(r"^\| (`.*?) \|", page, re.M))
    assert {name for row in names for name in re.findall(r"`(\w+)`", row)} == {
        method["name"] for method in found if method["kind"] == "method"
    }
    options = {f"--{name.replace('_', '-')}" for method in found for name in method["options"]}
    command = typer.main.get_command(app).commands["generate"]
    assert options - {"--negligible", "--feature-map", "--linear-domain"} <= set(re.findall(r"--[a-z][a-z-]*", page))
    known = {spelling for parameter in command.params for spelling in parameter.opts}
    trained = {
        spelling for parameter in typer.main.get_command(app).commands["finetune"].params for spelling in parameter.opts
    }
    named = set(re.findall(r"--[a-z][a-z0-9-]*", page))
    assert named - known <= trained  # of finetune alone


@pytest.mark.parametrize("name", PAGES)
def test_every_file_that_a_page_names_is_there(name):
    named = re.findall(r"`((?:[\w.]+/)+[\w.]+(?:/|\.py|\.json))`", read(name))
    assert [path for path in named if not any((p / path).exists() for p in (ROOT, ROOT / "src/slagen"))] == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_file_and_target_that_is_named_is_there(name):
    named = re.findall(r"`((?:[\w.]+/)*[\w.]+(?:/|\.py|\.json))`", read(name))
    source, tests = ROOT / "src/slagen", ROOT / "tests"
    places = (ROOT, source, source / "attention/sla", source / "cli", tests / "kernels", tests / "support")
    assert [path for path in named if not any((place / path).exists() for place in places)] == []
    targets = set(re.findall(r"(?:^|`)make ([a-z]+)\b", read(name), re.M))
    assert targets and targets <= set(re.findall(r"^([a-z]+):", read("Makefile"), re.M))


def test_the_readme_is_of_one_screen():
    text = read("README.md")
    assert len(text.splitlines()) <= 130 and len(text.split()) <= 1000


@pytest.mark.parametrize("file", sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")), ids=lambda file: file.stem)
def test_issue_forms_ask_for_the_doctor(file):
    form = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert form["name"] and form["description"]
    ids = [field["id"] for field in form["body"]]
    assert len(set(ids)) == len(ids) and all(field["attributes"]["label"] for field in form["body"])
    assert any("slagen doctor --json" in field["attributes"]["label"] for field in form["body"])
