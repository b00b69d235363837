"""Several processes: gradients, checkpoints and the command give what one process gives."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from finetune_runs import run_without_pictures, settings, weights
from processes import run_together
from safetensors.torch import load_file
from train_together import train

from slagen.training.finetune import finetune

pytest_plugins = ["finetune_fixtures"]
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("plain_pictures")]


@pytest.fixture(scope="module")
def together(toy, tmp_path_factory):
    """What one process, two copies and two halves made of the same step."""
    model, data = toy
    folder = tmp_path_factory.mktemp("together")
    found = {}
    for kind in ("alone", "ddp", "fsdp", "context"):
        (folder / kind).mkdir()
        how = {"alone": ["auto", "1"], "context": ["fsdp", "2"]}.get(kind, [kind, "1"])
        size = 1 if kind == "alone" else 2
        said = run_together(train, [str(model), str(data), str(folder / kind), *how], folder / kind, size)
        assert said[0].splitlines()[-1].split()[:2] == [how[0].replace("auto", "alone"), str(size)]
        found[kind] = load_file(folder / kind / "kept.safetensors")
    return found


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "context"])
def test_two_processes_give_the_gradients_of_one(together, kind):
    one, two = together["alone"], together[kind]
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        if name.startswith("grad/"):
            assert (tensor - two[name]).norm() <= 1e-6 * max(1.0, tensor.norm().item()), name


@pytest.mark.parametrize("kind", ["alone", "ddp", "fsdp", "context"])
def test_checkpoints_go_on_in_every_team(together, kind):
    tensors = together[kind]
    for name, tensor in tensors.items():
        if name.startswith("weight/"):
            assert torch.equal(tensor, tensors[name.replace("weight/", "resumed/")]), name


def test_the_command_under_torchrun(toy, tmp_path):
    """One answer of two processes, and the error of one; the same in bf16, to its precision."""
    model, data = toy
    alone = finetune(settings(model, tmp_path / "alone", data=data, steps=2))
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src"), "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "slagen"]
    command = ["finetune", "--parallel", "fsdp", "--model", str(model), "--data", str(data), "--from-dense", "--json",
               "--sparsity", "0.6", "--block-m", "16", "--block-n", "16", "--steps", "2", "--validate-every", "1000",
               "--device", "cpu"]  # fmt: skip
    done = subprocess.run([*torchrun, *command, "--output", str(tmp_path / "two")], env=env, capture_output=True,
                          text=True, timeout=1800)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["teacher_error_after"] == pytest.approx(alone.teacher_error_after, rel=1e-4)
    one, two = weights(tmp_path / "alone"), weights(tmp_path / "two")
    assert all(torch.allclose(one[name].float(), two[name].float(), atol=1e-3) for name in one)
    half = run_together(
        run_without_pictures, [[*command, "--dtype", "bf16", "--output", str(tmp_path / "half")]], tmp_path
    )
    first, second = (text.strip() for text in half)
    assert json.loads(first)["teacher_error_after"] == pytest.approx(alone.teacher_error_after, rel=0.05)
    assert second == ""
