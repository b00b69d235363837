"""The scripts of examples/ and CITATION.cff."""

import os
import runpy

import pytest
import yaml
from doc_pages import ROOT, Block, run_block, slagen_arguments, small_clips, statements
from test_blocks import parse

import slagen

EXAMPLES = sorted((ROOT / "examples").iterdir())
QUICK = ("one_video.py", "batch.sh", "other_model.py")


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.name)
def test_an_example_says_what_it_is_and_its_commands_exist(file):
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".py":
        compile(text, str(file), "exec")
        assert f"python examples/{file.name}" in text.split('"""')[1]
        return
    lines = text.splitlines()
    assert lines[0] == "#!/usr/bin/env bash" and lines[1].startswith("# ") and "set -euo pipefail" in lines
    assert os.access(file, os.X_OK)
    found = [given for statement in statements(text) if (given := slagen_arguments(statement))]
    assert found
    for given in found:
        parse([word.replace("$steps", "60") for word in given])


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)
def test_an_example_runs(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    file = ROOT / "examples" / name
    with small_clips():
        if file.suffix == ".py":
            runpy.run_path(str(file), run_name="__main__")
        else:
            run_block(Block("bash", file.read_text(encoding="utf-8"), ""), tmp_path, {})
    assert name == "other_model.py" or list(tmp_path.rglob("*.mp4"))


def test_the_citation_is_of_this_version():
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert found["version"] == slagen.__version__ and found["license"] == "Apache-2.0"
    assert "2509.24006" in found["references"][0]["url"]
