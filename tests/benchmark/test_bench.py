"""slagen bench: what it measures, what it refuses, and what it writes."""

import dataclasses
import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from slagen.attention import registry, sparse_linear_attention
from slagen.attention.protocol import Layer
from slagen.attention.schedule_file import LayerSchedule
from slagen.attention.sla import fused
from slagen.attention.sla.config import SLAConfig
from slagen.benchmark import clock, compare
from slagen.benchmark import run as task
from slagen.benchmark.config import BenchConfig, parse_shape
from slagen.benchmark.methods import Contender
from slagen.benchmark.registry import all_methods
from slagen.benchmark.rows import BenchRow
from slagen.benchmark.run import bench
from slagen.benchmark.tables import short_model_cells
from slagen.cli.main import run
from slagen.doctor import checks as doctor
from slagen.errors import EnvironmentProblem, UsageError
from slagen.wan import processor

QUICK = {"shapes": ("1x2x256x32",), "sparsities": (0.5,), "lengths": (), "seconds": 0.01, "device": "cpu"}
FIELDS = {
    "method", "kind", "backend", "shape", "dtype", "sparsity", "correct", "error", "forward_ms", "backward_ms",
    "training_forward_ms", "parts_ms", "tflops_dense_equivalent", "speedup",
}  # fmt: skip


@pytest.fixture(autouse=True)
def small_ceilings(monkeypatch):
    """The ceilings take a second of matrix products each time; here they are not the point."""
    monkeypatch.setattr(task, "measure_ceilings", lambda device, dtype: (1.0, 1.0))


def test_rows_and_files(tmp_path):
    config = BenchConfig(**QUICK, methods=("sla", "sparse", "sdpa"), backward=True, output=str(tmp_path / "results"))
    result = bench(config)
    rows = {row.method: row for row in result.rows}
    assert list(rows) == ["sla", "sparse", "sdpa"]
    for row in rows.values():
        assert row.to_dict().keys() >= FIELDS
        assert row.correct is True and row.error < 1e-5
        assert row.forward_ms.q1 <= row.forward_ms.median <= row.forward_ms.q3
        assert row.backward_ms.repeats >= 3
        flops = 4 * 2 * 256**2 * 32
        assert row.tflops_dense_equivalent == pytest.approx(flops / row.forward_ms.median / 1e9)
    assert [rows[name].kind for name in rows] == ["sla", "sparse", "dense"]
    assert (rows["sla"].backend, rows["sla"].sparsity, rows["sdpa"].sparsity) == ("torch", 0.5, None)
    ratio = rows["sdpa"].forward_ms.median / rows["sla"].forward_ms.median
    assert rows["sla"].speedup == pytest.approx(ratio) and rows["sdpa"].speedup == 1
    parts = rows["sla"].parts_ms
    assert list(parts) == ["block_map", "state", "projection", "fused"]
    assert all(duration > 0 for duration in parts.values())
    assert {path.name for path in result.files} == {"bench.json", "bench.md", "bench.png", "bench.svg"}
    assert json.loads((tmp_path / "results" / "bench.json").read_text()) == result.to_dict()
    table = (tmp_path / "results" / "bench.md").read_text()
    times = [rows[name].forward_ms for name in ("sla", "sparse", "sdpa")]
    slower = any(found.q1 > times[2].q3 for found in times)
    assert "| sla | torch | 0.5 |" in table and ("(slower)" in table) == slower
    assert (tmp_path / "results" / "bench.png").read_bytes()[:4] == b"\x89PNG"


def test_lengths_are_swept_at_one_sparsity():
    config = BenchConfig(**{**QUICK, "lengths": (128, 512), "sparsities": (0.9, 0.5)}, methods=("sla", "sdpa"))
    rows = bench(config).rows
    assert [(r.method, r.shape.split("x")[2], r.sparsity) for r in rows] == [
        ("sla", "256", 0.9), ("sdpa", "256", None), ("sla", "256", 0.5),
        ("sla", "128", 0.9), ("sdpa", "128", None), ("sla", "512", 0.9), ("sdpa", "512", None),
    ]  # fmt: skip


def test_a_wrong_method_is_reported_and_not_timed(monkeypatch):
    broken = Contender("sdpa", "dense", lambda setting: lambda q, k, v: F.scaled_dot_product_attention(q, k, v) * 1.01)
    monkeypatch.setattr(task, "all_methods", lambda delta: (broken,))
    row = bench(BenchConfig(**QUICK)).rows[0]
    assert row.correct is False and row.forward_ms is None and row.reason.startswith("wrong: ")


def test_what_other_libraries_cannot_do_is_said(monkeypatch):
    def fail(setting):
        raise RuntimeError("no kernel image\nfor this device")

    monkeypatch.setattr(task, "all_methods", lambda delta: (Contender("other", "dense", fail),))
    row = bench(BenchConfig(**QUICK)).rows[0]
    assert row.reason == "not supported here (RuntimeError: no kernel image)" and row.forward_ms is None


def test_methods_take_turns(monkeypatch):
    """Ratios are of one state of the machine: no method is timed to its end before another begins."""
    order = []

    def recorded(name):
        def attend(q, k, v):
            order.append(name)
            return F.scaled_dot_product_attention(q, k, v)

        return Contender(name, "dense", lambda setting: attend)

    monkeypatch.setattr(task, "all_methods", lambda delta: (recorded("one"), recorded("two")))
    rows = bench(BenchConfig(**QUICK)).rows
    turns = [len(row.forward_ms.turn_medians) for row in rows]
    assert min(turns) >= 3 and len([1 for a, b in itertools.pairwise(order) if a != b]) >= 2 * min(turns) - 1


def test_a_missing_backward_pass_leaves_the_forward_pass(monkeypatch):
    def make(setting):
        return lambda q, k, v: F.scaled_dot_product_attention(q, k, v).detach()

    monkeypatch.setattr(task, "all_methods", lambda delta: (Contender("other", "dense", make),))
    result = bench(BenchConfig(**QUICK, methods=("other",), backward=True))
    row = result.rows[0]
    assert row.forward_ms and row.backward_ms is None and row.speedup == 1
    assert row.reason.startswith("backward pass: not supported here (RuntimeError: element 0 of tensors")
    assert f"other: {row.reason}" in result.verdicts


def test_what_fails_at_the_full_length_is_said(monkeypatch):
    def make(setting):
        def attend(q, k, v):
            if q.shape[2] == 256:
                raise torch.OutOfMemoryError
            return F.scaled_dot_product_attention(q, k, v)

        return attend

    monkeypatch.setattr(task, "all_methods", lambda delta: (Contender("other", "dense", make),))
    result = bench(BenchConfig(**QUICK))
    assert result.verdicts[0] == "other: out of memory on this device"


def test_what_is_not_finite_is_wrong_and_can_be_written(monkeypatch, tmp_path):
    nothing = Contender("other", "dense", lambda setting: lambda q, k, v: q * torch.nan)
    monkeypatch.setattr(task, "all_methods", lambda delta: (nothing,))
    row = bench(BenchConfig(**QUICK, output=str(tmp_path))).rows[0]
    assert row.correct is False and row.reason == "wrong: it produced NaN or Inf"
    assert json.loads((tmp_path / "bench.json").read_text())["rows"][0]["error"] is None


@pytest.mark.parametrize("domain", ["all", "marginal"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_fused_part_attends(backend, domain):
    """What is timed as `fused` gives the operator's own output, from what the other parts make."""
    if backend == "triton":
        pytest.importorskip("triton", reason="needs triton")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = SLAConfig(0.5, linear_domain=domain, block_m=16, block_n=16)
    weight, bias = torch.eye(16, device=device), torch.randn(16, device=device)
    module = registry.get("sla").build(config, Layer(0, 1, 1, 16), backend, device).requires_grad_(False)
    module.proj_l.weight.copy_(weight)
    module.proj_l.bias.copy_(bias)
    q, k, v, _ = clock.draw(1, (1, 1, 50, 16), device, torch.float32)[0]
    with torch.inference_mode():
        parts = registry.get("sla").parts(module, q, k, v, None)
        whole = sparse_linear_attention(q, k, v, config, weight, bias, backend=backend)
        for part in parts.values():
            part(q, k, v)
        assert torch.equal(parts["fused"](q, k, v), whole)


def test_inputs_exceed_twice_the_cache(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=50_000_000))
    monkeypatch.setattr(clock, "draw", lambda count, sizes, device, dtype: count)
    for sizes, count in {(1, 12, 32760, 128): 1, (1, 12, 1024, 128): 11, (1, 1, 1024, 64): 255}.items():
        assert clock.draw_inputs(sizes, torch.device("cuda"), torch.bfloat16) == count
        assert count * 3 * math.prod(sizes) * 2 >= 100_000_000


def test_a_backend_that_can_not_take_the_shape_is_said():
    with pytest.raises(EnvironmentProblem, match="head dimensions 16, 32, 64, 128, 256, not 96"):
        bench(BenchConfig(**{**QUICK, "shapes": ("1x1x128x96",)}, backend="triton"))


def test_break_even_is_where_slower_ends():
    def row(length, speedup, against="faster"):
        shape = f"1x1x{length}x64"
        return BenchRow("sla", "sla", "torch", shape, "float32", 0.95, speedup=speedup, against_dense=against)

    rows = [row(1024, 0.5, "slower"), row(2048, 1.1), row(4096, 0.9, "slower"), row(8192, 2.0), row(16384, 4.0)]
    assert compare.break_even(rows, 0.95) == 8192 and compare.even_tokens(rows, 0.95) is None
    assert compare.break_even(rows[:3], 0.95) is None and compare.even_tokens(rows[:3], 0.95) is None
    noisy = [*rows[:2], row(4096, 1.3, "within the noise")]
    assert compare.break_even(noisy, 0.95) is None and compare.even_tokens(noisy, 0.95) == 4096


def test_model_is_timed_dense_and_with_sla():
    config = BenchConfig(model="tiny-wan", steps=1, sparsities=(0.9,), block_m=16, block_n=16, device="cpu")
    rows = bench(config).models
    assert [(row.attention, row.backend, row.sparsity) for row in rows] == [
        ("dense", "sdpa", None),
        ("sla", "torch", 0.9),
        ("vsa", "torch", 0.9),
    ]
    for row in rows:
        assert 0 < row.attention_share < 1 and row.step_ms.median > row.attention_ms.median > 0
    assert rows[0].speedup == 1


def test_a_schedule_runs_in_the_loop(tmp_path, monkeypatch):
    """Every step and layer has its own config, as in `generate`, and the row says which schedule ran."""
    schedule = LayerSchedule("mean", 6, (("0", (0.5,) * 6), ("1-", (0.5, 0.5, 0.9, 0.9, 0.9, 0.9))))
    (tmp_path / "s.json").write_text(json.dumps(schedule.to_dict()))
    config = BenchConfig(
        model="tiny-wan", steps=2, methods=("mean",), block_m=16, block_n=16, device="cpu",
        sparsity_schedule=str(tmp_path / "s.json"),
    )  # fmt: skip
    seen = []
    denoising = processor.denoising

    def watch(transformer, steps, dense=None, configs=None):
        seen.append((steps, configs))
        return denoising(transformer, steps, dense, configs)

    monkeypatch.setattr(processor, "denoising", watch)
    dense, row = bench(config).models
    assert row.sparsity is None and row.sparsity_schedule == schedule.text and dense.sparsity_schedule is None
    assert [steps for steps, _ in seen] == [1, 2, 2, 2] and seen[0][1] is None
    first, last = seen[3][1]
    assert [own.sparsity for own in first] == [0.5] * 6 and [own.sparsity for own in last] == [0.5] * 2 + [0.9] * 4
    assert short_model_cells(row)[2] == "schedule" and row.to_dict()["sparsity_schedule"] == schedule.text
    with pytest.raises(UsageError, match="was tuned for mean attention, but this is vsa attention. Give --method mean"):
        dataclasses.replace(config, methods=("vsa",), sparsity_schedule=str(tmp_path / "s.json"))


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"lora": "a:0.5"}, "^--lora is for the denoising loop, which is not timed. Add --model or --random-init"),
        ({"sparsity_schedule": "0-:0.5"}, "^--sparsity-schedule is for the denoising loop, which is not timed. Add"),
        ({"model": "tiny-wan", "sparsity_schedule": "0-4:0.5"}, "there are 4 steps: 0 to 3"),
        ({"model": "tiny-wan", "methods": ("sol",), "sparsity_schedule": "0:0.5"}, "none of them is measured. Leave"),
        ({"shapes": ("wan",)}, "wan-1.3b-480p.*Try --shape 1x12x8192x128"),
        ({"shapes": ("1x12x0x128",)}, "Try --shape"),
        ({"sparsities": (1.0,)}, "sparsity is 1.0"),
        ({"block_m": 48}, "block_m is 48"),
        ({"seconds": 0.0}, "Try --seconds 2"),
        ({"model": "tiny-wan", "random_init": "wan-1.3b"}, "Give one of them"),
        ({"lengths": (0,)}, r"length is 0, but must be at least 1\."),
        ({"steps": 0}, "Try --steps 1"),
        ({"steps": 4}, "^--steps is for the denoising loop, which is not timed. Add --model or --random-init.$"),
        ({"compile": True, "num_frames": 9}, "^--num-frames and --compile are for the denoising loop"),
        ({"width": 96, "height": 96}, "^--size is for the denoising loop"),
        (
            {"model": "tiny-wan", "width": 100, "height": 100},
            "^size is 100x100, but both sides must be multiples of 16 pixels. Try --size 96x96.$",
        ),
    ],
    ids=[
        "lora-of-no-loop",
        "schedule-of-no-loop",
        "schedule-steps",
        "schedule-methods",
        "shape",
        "zero",
        "sparsity",
        "block",
        "seconds",
        "two-models",
        "length",
        "steps",
        "steps-of-no-loop",
        "frames-of-no-loop",
        "size-of-no-loop",
        "size",
    ],
)
def test_bad_settings(fields, complaint):
    """What only a denoising loop has was ignored without one, and a size was refused once the model was loaded."""
    with pytest.raises(UsageError, match=complaint):
        BenchConfig(**fields)


def test_unknown_and_missing_methods():
    names = ", ".join(method.name for method in all_methods())
    with pytest.raises(UsageError, match=f"must be one of {names}"):
        bench(BenchConfig(**QUICK, methods=("fast",)))
    with pytest.raises(EnvironmentProblem, match="flash-attn cannot run on this machine: not installed"):
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


@pytest.mark.slow
def test_doctor_finds_no_gpu_without_failing(capsys, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")

    def small_proof(q, config):  # the same, of a size that the interpreter takes seconds for
        return fused.prove(q[..., :16], dataclasses.replace(config, block_m=16, block_n=16))

    monkeypatch.setattr(doctor, "prove", small_proof)
    assert run(["doctor", "--json"]) == 0
    found = {finding["name"]: finding for finding in json.loads(capsys.readouterr().out)["findings"]}
    assert found["gpu"]["status"] == "note" and found["gpu"]["fix"]
    assert found["bundled model"]["status"] == "ok"
    assert found["kernels"]["status"] == "ok" and "agree with the reference" in found["kernels"]["found"]
    assert run(["doctor", "--require-gpu"]) == 4
    assert "--require-gpu needs a usable GPU" in capsys.readouterr().err
