"""What bench, doctor and models print: whole at 80 columns, without blanks at the ends of lines, and said once."""

import dataclasses
import json
import sys
from pathlib import Path

import matplotlib
import pytest
import torch.nn.functional as F

from slagen.benchmark import compare, operator, tables
from slagen.benchmark import run as task
from slagen.benchmark.config import BenchConfig
from slagen.benchmark.methods import Contender
from slagen.benchmark.registry import all_methods
from slagen.benchmark.rows import BenchMachine, BenchRow, ModelRow, SameTopK
from slagen.cli.output.bench import show_bench
from slagen.cli.output.doctor import show_findings, show_selftest
from slagen.cli.output.kernels import MAIN_KERNELS, show_kernels
from slagen.cli.output.weights import show_models
from slagen.cli.table import Cell, Table
from slagen.device import Device
from slagen.doctor.checks import Finding
from slagen.doctor.selftest import Check, Machine, Selftest
from slagen.generation.estimate import models
from slagen.io.records import read_record
from slagen.kernels.costs import KernelCosts
from slagen.plot import Timed, draw_bench
from slagen.timing import Times, TurnTimes

WIDTH = 80
MEDIANS = "Times are medians. The files and --json also have quartiles and repeats."

METHODS = all_methods()


@pytest.fixture(params=["terminal", "pipe"])
def stdout(request, monkeypatch, capsys):
    """What was printed, on a terminal of 80 columns and where stdout is none."""
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    if request.param == "terminal":
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        monkeypatch.setenv("TERM", "dumb")  # no colours

    def read():
        lines = capsys.readouterr().out.splitlines()
        assert all(row == row.rstrip() for row in lines)
        return lines

    return read


def bench_row(method, **changes):
    """A row as `bench` makes them, of a method that takes its longest numbers."""
    backend = "triton" if method.name in ("sla", "sparse") else method.name
    times = TurnTimes(0.0123456, 0.01, 0.02, 100, [0.01, 0.02])
    row = BenchRow(
        method.name, method.kind, backend, "1x12x32760x128", "bfloat16", 0.95, correct=True, forward_ms=times,
        backward_ms=dataclasses.replace(times, median=123456.7), tflops_dense_equivalent=0.00123456, speedup=0.85,
        against_dense=compare.SLOWER,
    )  # fmt: skip
    return dataclasses.replace(row, **changes)


def bench_result(rows, models=(), **content):
    device = Device(type="cpu", name="Some card", cpu="c", cores=1, threads=1, platform="p")
    machine = BenchMachine(device, {"torch": "2"}, 700.0, 3000.0, "2026-11-30T00:00:00+00:00")
    return tables.BenchResult(machine, rows, list(models), **content)


def test_bench_is_whole_at_80_columns(stdout):
    """Every method, backend and speed-up; a heading for each shape. In a terminal of 80 they came out as `s…`."""
    rows = [bench_row(method, shape=shape) for shape in ("1x12x1024x128", "1x12x32760x128") for method in METHODS]
    rows.append(bench_row(METHODS[0], forward_ms=None, correct=False, reason="wrong: its error is 0.1, the limit 0.01"))
    show_bench(bench_result(rows), False)
    lines = stdout()
    assert all(len(row) <= WIDTH for row in lines[: lines.index(MEDIANS)]) and "…" not in "".join(lines)
    assert [row for row in lines if row in ("1x12x1024x128", "1x12x32760x128")] == ["1x12x1024x128", "1x12x32760x128"]
    shown = [row.split() for row in lines]
    for row in rows[:-1]:
        backend = ["triton"] if row.backend == "triton" else []
        times = ["0.95", "0.0123", "123457", "0.00123", "0.85x", *["(slower)"] * (row.kind != "dense")]
        assert shown.count([row.method, *backend, *times]) == 2
    assert ["sla", "triton", "0.95", "wrong"] in shown
    assert "sla is wrong: its error is 0.1, the limit 0.01" in lines


def test_bars_have_the_ratio_on_them(stdout):
    """bench.png showed two dots where two methods were timed."""
    dense = bench_row(METHODS[-1], speedup=1.0, sparsity=None)
    result = bench_result([bench_row(METHODS[0], speedup=5.21, sparsity=0.9), dense])
    show_bench(result, False)
    lines = stdout()
    name = METHODS[-1].name
    width = max(len("sla, 0.9"), len(name))
    assert f"{'sla, 0.9':<{width}}  {'━' * 32} 5.2x" in lines and f"{name:<{width}}  {'━' * 6} 1.00x" in lines
    assert any(row.startswith("Dense-equivalent TFLOP/s count every") for row in lines)
    assert not bench_result([dense]).speedup_bars  # nothing to compare


@pytest.mark.parametrize("speedups", [(1.0, 5.21, 0.97), (None, None, None)])
def test_the_drawing_of_a_bench_has_a_bar_for_each_method(tmp_path, speedups):
    rows = [Timed("sdpa", 512, None, 3.0, speedups[0]), Timed("sla", 512, 0.9, 0.576, speedups[1]),
            Timed("other", 512, 0.9, 3.1, speedups[2])]  # fmt: skip
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        _, svg = draw_bench(rows, "t", tmp_path)
    text = svg.read_text()
    for told in ("5.2x", "1.00x", "0.97x") if speedups[0] else ("3 ms", "0.576 ms", "3.1 ms"):
        assert f">{told}<" in text
    assert "sla, 0.9" in text and "tokens" in text and ">forward, ms<" not in text  # no second drawing
    draw_bench([*rows, Timed("sdpa", 256, None, 1.0)], "t", tmp_path)


def test_bench_of_models_is_whole_at_80_columns(stdout):
    row = ModelRow(
        "turbowan2.1-t2v-1.3b-480p", "sla", "sdpa-flash", 0.95, "832x480", 81, 4, compiled=True,
        step_ms=Times(12345.6, 12000.0, 13000.0, 4), attention_ms=None, attention_share=None, peak_memory_gib=1.0,
        speedup=0.97, against_dense=tables.EVEN,
    )  # fmt: skip
    plain = dataclasses.replace(row, attention="dense", compiled=False, attention_share=0.75, speedup=1.0)
    result = bench_result([], [plain, row])
    show_bench(result, False)
    lines = stdout()
    assert all(len(row) <= WIDTH for row in lines)
    assert "turbowan2.1-t2v-1.3b-480p 832x480, 81 frames" in lines
    shown = [row.split() for row in lines]
    assert ["sla", "sdpa-flash,", "compiled", "0.95", "12346", "0.97x", "(noise)"] in shown
    assert ["dense", "sdpa-flash", "0.95", "12346", "75%", "1.00x"] in shown
    assert "12000-1.3e+04" not in "".join(lines) and "(1.2e+04-1.3e+04)" in result.tables[1][1][0][4]


def test_kernels_are_whole_at_80_columns(stdout):
    """The main kernels at heads of 128, and what breaks a limit; the rest is counted, and in the JSON."""
    whole = json.loads((Path(__file__).parents[1] / "kernels" / "kernel_costs.json").read_text())
    spilling = [row for row in whole["kernels"] if row["target"] == "sm_120" and row["kernel"] != "attend"][:7]
    for row in spilling:
        row["spill_bytes"] = 8
    costs = read_record(KernelCosts, whole)
    broken = [row for row in costs.kernels if row.faults]
    assert len(broken) == 7
    show_kernels(costs, False)
    lines = stdout()
    sentences = ("one call at", f"{len(costs.kernels)} kernels are shown")
    assert all(len(row) <= WIDTH or any(text in row for text in sentences) for row in lines)
    assert "…" not in "".join(lines)
    shown = [row.split() for row in lines]
    for target in ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"):
        assert len([row for row in lines if row.startswith(f"{target}, ")]) == 1
    assert shown.count(list(MAIN_KERNELS)) == 6
    main = [row for row in costs.kernels if row.kernel in MAIN_KERNELS and row.head_dim == 128]
    for name, key in (
        ("registers", "registers"),
        ("instructions", "instructions"),
        ("programs per SM", "programs_per_sm"),
    ):
        for target in ("sm_80", "sm_120"):
            values = [str(getattr(row, key)) for row in main if row.target == target]
            assert [*name.split(), *values] in shown
    for row in broken:
        assert f"{row.kernel}, D = {row.head_dim}: 8 bytes spilled" in lines
        assert any(row.kernel in cells for cells in shown)
    count = len(main) + len([row for row in broken if row not in main])
    assert f"{count} of {len(costs.kernels)} kernels are shown" in "\n".join(lines) and "--json" in "\n".join(lines)


def test_presets_are_whole_at_80_columns(stdout):
    rows = models()
    show_models(rows, False)
    text = "\n".join(stdout())
    assert max(map(len, text.splitlines())) <= WIDTH and "…" not in text
    for row in rows:
        assert row.name in text and (row.weights or row.base or "the installed package") in text


def test_findings_are_whole_and_end_without_blanks(stdout):
    """A pipe got lines of 132 columns, padded with blanks."""
    words = " ".join(f"word{number}" for number in range(40))
    show_findings([Finding("kernels 0", "problem", words, "apt install gcc"), Finding("gpu", "ok", "x")], False)
    lines = stdout()
    assert " ".join(" ".join(lines).split()) == f"problem kernels 0 {words} apt install gcc ok gpu x"


def test_selftest_says_a_thing_once(stdout, tmp_path):
    """Twelve checks of the kernels that end alike said one sentence twelve times."""
    agree = "all agree"
    checks = [
        Check(f"triton {dtype}, head dimension {size}, domain {domain}", "ok", 0.5, agree)
        for dtype in ("fp16", "bf16", "fp32") for size in (64, 128) for domain in ("all", "marginal")
    ]  # fmt: skip
    checks[7] = dataclasses.replace(checks[7], status="failed", detail="dq is wrong")
    checks.append(Check("generate", "ok", 0.5, "4 steps"))
    device = Device(type="cpu", name="cpu", cpu="c", cores=1, threads=1, platform="p")
    show_selftest(Selftest("2026-11-30", Machine(device, {}), [], None, checks), tmp_path / "file.json", False)
    text = " ".join(" ".join(stdout()).split())
    assert text.count(agree) == 3 and text.count("dq is wrong") == 1 and text.count("generate") == 1
    for dtype, counts in (("fp16", "4 checks, 2.0 s"), ("bf16", "3 checks, 1.5 s"), ("fp32", "4 checks, 2.0 s")):
        assert f"ok triton {dtype} ({counts}): {agree}" in text
    assert "failed triton bf16, head dimension 128" in text and text.count("marginal") == 1


# Verdicts


def times(median, q1=None, q3=None):
    return TurnTimes(median, q1 or median, q3 or median, 9, [median] * 5)


@pytest.mark.parametrize(
    ("sla", "said", "mark"),
    [
        pytest.param(times(1.0), "SLA is faster than dense attention from 256 tokens on", "2.00x", id="faster"),
        pytest.param(times(4.0), tables.NEVER, "0.50x (slower)", id="slower"),
        pytest.param(times(1.9, 1.5, 2.1), "no verdict: at 256 tokens the quartiles", "1.05x (noise)", id="noise"),
        pytest.param(
            times(2.1, 1.9, 2.5), "no verdict: at 256 tokens the quartiles", "0.95x (noise)", id="noise-below"
        ),
    ],
)
def test_no_verdict_within_the_noise(sla, said, mark):
    """A speed-up of 1.06x was a verdict where the medians of turns lay 93 % apart."""
    sdpa = next(method for method in METHODS if method.name == "sdpa")
    dense = bench_row(
        sdpa,
        shape="1x2x256x64",
        forward_ms=times(2.0),
        sparsity=None,
        backward_ms=None,
    )
    row = bench_row(METHODS[0], shape="1x2x256x64", forward_ms=sla, backward_ms=None)
    rows = compare.with_speedups([row, dense])
    result = bench_result(
        rows, break_even_tokens={"1x2x256x64": compare.break_even(rows, 0.95)},
        even_tokens={"1x2x256x64": compare.even_tokens(rows, 0.95)},
    )  # fmt: skip
    assert result.verdicts[-1].startswith(f"1x2x256x64: {said}")
    assert result.verdicts[-2].endswith("between rounds; where quartiles overlap, a difference is noise")
    assert tables.cells(rows[0])[-1] == mark and result.speedups == [f"{mark} at 1x2x256x64"]


def quick(monkeypatch, methods, **changes):
    """A bench of an instant: its content, and the notes."""
    events = []
    monkeypatch.setattr(task, "measure_ceilings", lambda device, dtype: (1.0, 1.0))
    monkeypatch.setattr(task, "all_methods", lambda delta: methods)
    monkeypatch.setattr(operator, "_time_parts", lambda *given: None)
    config = BenchConfig(
        **{"shapes": ("1x1x128x16",), "lengths": (), "seconds": 0.001, "device": "cpu", "sparsities": (0.5,), **changes}
    )
    result = task.bench(config, events.append)
    return result, [event.text for event in events if event.kind in ("job", "note")]


def dense(name, **options):
    return Contender(name, "dense", lambda setting: F.scaled_dot_product_attention, **options)


@pytest.mark.parametrize(
    ("sparsities", "kept", "groups"),
    [
        pytest.param((0.5, 0.8, 0.9, 0.97), [0.5, 0.8], [(0.8, [0.9, 0.97])], id="first-stands"),
        pytest.param((0.8, 0.9, 0.95, 0.97), [0.95], [(0.95, [0.8, 0.9, 0.97])], id="swept-stands"),
        pytest.param((0.9, 0.9), [0.9], [], id="twice"),
        pytest.param((0.0, 0.5, 0.75), [0.0, 0.5, 0.75], [], id="none"),
    ],
)
def test_sparsities_that_keep_the_same_are_measured_once(monkeypatch, sparsities, kept, groups):
    """At 8 blocks 0.9, 0.95 and 0.97 all keep one: the table showed noise between identical methods."""
    sparse = next(method for method in METHODS if method.name == "sparse")
    result, notes = quick(monkeypatch, (sparse,), shapes=("1x1x512x16",), sparsities=sparsities)
    assert [row.sparsity for row in result.rows] == kept
    assert [(group.sparsity, group.also) for group in result.same_top_k] == groups
    assert len([text for text in result.verdicts if "of 8 key blocks" in text]) == len(groups)
    assert not [text for text in notes if "of 8 key blocks" in text]  # the result says it


def test_nothing_is_said_of_sparsities_to_a_method_without(monkeypatch):
    result, _ = quick(monkeypatch, (dense("own"),), shapes=("1x1x512x16",), sparsities=(0.9, 0.95, 0.97))
    assert [row.sparsity for row in result.rows] == [None] and result.same_top_k == []


def test_one_line_for_all_that_are_not_installed(monkeypatch):
    """There was one for each method and sparsity, of which nothing came."""
    missing = tuple(dense(f"other-{number}", package=f"no_such_package_{number}") for number in range(3))
    result, notes = quick(monkeypatch, (dense("sdpa"), *missing), sparsities=(0.0, 0.5))
    assert notes == ["sdpa, 128 tokens"]
    assert "other-0, other-1, other-2: not installed" in result.verdicts
    assert len([text for text in result.verdicts if "installed" in text]) == 1


def test_nothing_is_said_of_sla_where_it_was_not_measured(monkeypatch):
    """It was slower than dense attention then."""
    result, _ = quick(monkeypatch, (dense("sdpa"),))
    assert not [text for text in result.verdicts if "SLA" in text]


def test_a_plain_table_with_headers_of_two_lines():
    table = Table("a\nms", "long", right=True)
    table.add_row("x", 7)
    table.add_row(Cell("1\n2"), "")
    assert str(table) == "a   long\nms\nx      7\n1\n2"


def test_a_result_is_read_as_it_was_written():
    """What `scripts/gpu.py --tables` prints of a bench.json."""
    row = bench_row(METHODS[0], parts_ms={"select": 0.5})
    model = ModelRow("m", "sla", "torch", 0.9, "8x8", 9, 1, False, Times(1.0, 0.5, 2.0, 9), None, None, 1.0)
    kept = [SameTopK("1x1x256x16", 0.9, [0.91], 2, 16)]
    written = bench_result([row], [model], break_even_tokens={"1x1x256x16": None}, same_top_k=kept)
    content = json.loads(json.dumps(written.to_dict()))
    again = tables.BenchResult.from_dict(content)
    assert again == written and list(again.to_dict()) == list(content)
    assert tables.markdown(again) == tables.markdown(written)
