"""`slagen doctor --selftest`: every check on a CPU, failures that stop no other, a file without the user's paths."""

import json
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from slagen.benchmark.config import BenchConfig
from slagen.cli.main import run
from slagen.doctor import selftest
from slagen.doctor.checks import Finding
from slagen.errors import EnvironmentProblem, KernelProblem


@pytest.fixture
def small(monkeypatch):
    """One kind of kernel, a bench of a moment, and no look at the machine: the rest is as the command does it."""
    bench = BenchConfig(
        shapes=("1x1x256x16",), lengths=(), seconds=0.01, sparsities=(0.5,), methods=("sla", "sdpa"), device="cpu"
    )
    monkeypatch.setattr(selftest, "BENCH", bench)
    monkeypatch.setattr(selftest, "BENCH_ON_CPU", bench)
    monkeypatch.setattr(selftest, "kernels_here", lambda device: [("torch", "fp32")])
    monkeypatch.setattr(selftest.doctor, "examine", lambda: [Finding("python", "ok", f"in {Path.home()}/python")])


@pytest.mark.slow
def test_everything_a_cpu_can(small, tmp_path, capsys):
    """One command, one file: it holds findings, versions, device, and every check with status, seconds and detail."""
    file = tmp_path / "result.json"
    assert run(["doctor", "--selftest", "--json", "--output", str(file)]) == 0
    content = json.loads(file.read_text())
    assert json.loads(capsys.readouterr().out) == content
    names = [check["name"] for check in content["checks"]]
    assert names[0] == "doctor" and names[-3:] == ["VAE in bf16", "generate", "bench"]
    assert len(names) == 4 + 4
    assert all(check["status"] == "ok" and check["seconds"] >= 0 and check["detail"] for check in content["checks"])
    assert content["machine"]["versions"]["torch"] and content["machine"]["name"]
    assert [row["method"] for row in content["bench"]] == ["sla", "sdpa"]
    assert content["findings"][0]["found"] == "in ~/python"
    assert str(Path.home()) not in file.read_text()


def test_a_failure_stops_no_other(small, tmp_path, capsys, monkeypatch):
    """A wrong kernel and a crash are gates (6); each is told, and what comes after is still tried."""

    def crash(device):
        raise ZeroDivisionError("by nothing")

    monkeypatch.setattr(selftest, "_torch_trial", lambda q, config: "dk is wrong" if q.shape[-1] == 128 else None)
    monkeypatch.setattr(selftest, "_generate", crash)
    monkeypatch.setattr(selftest, "_bench", lambda device, rows: "fast")
    file = tmp_path / "result.json"
    assert run(["doctor", "--selftest", "--output", str(file)]) == 6
    status = {check["name"]: (check["status"], check["detail"]) for check in json.loads(file.read_text())["checks"]}
    assert status["torch fp32, head dimension 128, domain marginal"] == ("failed", "dk is wrong")
    assert status["generate"] == ("failed", "ZeroDivisionError: by nothing")
    assert status["bench"] == ("ok", "fast")
    said = capsys.readouterr()
    assert "3 of 8 checks failed. The first is torch fp32, head dimension 128, domain all" in said.err
    assert str(file) in said.out


def test_kernels_of_other_methods_are_tried(small, monkeypatch):
    """Those of block means and of int8, at both head dimensions; one that is wrong fails, and stops no other."""
    tried = []

    def check(method, backend, head_dim, device, dtype, config):
        tried.append((method, head_dim, dtype, getattr(config, "low_bit", None)))
        if method == "mean" and head_dim == 128:
            raise KernelProblem("the Triton kernels fail on cpu: dq is wrong. Try --backend torch.")

    monkeypatch.setattr(selftest, "kernels_here", lambda device: [("triton", "fp16")])
    monkeypatch.setattr(selftest, "_agrees", lambda *_: "fine")
    monkeypatch.setattr(selftest, "_generate", lambda device: "made")
    monkeypatch.setattr(selftest, "_bench", lambda device, rows: "fast")
    monkeypatch.setattr(
        selftest.registry, "get", lambda method: SimpleNamespace(check=lambda *given: check(method, *given))
    )
    found = {check.name: check.status for check in selftest.selftest().checks if "fp16, head" in check.name}
    assert found.pop("block means, fp16, head dimension 128") == "failed"
    assert set(found.values()) == {"ok"}
    assert {name for name in found if "domain" not in name} == {
        "block means, fp16, head dimension 64", "int8, fp16, head dimension 64", "int8, fp16, head dimension 128"
    }  # fmt: skip
    kinds = (("mean", None), ("sla2", "int8"))
    assert tried == [(name, dim, torch.float16, low_bit) for dim in (64, 128) for name, low_bit in kinds]


def test_what_is_missing_is_the_environment(small, tmp_path, capsys, monkeypatch):
    def lacking(device):
        raise EnvironmentProblem("diffusers is not installed. Try pip install diffusers.")

    monkeypatch.setattr(selftest, "_generate", lacking)
    monkeypatch.setattr(selftest, "_bench", lambda device, rows: "fast")
    assert run(["doctor", "--selftest", "--output", str(tmp_path / "result.json")]) == 4
    assert "1 of 8 checks could not run. The first is generate: diffusers is not installed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--output", "x.json"], "--output names the file that --selftest writes"),
        (["--selftest", "--kernels"], "--kernels and --selftest cannot be combined"),
        (["--selftest", "--output", "missing/x.json"], "must be a file in an existing, writable folder"),
    ],
    ids=["output-alone", "two-things", "no-folder"],
)
def test_refuses_before_the_work(arguments, complaint, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(selftest, "selftest", lambda on_note: pytest.fail("the work began"))
    assert run(["doctor", *arguments]) == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize(
    ("chosen", "dtype", "interpreter", "expected"),
    [
        pytest.param("triton", "bfloat16", True, "triton fp16, triton bf16, triton fp32", id="card"),
        pytest.param("triton", "float16", True, "triton fp16, triton fp32", id="card-without-bf16"),
        pytest.param("torch", "float32", False, "torch fp16, torch bf16, torch fp32", id="cpu"),
        pytest.param(
            "torch", "float32", True, "torch fp16, torch bf16, torch fp32, triton fp16, triton fp32", id="interpreter"
        ),
    ],
)
def test_kernels_that_run_here(chosen, dtype, interpreter, expected, monkeypatch):
    monkeypatch.setattr(selftest, "choose_backend", lambda q: chosen)
    monkeypatch.setattr(selftest.machine, "pick_dtype", lambda name, device: getattr(torch, dtype))
    monkeypatch.setattr(selftest.fused, "unsupported", lambda q: None if interpreter else "no interpreter")
    found = selftest.kernels_here(torch.device("cpu"))
    assert ", ".join(f"{backend} {dtype}" for backend, dtype in found) == expected


def test_wrong_gradients_are_seen(monkeypatch):
    """The torch backend's check compares with the reference itself: a backend that is off by a thousandth fails."""
    q = torch.empty(1, 1, 1, 16)
    config = selftest.SLAConfig(block_m=16, block_n=16)
    assert selftest._torch_trial(q, config) is None
    attend = selftest.sparse_linear_attention
    monkeypatch.setattr(
        selftest, "sparse_linear_attention",
        lambda *given, backend: attend(*given, backend=backend) * (1.001 if backend == "torch" else 1),
    )  # fmt: skip
    assert selftest._torch_trial(q, config) == "o is wrong"


def test_paths_of_the_user_are_shortened(monkeypatch):
    home = Path.home()
    content = {"a": [f"{home}/models/wan", f"{tempfile.gettempdir()}/x"], "b": {"c": 3, "d": None}}
    assert selftest.shortened(content) == {"a": ["~/models/wan", "(temporary)/x"], "b": {"c": 3, "d": None}}
