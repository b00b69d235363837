"""Cheap errors are instant: what is told without torch is told before torch, diffusers and numpy are imported."""

import json
import subprocess
import sys

import pytest

from slagen.cli import progress

FAULTS = {  # by command line: the exit code, and a part of the message
    "info nope.mp4": (2, "nope.mp4 does not exist. Give a weight file, a model folder, a video or its .json report."),
    "info broken.safetensors": (5, "broken.safetensors is corrupt or incomplete"),
    "batch nope.txt": (2, "nope.txt cannot be read"),
    "batch faulty.txt": (2, "faulty.txt:2"),
    "batch good.txt --model nope": (2, "is not a preset, a folder or a Hugging Face id"),
    "batch good.txt -o there.mp4": (2, "a batch writes many"),
    "generate --prompts faulty.txt": (2, "faulty.txt:2"),
    "generate x --steps 0": (2, "steps is 0"),
    "generate x --steps 4 --sparsity-schedule 0-4:0.8": (2, "is '0-4:0.8', but there are 4 steps: 0 to 3"),
    "generate x --steps 4 --dense-steps 4": (2, "dense_steps is '4', but there are 4 steps: 0 to 3"),
    "generate x --steps 4 --sparsity-schedule 0-2:0.8,-2-:0.9": (2, "but gives step 2 two sparsities"),
    "generate x --sparsity-schedule 0-4": (2, "must be pairs STEPS:SPARSITY"),
    "generate x --sparsity-schedule 0-4:1": (2, "a sparsity must be at least 0 and below 1, not 1."),
    "generate x --attention sol --sparsity-schedule 0-4:0.5": (2, "is not an option of sol attention"),
    "batch good.txt --steps 4 --sparsity-schedule 9:0.8": (2, "good.txt:1: sparsity_schedule is '9:0.8', but there"),
    "generate x --device banana": (2, "device is 'banana'"),
    "generate x --model nope": (2, "is not a preset, a folder or a Hugging Face id"),
    "generate x --model empty": (5, "no model_index.json"),
    "generate x --model nope --dry-run": (2, "is not a preset, a folder or a Hugging Face id"),
    "generate x --weights nope": (2, "nope does not exist"),
    "generate x --weights broken.safetensors": (5, "broken.safetensors is corrupt or incomplete"),
    "generate x --vae nope": (2, "nope does not exist"),
    "generate x -o there.mp4": (2, "there.mp4 exists"),
    "generate x -o new.mp4 --num-videos 2": (2, "is a single file, but --num-videos is 2"),
    "generate x --save-latents -o kept.mp4": (2, "kept.latents.safetensors exists"),
    "plan --weights nope": (2, "nope does not exist"),
    "finetune --data nope": (2, "nope does not exist"),
    "finetune --self-generate faulty.txt": (2, "faulty.txt:2"),
    "finetune --data empty --model nope": (2, "is not a preset, a folder or a Hugging Face id"),
    "finetune --data empty --weights nope": (2, "nope does not exist"),
    "finetune data nope -o out": (2, "nope does not exist"),
    "finetune data empty -o out --model nope": (2, "is not a preset, a folder or a Hugging Face id"),
    "replay nope.mp4": (2, "nope.mp4 does not exist"),
    "replay good.txt": (2, "neither a video that slagen generated nor its report"),
    "replay nope.mp4 -o a.mov": (2, "output is 'a.mov'"),
    "decode nope.safetensors": (2, "nope.safetensors does not exist"),
    "decode kept.latents.safetensors": (5, "corrupt or incomplete"),
    "decode nope.safetensors -o a.mov": (2, "output is 'a.mov'"),
    "convert nope.pth out": (2, "nope.pth does not exist"),
    "convert good.txt out.pth": (2, "must be a folder"),
    "merge nope.pth out.safetensors --diff-base a --diff-target b": (2, "nope.pth does not exist"),
    "bench --shape 1x2x3": (2, "shape is '1x2x3'"),
    "bench --shape 1x12x8192x128 --length 0": (2, "length is 0, but must be at least 1."),
    "doctor --kernels --selftest": (2, "cannot be combined"),
}
HEAVY = {"torch", "diffusers", "transformers", "numpy"}
RUN_ALL = f"""
import contextlib, io, json, sys
from importlib.abc import MetaPathFinder

from slagen.cli.main import run

class Reached(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name in {sorted(HEAVY)}:
            raise KeyboardInterrupt(name)

sys.meta_path.insert(0, Reached())
for line in json.loads(sys.argv[1]):
    with contextlib.redirect_stderr(io.StringIO()) as told:
        code = run(line.split())
    print(json.dumps([line, code, told.getvalue()]))
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What each command line ended with, in a process where an import of torch and the like ends the command."""
    folder = tmp_path_factory.mktemp("early")
    (folder / "empty").mkdir()
    for name in ("broken.safetensors", "kept.latents.safetensors"):
        (folder / name).write_bytes(b"x" * 99)
    (folder / "there.mp4").touch()
    (folder / "faulty.txt").write_text("a red circle\na blue square --steps many\n")
    (folder / "good.txt").write_text("a red circle\n")
    lines = [*FAULTS, "generate x -o new", "info good.txt"]
    command = [sys.executable, "-c", RUN_ALL, json.dumps(lines)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    return {line: (code, text) for line, code, text in map(json.loads, done.stdout.splitlines())}


@pytest.mark.slow
@pytest.mark.parametrize("line", FAULTS)
def test_a_cheap_error_imports_nothing_heavy(line, told):
    """It took 6 to 18 s to say that a file does not exist."""
    code, text = told[line]
    expected, words = FAULTS[line]
    assert code == expected, text
    assert words in " ".join(text.split()) and "Loading" not in text


@pytest.mark.slow
@pytest.mark.parametrize("line", ["generate x -o new", "info good.txt"])
def test_before_torch_is_imported_that_is_said(line, told):
    code, text = told[line]
    assert code == 130 and text.startswith("Loading PyTorch and diffusers...\n")


def test_what_is_loaded_already_is_not_said_to_be_loading(capsys, monkeypatch):
    with progress.GenerateProgress():
        pass
    assert capsys.readouterr().err == ""
    monkeypatch.delitem(sys.modules, "torch")
    with progress.GenerateProgress():
        pass
    assert capsys.readouterr().err == "Loading PyTorch and diffusers...\n"
