"""README and CONTRIBUTING name what is there: packages on their floors, files, make targets. Issue forms are whole."""

import re
from pathlib import Path

import pytest
import yaml
from test_layers import FLOORS

ROOT = Path(__file__).parent.parent
DOCUMENTS = ("README.md", "CONTRIBUTING.md")


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", DOCUMENTS)
def test_the_picture_is_that_of_the_floors(name):
    picture = re.search(r"```\n(errors .*?)```", read(name), re.S)
    rows = [set(re.split(r" {3,}", line)[0].split()) for line in picture[1].splitlines()]
    assert rows == list(FLOORS[:-1])


@pytest.mark.parametrize("name", DOCUMENTS)
def test_lines_are_no_longer_than_those_of_the_code(name):
    assert [line for line in read(name).splitlines() if len(line) > 120] == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_file_and_target_that_is_named_is_there(name):
    named = re.findall(r"`((?:[\w.]+/)*[\w.]+(?:/|\.py|\.json))`", read(name))
    source, tests = ROOT / "src/slagen", ROOT / "tests"
    places = (ROOT, source, source / "attention/sla", source / "cli", tests / "kernels", tests / "support")
    assert [path for path in named if not any((place / path).exists() for place in places)] == []
    targets = set(re.findall(r"(?:^|`)make ([a-z]+)\b", read(name), re.M))
    assert targets and targets <= set(re.findall(r"^([a-z]+):", read("Makefile"), re.M))


@pytest.mark.parametrize("file", sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")), ids=lambda file: file.stem)
def test_issue_forms_ask_for_the_doctor(file):
    form = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert form["name"] and form["description"]
    ids = [field["id"] for field in form["body"]]
    assert len(set(ids)) == len(ids) and all(field["attributes"]["label"] for field in form["body"])
    assert any("slagen doctor --json" in field["attributes"]["label"] for field in form["body"])
