"""slagen bench: what it measures, what it refuses, and what it writes."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from slagen import bench as task
from slagen.bench import Method, bench
from slagen.cli import run
from slagen.config import BenchConfig, parse_shape
from slagen.errors import EnvironmentProblem, UsageError

QUICK = {"shapes": ("1x2x256x32",), "sparsities": (0.5,), "lengths": (), "seconds": 0.01, "device": "cpu"}
FIELDS = {
    "method", "kind", "backend", "shape", "dtype", "sparsity", "correct", "error", "forward_ms", "backward_ms",
    "parts_ms", "tflops_dense_equivalent", "speedup",
}  # fmt: skip


@pytest.fixture(autouse=True)
def small_ceilings(monkeypatch):
    """The ceilings take a second of matrix products each time; here they are not the point."""
    monkeypatch.setattr(task, "_ceilings", lambda device, dtype: {"matmul_tflops": 1.0, "copy_gb_s": 1.0})


def test_rows_and_files(tmp_path):
    config = BenchConfig(**QUICK, methods=("sla", "sparse", "sdpa"), backward=True, output=str(tmp_path / "results"))
    result = bench(config)
    rows = {row["method"]: row for row in result.content["rows"]}
    assert list(rows) == ["sla", "sparse", "sdpa"]
    for row in rows.values():
        assert row.keys() >= FIELDS
        assert row["correct"] is True and row["error"] < 1e-5
        assert row["forward_ms"]["q1"] <= row["forward_ms"]["median"] <= row["forward_ms"]["q3"]
        assert row["backward_ms"]["repeats"] >= 3
        flops = 4 * 2 * 256**2 * 32
        assert row["tflops_dense_equivalent"] == pytest.approx(flops / row["forward_ms"]["median"] / 1e9)
    assert [rows[name]["kind"] for name in rows] == ["sla", "sparse", "dense"]
    assert (rows["sla"]["backend"], rows["sla"]["sparsity"], rows["sdpa"]["sparsity"]) == ("torch", 0.5, None)
    ratio = rows["sdpa"]["forward_ms"]["median"] / rows["sla"]["forward_ms"]["median"]
    assert rows["sla"]["speedup"] == pytest.approx(ratio) and rows["sdpa"]["speedup"] == 1
    parts = rows["sla"]["parts_ms"]
    assert list(parts) == ["block_map", "state", "projection", "fused"]
    assert sum(parts.values()) == pytest.approx(rows["sla"]["forward_ms"]["median"])
    assert {path.name for path in result.files} == {"bench.json", "bench.md", "bench.png", "bench.svg"}
    assert json.loads((tmp_path / "results" / "bench.json").read_text()) == result.content
    table = (tmp_path / "results" / "bench.md").read_text()
    assert "| sla | torch | 0.5 |" in table and ("(slower)" in table) == (ratio < 1)
    assert (tmp_path / "results" / "bench.png").read_bytes()[:4] == b"\x89PNG"


def test_lengths_are_swept_at_one_sparsity():
    config = BenchConfig(**{**QUICK, "lengths": (128, 512), "sparsities": (0.9, 0.5)}, methods=("sla", "sdpa"))
    rows = bench(config).content["rows"]
    assert [(r["method"], r["shape"].split("x")[2], r["sparsity"]) for r in rows] == [
        ("sla", "256", 0.9), ("sdpa", "256", None), ("sla", "256", 0.5),
        ("sla", "128", 0.9), ("sdpa", "128", None), ("sla", "512", 0.9), ("sdpa", "512", None),
    ]  # fmt: skip


def test_a_wrong_method_is_reported_and_not_timed(monkeypatch):
    broken = Method("sdpa", "dense", lambda setting: lambda q, k, v: F.scaled_dot_product_attention(q, k, v) * 1.01)
    monkeypatch.setattr(task, "METHODS", (broken,))
    row = bench(BenchConfig(**QUICK)).content["rows"][0]
    assert row["correct"] is False and row["forward_ms"] is None and row["reason"].startswith("wrong: ")


def test_what_other_libraries_cannot_do_is_said(monkeypatch):
    def fail(setting):
        raise RuntimeError("no kernel image\nfor this device")

    monkeypatch.setattr(task, "METHODS", (Method("other", "dense", fail),))
    row = bench(BenchConfig(**QUICK)).content["rows"][0]
    assert row["reason"] == "not supported here (RuntimeError: no kernel image)" and row["forward_ms"] is None


def test_break_even_is_where_slower_ends():
    def row(length, speedup):
        return {"method": "sla", "sparsity": 0.95, "shape": f"1x1x{length}x64", "speedup": speedup}

    rows = [row(1024, 0.5), row(2048, 1.1), row(4096, 0.9), row(8192, 2.0), row(16384, 4.0)]
    assert task._break_even(rows, 0.95) == 8192
    assert task._break_even(rows[:3], 0.95) is None


def test_model_is_timed_dense_and_with_sla():
    config = BenchConfig(model="tiny-wan", steps=1, sparsities=(0.9,), block_m=16, block_n=16, device="cpu")
    rows = bench(config).content["models"]
    assert [(row["attention"], row["backend"], row["sparsity"]) for row in rows] == [
        ("dense", "sdpa", None),
        ("sla", "torch", 0.9),
    ]
    for row in rows:
        assert 0 < row["attention_share"] < 1 and row["step_ms"]["median"] > row["attention_ms"]["median"] > 0
    assert rows[0]["speedup"] == 1


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"shapes": ("wan",)}, "wan-1.3b-480p.*Try --shape 1x12x8192x128"),
        ({"shapes": ("1x12x0x128",)}, "Try --shape"),
        ({"sparsities": (1.0,)}, "sparsity is 1.0"),
        ({"block_m": 48}, "block_m is 48"),
        ({"seconds": 0.0}, "Try --seconds 2"),
        ({"model": "tiny-wan", "random_init": "wan-1.3b"}, "Give one of them"),
        ({"lengths": (0,)}, "at least 1 token"),
        ({"steps": 0}, "Try --steps 4"),
    ],
    ids=["shape", "zero", "sparsity", "block", "seconds", "two-models", "length", "steps"],
)
def test_bad_settings(fields, complaint):
    with pytest.raises(UsageError, match=complaint):
        BenchConfig(**fields)


def test_unknown_and_missing_methods():
    with pytest.raises(UsageError, match="must be one of sla, sparse, sdpa"):
        bench(BenchConfig(**QUICK, methods=("fast",)))
    with pytest.raises(EnvironmentProblem, match="flash-attn does not run here: is not installed"):
        bench(BenchConfig(**QUICK, methods=("flash-attn",)))


def test_shapes_have_names():
    assert parse_shape("wan-1.3b-480p") == (1, 12, 32760, 128)
    assert parse_shape(" 1X2x3x16 ") == (1, 2, 3, 16)


def test_command(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # results go into outputs/bench there
    options = ["--shape", "1x1x128x16", "--method", "sla", "--method", "sdpa", "--sparsity", "0.5", "--seconds", "0.01"]
    assert run(["bench", *options, "--device", "cpu", "--no-length-sweep", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert [row["method"] for row in content["rows"]] == ["sla", "sdpa"]
    assert content["machine"]["type"] == "cpu"
    assert sorted(file.suffix for file in Path("outputs/bench").iterdir()) == [".json", ".md", ".png", ".svg"]
    assert run(["bench", "--shape", "what"]) == 2


def test_triton_without_a_gpu(monkeypatch, capsys):
    from slagen.kernels import resources

    monkeypatch.setattr(resources, "interpreting", lambda: False)
    options = ["--device", "cpu", "--backend", "triton"]
    assert run(["bench", "--shape", "1x1x128x16", *options]) == 4
    assert run(["generate", "a red circle moving right", *options]) == 4
    assert "Triton needs a CUDA device" in capsys.readouterr().err


def test_doctor_finds_no_gpu_without_failing(capsys):
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    assert run(["doctor", "--json"]) == 0
    found = {finding["name"]: finding for finding in json.loads(capsys.readouterr().out)["findings"]}
    assert found["gpu"]["status"] == "note" and found["gpu"]["fix"]
    assert found["bundled model"]["status"] == "ok"
    assert found["kernels"]["status"] == "ok" and "agree with the reference" in found["kernels"]["found"]
    assert run(["doctor", "--require-gpu"]) == 4
    assert "--require-gpu was given" in capsys.readouterr().err
