"""scripts/gpu.py without a GPU: what it runs in which order, what a sweep tries, times and records."""

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fake_cuda import fake_card

pytest.importorskip("triton", reason="needs Triton, which is for Linux")

from slagen.attention.sla import fused  # noqa: E402
from slagen.kernels import resources  # noqa: E402
from slagen.kernels.resources import Choices, Tiles  # noqa: E402

if torch.cuda.is_available():
    pytest.skip("needs a machine without CUDA, where a fake takes its place", allow_module_level=True)

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "gpu.py"


@pytest.fixture
def card(monkeypatch):
    with resources.using(Choices()):
        yield fake_card(monkeypatch)


@pytest.fixture
def gpu(monkeypatch):
    spec = importlib.util.spec_from_file_location("gpu", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "SHAPE", (1, 1, 70))
    return module


class Stage:
    """Stands in for the kernels: notes which tiles were tried and timed, and says what is wrong with some."""

    def __init__(self, gpu, monkeypatch, kernel, wrong=(), lost=()):
        self.kernel, self.wrong, self.lost, self.tried, self.timed = kernel, wrong, lost, [], []
        monkeypatch.setattr(fused, "_attempt", self.attempt)
        monkeypatch.setattr(gpu, "time_call", self.time_call)

    def running(self, q, block_m):
        tile = resources.tiles(self.kernel, q, block_m, 64)
        return tile.m, tile.n, tile.warps, tile.stages

    def attempt(self, q, config):
        self.tried.append(self.running(q, config.block_m))
        if self.tried[-1] in self.lost:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
        return ("dq is wrong" if self.tried[-1] in self.wrong else None), None

    def time_call(self, attend, drawn, config, proj, backward):
        self.timed.append((self.running(drawn[0], config.block_m), backward))
        return float(sum(self.timed[-1][0]))


def test_sweep_records_the_tile_that_ran(card, gpu, monkeypatch, tmp_path):
    """A tile larger than a block is cut down to it and tried once; the fastest has its name; the choices stay."""
    stage = Stage(gpu, monkeypatch, "attend")
    tiles = [(128, 64, 8, 2), (64, 64, 8, 2), (64, 64, 4, 3)]
    before = resources.current().tiles("attend", torch.zeros(1, 1, 1, 16), 64, 64)
    gpu.sweep(tmp_path / "sweep.json", 16, 64, {"attend": tiles})
    content = json.loads((tmp_path / "sweep.json").read_text())
    assert [row["tile"] for row in content["rows"]] == [[64, 64, 8, 2], [64, 64, 4, 3]]
    assert stage.timed == [((64, 64, 8, 2), False), ((64, 64, 4, 3), False)] and stage.tried[1:] == [
        (64, 64, 8, 2), (64, 64, 4, 3)
    ]  # fmt: skip
    assert content["fastest"]["attend"] == {
        "kernel": "attend", "head_dim": 16, "block_m": 64, "tile": [64, 64, 4, 3], "ms": 135.0, "reason": None
    }  # fmt: skip
    assert content["machine"]["name"] == "Fake H100" and content["date"]
    assert resources.current().tiles("attend", torch.zeros(1, 1, 1, 16), 64, 64) == before
    assert [path.name for path in tmp_path.iterdir()] == ["sweep.json"]


def test_a_wrong_tile_is_not_timed(card, gpu, monkeypatch, tmp_path):
    stage = Stage(gpu, monkeypatch, "dq", wrong=[(64, 64, 4, 7)])
    gpu.sweep(tmp_path / "sweep.json", 16, 64, {"dq": [(64, 64, 4, 7), (32, 32, 4, 1)], "dkv": []})
    content = json.loads((tmp_path / "sweep.json").read_text())
    assert [(row["ms"], row["reason"]) for row in content["rows"]] == [(None, "dq is wrong"), (69.0, None)]
    assert stage.timed == [((32, 32, 4, 1), True)]
    assert content["fastest"]["dq"]["tile"] == [32, 32, 4, 1] and content["fastest"]["dkv"] is None


def test_a_sweep_goes_on_after_the_tile_that_lost_the_device(card, gpu, monkeypatch, tmp_path):
    """After an illegal access every call fails, whichever tile it has: a process of its own goes on."""
    tiles = {"attend": [(64, 64, 4, 6), (64, 64, 4, 7), (64, 64, 4, 8)]}
    Stage(gpu, monkeypatch, "attend", lost=[(64, 64, 4, 7)])  # a good tile waits for the device twice
    lost = iter([None, None, RuntimeError("CUDA error: an illegal memory access was encountered")])

    def synchronize():
        if (error := next(lost, None)) is not None:
            raise error

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        gpu.sweep(tmp_path / "sweep.json", 16, 64, tiles)
    assert not (tmp_path / "sweep.json").exists()
    stage = Stage(gpu, monkeypatch, "attend")
    gpu.sweep(tmp_path / "sweep.json", 16, 64, tiles)
    rows = json.loads((tmp_path / "sweep.json").read_text())["rows"]
    assert [row["ms"] is None for row in rows] == [False, True, False] and "illegal memory" in rows[1]["reason"]
    assert [tile for tile, _ in stage.timed] == [(64, 64, 4, 8)]


def test_a_sweep_out_of_time_goes_on(card, gpu, monkeypatch, tmp_path):
    clock = iter([0.0, 0.0, 1e4, 0.0, 0.0])
    monkeypatch.setattr(gpu, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    tiles = {"attend": [(64, 64, 4, 2), (64, 64, 4, 3)]}
    stage = Stage(gpu, monkeypatch, "attend")
    with pytest.raises(SystemExit, match=r"tiles timed: 1\). Run again"):
        gpu.sweep(tmp_path / "sweep.json", 16, 64, tiles)
    gpu.sweep(tmp_path / "sweep.json", 16, 64, tiles)
    assert [tile for tile, _ in stage.timed] == [(64, 64, 4, 2), (64, 64, 4, 3)]


def test_time_of_a_call(card, gpu):
    """The median of 15 calls after 3, between events; forward under inference mode, or with the backward."""
    seen = []

    def attend(q, k, v, config, *proj, backend):
        seen.append((torch.is_inference_mode_enabled(), q.requires_grad))
        card.clock_ms += 1000.0 if len(seen) <= 3 else len(seen)
        return q + k + v

    drawn = [torch.randn(1, 1, 8, 16, device="cuda") for _ in range(4)]
    assert gpu.time_call(attend, drawn, None, (None, None), False) == 11 + card.step_ms
    assert seen == [(True, False)] * 18
    seen.clear()
    gpu.time_call(attend, drawn, None, (None, None), True)
    assert seen == [(False, True)] * 18


def test_sweeps_and_smoke_are_parts(gpu):
    names = list(gpu.PARTS)
    assert names[:2] == ["smoke", "tests"] and "selftest" in names
    assert [name for name in names if name.startswith("sweep")] == [
        "sweep-d128-m64",
        "sweep-d128-m128",
        "sweep-d64-m64",
    ]
    assert set(gpu.SWEEP) == set(resources.TABLE)
    for kernel, tiles in gpu.SWEEP.items():
        assert len({Tiles(*tile) for tile in tiles}) == len(tiles), kernel


def test_smoke_makes_a_video_with_triton(card, gpu, monkeypatch, tmp_path):
    commands = []

    def run(command, check, timeout):
        commands.append(command)
        report = {"attention": {"backend": "triton"}, "stages_s": {}, "steps": {}, "latents_hash": "f", "settings": {}}
        (tmp_path / "build" / "smoke.json").write_text(json.dumps(report))

    (tmp_path / "build").mkdir()
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "subprocess", SimpleNamespace(run=run))
    gpu.smoke(tmp_path)
    (command,) = commands
    assert command[3:5] == ["generate", "a red circle moving right"] and "triton" in command and "tiny-wan" in command
    content = json.loads((tmp_path / "smoke.json").read_text())
    assert content["attention"]["backend"] == "triton" and "settings" not in content


def test_parts_without_a_result_run_in_order(card, gpu, monkeypatch, tmp_path):
    """One that fails does not stop the others; its name is in the end's message."""
    started, ended = [], []

    def start(command, **options):
        name = command[2].split("'")[1]
        started.append(name)
        return SimpleNamespace(pid=name, wait=lambda limit: 3 if name == "tests" else 0)

    monkeypatch.setattr(gpu, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu, "subprocess", SimpleNamespace(Popen=start, TimeoutExpired=TimeoutError))
    monkeypatch.setattr(gpu.os, "killpg", lambda pid, signal: ended.append(pid))
    monkeypatch.setattr(gpu.sys, "argv", ["gpu.py"])
    (tmp_path / "fake-h100").mkdir()
    (tmp_path / "fake-h100" / "sweep-d128-m64.json").write_text("{}")
    with pytest.raises(SystemExit, match=r"failed: tests\. The other parts have results"):
        gpu.main()
    expected = [name for name in gpu.PARTS if name not in (*gpu.ON_REQUEST, "sweep-d128-m64")]
    assert started == ended == expected and started[0] == "smoke"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="needs a CUDA device, but PyTorch sees none"):
        gpu.main()
