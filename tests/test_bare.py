"""A bare machine: a checkout, torch, and little else. What is missing is named, and what needs nothing of it runs."""

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from slagen import packages
from slagen.cli import plain
from slagen.cli.main import run
from slagen.cli.table import Cell, Table

SOURCE = Path(__file__).parent.parent / "src"
MISSING = (
    "diffusers", "transformers", "accelerate", "psutil", "rich", "matplotlib", "imageio", "imageio_ffmpeg", "PIL",
    "pillow", "huggingface_hub", "safetensors", "ftfy", "sentencepiece",
)  # fmt: skip
HIDING = """
import os, re, sys
from importlib.metadata import Distribution

MISSING = set(filter(None, os.environ["MISSING"].split(",")))
OLD = dict(pair.split("=") for pair in os.environ["OLD"].split(",") if pair)


class Old(Distribution):
    def __init__(self, name):
        self.text = f"Metadata-Version: 2.1\\nName: {name}\\nVersion: {OLD[name]}\\n"

    def read_text(self, filename):
        return self.text if filename == "METADATA" else None

    def locate_file(self, path):
        return path


class Hiding:
    '''A finder that does not find what is in MISSING, and finds what is in OLD at that version.'''

    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in MISSING else self.finder.find_spec(name, path, target)

    def find_distributions(self, context):
        name = re.sub(r"[-_.]+", "_", context.name or "")
        if name in OLD:
            return [Old(name)]
        hidden = name in MISSING or not hasattr(self.finder, "find_distributions")
        return [] if hidden else self.finder.find_distributions(context)


sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path]
"""


@pytest.fixture
def bare(tmp_path):
    """Runs `python -m slagen` where packages are missing, or too old."""
    (tmp_path / "sitecustomize.py").write_text(HIDING)
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    kept |= {"PYTHONPATH": f"{tmp_path}{os.pathsep}{SOURCE}", "OMP_NUM_THREADS": "1"}

    def start(*arguments, missing=MISSING, old=""):
        environment = {**kept, "MISSING": ",".join(missing), "OLD": old}
        command = [sys.executable, "-m", "slagen", *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=1800)

    return start


@pytest.mark.slow
def test_kernel_bench_runs(bare, tmp_path):
    options = ("--method", "sla", "--method", "sdpa", "--sparsity", "0.5", "--no-length-sweep", "--seconds", "0.01")
    done = bare("bench", "--device", "cpu", "--shape", "1x1x64x16", "--backward", *options)
    assert done.returncode == 0, done.stderr
    assert "note: no plot was drawn: matplotlib is not installed, but slagen needs matplotlib>=" in done.stderr
    lines = done.stdout.splitlines()
    own = lines[lines.index("1x1x64x16") + 1 :]
    header, row = own[0], next(line for line in own if line.startswith("sla "))
    assert row.index("torch") == header.index("backend")
    rows = json.loads((tmp_path / "outputs/bench/bench.json").read_text())["rows"]
    assert all(row["forward_ms"] and row["backward_ms"] for row in rows)
    assert (tmp_path / "outputs/bench/bench.md").is_file()


@pytest.mark.slow
def test_doctor_names_what_is_missing_or_old(bare):
    missing = tuple(name for name in MISSING if name != "transformers")
    done = bare("doctor", "--json", missing=missing, old="transformers=4.40.0")
    assert done.returncode == 0, done.stderr
    found = {finding["name"]: finding for finding in json.loads(done.stdout)["findings"]}
    assert found["torch"]["status"] == "ok"
    for name in ("diffusers", "accelerate", "psutil", "imageio-ffmpeg", "pillow"):
        assert (found[name]["status"], found[name]["found"]) == ("problem", "not installed")
        assert found[name]["fix"] == f"pip install '{name}{packages.requirements()[name]}'"
    for name in ("rich", "matplotlib"):
        assert found[name]["status"] == "note" and "without it" in found[name]["fix"]
    assert found["transformers"]["found"] == "too old (4.40.0)"
    assert found["transformers"]["fix"].startswith("pip install 'transformers>=5")
    for name in ("bundled model", "hub cache"):
        assert found[name]["status"] == "problem" and found[name]["found"].startswith("not checked: ")
        assert found[name]["fix"].startswith("pip install")
    assert "kernels" in found


@pytest.mark.parametrize(("version", "found"), [(None, "not installed"), ("0.30.1", "too old (0.30.1)")])
def test_model_bench_says_what_it_needs(monkeypatch, capsys, tmp_path, version, found):
    look_up = metadata.version

    def versions(name):
        if name != "diffusers":
            return look_up(name)
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "slagen.wan.loading", raising=False)
    monkeypatch.setitem(sys.modules, "diffusers", None)  # importing it raises ModuleNotFoundError
    monkeypatch.setattr(metadata, "version", versions)
    assert run(["bench", "--device", "cpu", "--random-init", "wan-1.3b"]) == 4
    needed = f"diffusers{packages.requirements()['diffusers']}"
    said = f"error: diffusers is {found}, but slagen needs {needed}. Try pip install '{needed}'."
    assert capsys.readouterr().err.splitlines() == [said]


def test_without_typer_there_is_one_line(bare):
    done = bare("bench", missing=("typer",))
    assert done.returncode == 4 and done.stdout == ""
    assert done.stderr.startswith("error: typer is not installed") and done.stderr.count("\n") == 1


def test_help_without_rich(bare):
    done = bare("bench", "--help", missing=("rich",))
    assert done.returncode == 0 and "--no-length-sweep" in done.stdout and done.stderr == ""
    done = bare("bench", "--sparsity", "much", missing=("rich",))
    assert done.returncode == 2 and "--sparsity is 'much', but must be a number" in done.stderr


def test_every_requirement_fits_here():
    """The tests run where all is installed, so nothing may be called missing."""
    names = set(packages.requirements())
    assert {"torch", "diffusers", "huggingface-hub", "pyyaml"} <= names
    assert [name for name in names if not packages.state(name)[1]] == []


@pytest.mark.parametrize(
    ("version", "fits"),
    [("0.39.9", False), ("0.40", True), ("0.40.0.dev0", True), ("1.0", True), ("0.4.1", False), ("0.40.1+cu130", True)],
)
def test_versions_are_compared_by_number(monkeypatch, version, fits):
    monkeypatch.setattr(packages, "requirements", lambda: {"diffusers": ">=0.40"})
    monkeypatch.setattr(metadata, "version", lambda name: version)
    assert packages.state("diffusers") == (version if fits else f"too old ({version})", fits)


def test_requirements_without_a_checkout(monkeypatch, tmp_path):
    """An installed slagen knows them from its metadata, where extras stand among them."""
    lines = ["torch>=2.11", 'triton>=3.6; sys_platform == "linux"', 'av>=15.0; extra == "finetune"']
    monkeypatch.setattr(packages, "__file__", str(tmp_path / "a" / "b" / "packages.py"))
    monkeypatch.setattr(metadata, "requires", lambda name: lines)
    monkeypatch.setattr(packages.sys, "platform", "linux")
    assert packages.requirements.__wrapped__() == {"torch": ">=2.11", "triton": ">=3.6"}
    monkeypatch.setattr(packages.sys, "platform", "darwin")
    assert packages.requirements.__wrapped__() == {"torch": ">=2.11"}


def test_other_failures_are_not_explained_away():
    assert packages.explain(ImportError("cannot import name 'x'", name="slagen.benchmark.run")) is None
    broken = packages.explain(ImportError("cannot import name 'x' from 'PIL'", name="PIL.Image"))
    assert "is installed, but cannot be imported (cannot import name 'x' from 'PIL')" in broken


def test_plain_tables(capsys):
    table = Table("name", "found")
    table.add_row(Cell("problem", "bold red"), Cell("no [dim]\npip install 'x[y]'\x1b"))
    table.add_row("…")
    plain.Console(highlight=False).print(str(table))
    assert capsys.readouterr().out.splitlines() == [
        "name     found",
        "problem  no [dim]",
        "         pip install 'x[y]'\\x1b",
        "…",
    ]
