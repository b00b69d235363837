"""A CPU's memory: what a run takes, what is left, and one message where that is too little."""

import subprocess
from types import SimpleNamespace

import pytest
import torch

from slagen import events
from slagen.cli.main import run
from slagen.errors import SlagenError
from slagen.generation import estimate as planning
from slagen.generation import memory
from slagen.generation.config import GenerateConfig
from slagen.generation.resolve import make_plan
from slagen.wan.folder import bundled_folder, describe_folder

MEASURED = {  # GiB from the loaded bundled model to the peak, fp32, one thread, AMD EPYC, 2026-11-25: SLA and dense
    (128, 128, 17): (0.166, 0.169), (256, 256, 17): (0.359, 0.471), (512, 512, 17): (0.727, 0.711),
    (512, 512, 5): (0.609,), (512, 512, 33): (0.896,), (1024, 1024, 5): (2.078, 2.084), (1024, 1024, 17): (2.515,),
    (1280, 720, 9): (2.079,),
}  # fmt: skip


@pytest.mark.parametrize("size", MEASURED, ids=str)
def test_what_a_run_takes_is_as_measured(size):
    """What surely is needed is less than any run took, so that nothing is refused that would have run."""
    needed = memory.need(describe_folder(bundled_folder(), "tiny-wan"), *size, 4)
    likely, surely = (needed.likely - needed.weights) / 2**30, (needed.surely - needed.fresh) / 2**30
    for taken in MEASURED[size]:
        assert surely < taken
        assert abs(likely - taken) < max(0.07 * taken, 0.22)


def small(monkeypatch, gib):
    monkeypatch.setattr(memory, "memory_left", lambda: (int(gib * 2**30), "this machine's memory"))


def test_what_surely_does_not_fit_is_refused_before_anything_is_loaded(monkeypatch, tmp_path, capsys):
    """It died after 74 s with DefaultCPUAllocator and "a bug in slagen"."""
    monkeypatch.setattr("slagen.generation.sharing.Session", lambda *a, **k: pytest.fail("a model is loaded"))
    small(monkeypatch, 1.9)
    command = ["generate", "a red circle", "--model", "tiny-wan", "--device", "cpu", "--size", "1024x1024"]
    assert run([*command, "--attention", "dense", "--output", str(tmp_path / "o")]) == 1
    told = " ".join(capsys.readouterr().err.split())
    assert "needs about 2.4 GiB of memory on a CPU" in told and "only 1.9 GiB of" in told and "--size" in told
    assert "a bug in slagen" not in told and not (tmp_path / "o").exists()


def test_what_may_not_fit_is_a_warning_and_what_fits_is_none(monkeypatch):
    from slagen.generation.generate import check_memory

    plan = make_plan(GenerateConfig("a red circle", model="tiny-wan", device="cpu", width=1024, height=1024))
    small(monkeypatch, 2.3)
    assert "If it runs out of memory, try " in check_memory(plan)
    small(monkeypatch, 2.7)
    assert check_memory(plan) is None


def test_of_a_batch_only_what_does_not_fit_fails(monkeypatch):
    from slagen.batch.forecast import check_batch_memory

    def task(size):
        config = GenerateConfig("a red circle", model="tiny-wan", device="cpu", width=size, height=size)
        return SimpleNamespace(plan=make_plan(config))

    small(monkeypatch, 1.0)
    check_batch_memory([task(1024), task(128)])
    check_batch_memory([])
    with pytest.raises(SlagenError, match="1024x1024"):
        check_batch_memory([task(1024), task(768)])


def test_a_dry_run_on_a_cpu_speaks_of_ram(capsys):
    """4096x4096 on a CPU were "24.0 GiB on the GPU"."""
    assert run(["generate", "x", "--model", "tiny-wan", "--device", "cpu", "--size", "4096x4096", "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "GiB of RAM on a CPU" in told and "GPU" not in told
    content = planning.plan(GenerateConfig("x", model="wan2.1-t2v-1.3b"))
    assert 26.9 < content.memory_gib.cpu.weights < 27  # 7.2e9 parameters of float32


ERRORS = {
    "torch": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried"
    ),
    "torch-windows": RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes."),
    "python": MemoryError(),
    "numpy": MemoryError("Unable to allocate 64.0 GiB for an array with shape (8,) and data type float64"),
    "c++": RuntimeError("std::bad_alloc"),
    "system": OSError(12, "Cannot allocate memory"),
}


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.parametrize(("stage", "words"), [("decode", "while decoding"), ("denoise", "while denoising")])
def test_memory_that_runs_out_is_one_message_that_names_the_stage(monkeypatch, capsys, name, stage, words):
    from slagen.generation import generate as task

    def fail(config, on_event):
        on_event(events.Event("stage", stage))
        raise ERRORS[name].with_traceback(None)

    monkeypatch.setattr(task, "generate", fail)
    monkeypatch.setattr(ERRORS[name], "__notes__", [], raising=False)
    assert run(["generate", "a red circle"]) == 1
    told = " ".join(capsys.readouterr().err.split())
    assert f"out of memory {words}. Try a smaller --size" in told and "a bug in slagen" not in told


def test_real_words_of_pytorch_are_understood():
    from slagen.errors import no_memory

    with pytest.raises(RuntimeError) as told:
        torch.empty(2**50, dtype=torch.uint8)
    assert no_memory(told.value)
    assert not no_memory(RuntimeError("shapes cannot be multiplied"))


@pytest.mark.parametrize(
    ("lines", "files", "left"),
    [
        ("0::/a/b\n", {"a/b/memory.max": "max", "a/memory.max": "1000", "a/memory.current": "700",
                       "a/memory.stat": "anon 600\ninactive_file 50\n"}, [350]),
        ("4:memory:/job\n0::/\n", {"memory/job/memory.limit_in_bytes": "500", "memory/job/memory.usage_in_bytes": "450",
                                   "memory/job/memory.stat": "total_inactive_file 10\n"}, [60]),
        ("4:memory:/host/path\n", {"memory/memory.limit_in_bytes": "500", "memory/memory.usage_in_bytes": "100",
                                   "memory/memory.stat": "cache 9\n"}, [400]),
        ("0::/\n", {"memory.max": "max", "memory.current": "1", "memory.stat": ""}, []),
        ("4:memory:/\n", {"memory/memory.limit_in_bytes": str(2**63 - 4096), "memory/memory.usage_in_bytes": "1",
                          "memory/memory.stat": ""}, []),
        ("nonsense\n", {}, []),
    ],
    ids=["v2-parent", "v1", "v1-in-a-container", "v2-no-limit", "v1-no-limit", "nonsense"],
)  # fmt: skip
def test_limits_of_control_groups(tmp_path, lines, files, left):
    (tmp_path / "cgroup").write_text(lines)
    for name, text in files.items():
        path = tmp_path / "fs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        for missing in ("memory.current", "memory.stat"):
            if name.endswith("memory.max") and not (path.parent / missing).exists():
                (path.parent / missing).write_text("0" if missing == "memory.current" else "")
        path.write_text(text)
    found = [bytes_left for bytes_left, _ in memory._group_limits(tmp_path / "cgroup", tmp_path / "fs")]
    assert found == left


def test_limits_of_the_shell():
    """In a process of its own, which needs no torch."""
    import sys

    code = "from slagen.generation import memory; left, limit = memory.memory_left(); print(left < 2**30, limit)"
    for option in ("v", "d"):
        line = f"ulimit -{option} 1048576; exec {sys.executable} -c '{code}'"
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=1800)
        assert done.stdout.split("\n")[0] == f"True the ulimit -{option} limit", done.stderr
