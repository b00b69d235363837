"""Everything that is printed: what people and foreign files put into it is shown, and obeyed by nothing."""

import dataclasses
import importlib
import importlib.util
import inspect
import io
import json
import os
import pkgutil
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer
from test_text import HARMFUL, HARMLESS, is_harmless

from slagen.attention import registry
from slagen.attention.schedule_file import LayerSchedule
from slagen.attention.sla.config import SLAConfig
from slagen.batch.result import BatchResult
from slagen.benchmark.compare import FASTER
from slagen.benchmark.rows import BenchMachine, BenchRow, ModelRow
from slagen.benchmark.tables import BenchResult
from slagen.cli import console, live, output, plain, progress
from slagen.cli.main import app, run
from slagen.comparison.reports import ReportsCompared
from slagen.comparison.result import Comparison, Row, Runs
from slagen.device import Device
from slagen.doctor.checks import Finding
from slagen.doctor.selftest import Check, Machine, Selftest
from slagen.errors import SlagenError
from slagen.events import Event
from slagen.generation import estimate as plan
from slagen.generation.config import GenerateConfig
from slagen.generation.provenance import Made
from slagen.generation.replay import Compared, ReplayResult
from slagen.generation.video_report import (
    Cost,
    Overhead,
    ReportedAttention,
    ReportedStep,
    UsedWeights,
    VideoFile,
    VideoReport,
)
from slagen.kernels.costs import Bounds, KernelCost, KernelCosts, OperatorCall
from slagen.maps.run import AttentionMap
from slagen.timing import TurnTimes
from slagen.training.data.dataset import Dataset
from slagen.training.result import FinetuneResult
from slagen.tuning.result import CurvePoint, Priced, Tuned

HOSTILE = f"[red]a[/red] [/] [link=x] {HARMLESS} {HARMFUL}\nerror: forged"


def poisoned(content, keep=("status", "kind")):
    """The same content with hostile text in every string, and in every key that is none of slagen's own."""
    if isinstance(content, dict):
        return {key: value if key in keep else poisoned(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return type(content)(map(poisoned, content))
    if dataclasses.is_dataclass(content) and not isinstance(content, SLAConfig):  # which refuses such text
        kept = ("shape", "status")
        fields = {name: value if name in kept else poisoned(value) for name, value in vars(content).items()}
        return dataclasses.replace(content, **fields)
    if isinstance(content, Path):
        return Path(str(content) + HOSTILE.replace("\0", ""))
    return content + HOSTILE if isinstance(content, str) else content


KERNELS = KernelCosts(
    "3.0",
    OperatorCall("s", "d", 0.9, "all", "H", False, 6, {"total": 1.0}, {"k": Bounds(1, 1.0, 1.0, 1.0, 1.0, 1.0)}),
    [KernelCost("k", "sm_90", 128, "bf16", "f", {"tile_m": 64, "tile_n": 64, "num_warps": 4, "num_stages": 3}, 1, 2048,
                1, 0, "wgmma", True, 1, 3, 0, 2, 1, ["warning"])],
)  # fmt: skip
TIMES = TurnTimes(1.0, 1.0, 1.0, 9, [1.0, 1.0])
DEVICE = Device(type="cpu", name="cpu", cpu="c", cores=1, threads=1, platform="p")
STEP = ReportedStep(0, 1.0, 1.0, 1.0, 1.0, None, 0.1)
REPORT = VideoReport(
    1, "2026-11-30", VideoFile("v.mp4", 9, 64, 64, 8, 1.0, "ab"), {"seed": 3, "prompt": "p"}, {"torch": "2"}, DEVICE,
    UsedWeights(model="m", used="SLA"), "ab",
    ReportedAttention("sla", 9, {"fractions": {"critical": 0.1}, "key_blocks": 9, "block_n": 64, "critical": 1,
                                 "marginal": 8, "negligible": 0}, "torch"),
    {"load": 1.0}, 1.0, 1.0, [STEP] * 13, [], Cost(1, 2.0, 1.0, 1.0, 0.5, 0.5, 3.0, 1.5, 0.5, 0.3, None),
    Overhead("layer", 1, 0.1, 0.1, "all of it"),
)  # fmt: skip
BENCH = BenchResult(
    BenchMachine(DEVICE, {"torch": "2"}, 1.0, 1.0, "2026-11-30"),
    [BenchRow("sla", "sla", "torch", "1x1x8x16", "float32", 0.9, correct=True, forward_ms=TIMES, reason="why",
              tflops_dense_equivalent=1.0, speedup=2.0, against_dense=FASTER)],
    [ModelRow("m", "sla", "torch", 0.9, "8x8", 9, 1, False, TIMES, TIMES, 0.5, 1.0, 2.0, FASTER)],
    files=[Path("f")],
)  # fmt: skip
PLAN = plan.plan(GenerateConfig("x", model="wan2.1-t2v-1.3b"))


def comparison():
    def row(method, error):
        return Row(method, 0.9, {}, None, None, [Runs(error, [0.1], 0.2, 30.0, 0.9, None, 0.1, [5.0], [0.1])])

    return Comparison(
        "2026-11-30", [(HOSTILE, 1)], {HOSTILE: HOSTILE}, row("dense", 0.0), [row(HOSTILE, 0.1)], [row("random", 0.2)],
        [poisoned(Path("v.mp4"))], poisoned(Path("c.json")), {"torch": "2"}, DEVICE,
    )  # fmt: skip


def prepared(**fields):
    """A data set as `prepare` returns it, of these fields alone."""
    data = Dataset.__new__(Dataset)
    vars(data).update(fields)
    return data


SHOWN = {  # the arguments of every function that shows something, but for as_json
    "show_finetune": lambda: [FinetuneResult(**poisoned({"output": Path("o"), "steps": 1, "teacher_error_before": 1.0,
                              "teacher_error_after": 0.5, "seconds": 1.0, "page": Path("p"), "weights": Path("w")}))],
    "show_data": lambda: [prepared(folder=poisoned(Path("f")), training=[1], held_out=[2], hash="h")],
    "show_videos": lambda: [SimpleNamespace(videos=[SimpleNamespace(path=poisoned(Path("v")),
                            report_path=poisoned(Path("r")), record=poisoned(REPORT))])],
    "show_report": lambda: [poisoned(REPORT)],
    "show_batch": lambda: [BatchResult(**poisoned({"folder": Path("f"), "made": ["m"], "kept": ["k"], "elsewhere":
                           ["e"], "failed": [("n", "why")], "interrupted": False, "page": Path("p")}))],
    "show_bench": lambda: [poisoned(BENCH)],
    "show_findings": lambda: [[poisoned(Finding("n", "ok", "f", "x"))]],
    "show_selftest": lambda: [poisoned(Selftest("2026-11-30", Machine(DEVICE, {"torch": "2"}), [], None,
                                                [Check("n", "failed", 1.0, "d")])), poisoned(Path("p"))],
    "show_kernels": lambda: [poisoned(KERNELS)],
    "show_plan": lambda: [poisoned(PLAN)],
    "show_models": lambda: [poisoned(plan.models())],
    "show_methods": lambda: [poisoned(registry.describe())],
    "show_info": lambda: [Made(Path("v"), "report", {HOSTILE: HOSTILE, "a": {HOSTILE: [HOSTILE, 1]}, "n": 1000,
                                                     HOSTILE + "x": [{"b": 1}], "proj_l_norms": [1.0]})],
    "show_replay": lambda: [ReplayResult(Path("p"), {HOSTILE: Compared(HOSTILE, HOSTILE, False)},
                                         {HOSTILE: (HOSTILE, None)}, None)],
    "show_comparison": lambda: [comparison()],
    "show_reports": lambda: [
        ReportsCompared((HOSTILE, "b"), {HOSTILE: (HOSTILE, 1)}, {"load": (1.0, 2.0)}, True, True)
    ],
    "show_map": lambda: [AttentionMap(1, 0, 2, (0, 1, 2), (4, 4), 0.1, 0.5, 0.6, 0.4, {"prompt": HOSTILE},
                                      poisoned(Path("p.png")))],
    "show_tuned": lambda: [tuned()],
    "show_error": lambda: [HOSTILE],
}  # fmt: skip


def tuned():
    """A schedule of two layers with one point of its curve."""
    priced = Priced(HOSTILE, 0.5, 10, 0.25)
    point = CurvePoint(10, priced, dataclasses.replace(priced, sparsity=None, error=0.2))
    return Tuned(
        LayerSchedule(HOSTILE, 2, ((HOSTILE, (0.5, 0.9)),)), 0.3, priced, [priced], [(HOSTILE, 1)], [(HOSTILE, 2)], [0],
        [0.5, 0.9], [], [point], {"prompt": HOSTILE}, 20, HOSTILE, {HOSTILE: "1"},
        DEVICE, poisoned(Path("s.json")),
    )  # fmt: skip


MODULES = [
    console,
    *(importlib.import_module(f"slagen.cli.output.{m.name}") for m in pkgutil.iter_modules(output.__path__)),
]
SHOWING = {
    name: function for module in MODULES for name, function in inspect.getmembers(module, inspect.isfunction)
    if name[:5] == "show_"
}  # fmt: skip


def use_plain(monkeypatch):
    """Print as machines without rich do."""
    monkeypatch.setattr(console, "Console", plain.Console)
    monkeypatch.setattr(console, "Text", plain.Text)
    monkeypatch.setattr(console, "stderr", plain.Console(stderr=True))
    monkeypatch.setattr(progress, "live", plain.live)


@pytest.fixture(params=["rich", "plain"])
def printer(request, monkeypatch):
    """What prints: rich, or what stands in for it on machines that lack it."""
    if request.param == "plain":
        use_plain(monkeypatch)


def test_a_dense_video_is_not_compared_with_dense_attention(capsys):
    """It had "1.00x fewer FLOPs, 83% of the 1.20x limit"."""
    for mode, is_compared in (("sla", True), ("dense", False)):
        SHOWING["show_report"](dataclasses.replace(REPORT, attention=ReportedAttention(mode, 9, {}, None)))
        assert ("fewer FLOPs" in " ".join(capsys.readouterr().err.split())) == is_compared


@pytest.mark.parametrize("module", [console, live])
def test_without_rich_all_names_are_plain(monkeypatch, module):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    spec = importlib.util.spec_from_file_location("without_rich", module.__file__)
    loaded = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "without_rich", loaded)  # where dataclasses look for it
    spec.loader.exec_module(loaded)
    assert getattr(loaded, "Console", plain.Console) is plain.Console
    assert getattr(loaded, "live", plain.live) is plain.live
    assert "rich" not in {getattr(value, "__module__", "").split(".")[0] for value in vars(loaded).values()}


class Screen(io.StringIO):
    """A terminal."""

    encoding = "utf-8"

    def isatty(self):
        return True


def streams(monkeypatch, encoding="utf-8"):
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors=how) for how in ("strict", "backslashreplace"))
    monkeypatch.setattr("sys.stdout", out)
    monkeypatch.setattr("sys.stderr", err)

    def written():
        out.flush()
        err.flush()
        return tuple(stream.buffer.getvalue().decode(encoding) for stream in (out, err))

    return written


def test_every_function_that_shows_something_is_tried():
    assert set(SHOWN) == set(SHOWING)


class Harmless:
    """The arguments of SHOWN without what is hostile in them."""

    def __getitem__(self, name):
        def arguments():
            with pytest.MonkeyPatch.context() as patch:
                patch.setitem(globals(), "HOSTILE", "")
                return SHOWN[name]()

        return arguments


HARMLESSLY = Harmless()


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "ascii"])
@pytest.mark.parametrize("name", SHOWN)
def test_text_is_shown_and_obeyed_by_nothing(monkeypatch, printer, name, encoding):
    show, arguments = SHOWING[name], SHOWN[name]()
    written = streams(monkeypatch, encoding)
    show(*arguments, False) if "as_json" in inspect.signature(show).parameters else show(*arguments)
    text = "".join(written())
    assert is_harmless(text)
    plain = re.sub(r"\s+", "", text)  # cells are wrapped
    if name not in ("show_models", "show_replay", "show_data"):  # where long cells are cut
        assert "\\x1b]52;c;" in plain and "[/red]" in plain
    if encoding == "utf-8" and name not in ("show_models", "show_replay", "show_data"):
        assert "👩\u200d🚀" in plain and "[bold]x[/]:smile:" in plain
    if name != "show_error":
        assert not re.search("^error:", text, re.M)


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize("name", [name for name in SHOWN if name not in ("show_report", "show_error")])
def test_json_says_the_same(monkeypatch, name, encoding):
    arguments = SHOWN[name]()
    written = streams(monkeypatch, encoding)
    SHOWING[name](*arguments, True)
    out, err = written()
    assert is_harmless(out + err)
    content = json.loads(out)
    if name in ("show_info", "show_kernels"):
        assert content == arguments[0].to_dict()
    if name != "show_data":
        assert any(HOSTILE.replace("\0", "") in text.replace("\0", "") for text in strings_of(content))


def strings_of(content):
    if isinstance(content, dict):
        content = [*content, *content.values()]
    return [content] if isinstance(content, str) else [s for x in content for s in strings_of(x)] if isinstance(
        content, list) else []  # fmt: skip


EVENTS = ("note", "warning", "plan", "clip", "job")  # and "run", of which a pipe is told every 15 s


def test_events_on_a_pipe(monkeypatch, printer):
    written = streams(monkeypatch)
    with progress.GenerateProgress() as show:
        for kind in EVENTS:
            show(Event(kind, HOSTILE, worker=1))
        show(Event("stage", "load", worker=1))
    text = "".join(written())
    assert is_harmless(text) and text.count("[/red]") == len(EVENTS) and text.count("🦊") == len(EVENTS)


def test_events_on_a_terminal(monkeypatch):
    """The live line is drawn by escape sequences, rich's own; nothing of a prompt is one."""
    screen = Screen()
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setattr(console, "stderr", console.Console(file=screen, force_terminal=True, width=300))
    with progress.GenerateProgress() as show:
        for kind in (*EVENTS, "run"):
            show(Event(kind, HOSTILE, about=HOSTILE))
            show(Event("stage", "denoise"))
            show._live.refresh()
    text = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", screen.getvalue()).replace("\r", "")
    assert is_harmless(text) and "denoising" in text and "[/red]" in text


WORDS = "".join(f"word{number} " for number in range(40)) + "/a/path/" + "of-many-letters/" * 8 + " and more words"


def shown(monkeypatch, columns, show):
    """The lines that a terminal of so many columns is given, on both streams."""
    screens = Screen(), Screen()
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "dumb")  # no colours
    monkeypatch.setattr("sys.stdout", screens[0])
    monkeypatch.setattr("sys.stderr", screens[1])
    show()
    return "".join(screen.getvalue() for screen in screens).splitlines()


@pytest.mark.parametrize("columns", [40, 60, 80])
@pytest.mark.parametrize("show", [console.show_error, console.note, console.log, console.write_sentence])
def test_messages_are_wrapped_between_words(monkeypatch, printer, columns, show):
    """A terminal broke them within a word; a path is left whole."""
    lines = shown(monkeypatch, columns, lambda: show(WORDS))
    words = " ".join(lines).split()
    assert words[-len(WORDS.split()) :] == WORDS.split()
    assert all(len(text) <= columns for text in lines if "/" not in text) and len(lines) > 300 // columns


@pytest.mark.parametrize("show", [console.show_error, console.note, console.log, console.write_sentence])
def test_messages_for_a_pipe_are_one_line(monkeypatch, printer, show):
    """So that grep finds them, however many columns a terminal has or COLUMNS says."""
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("FORCE_COLOR", "1")
    written = streams(monkeypatch)
    show(WORDS)
    assert "".join(written()).count("\n") == 1


@pytest.mark.parametrize("columns", [40, 60, 80])
@pytest.mark.parametrize("name", [name for name in SHOWN if name not in ("show_error", "show_data")])
def test_tables_are_whole_at_any_width(monkeypatch, printer, name, columns):
    """No line is longer than the terminal but for a word that is; nothing is left out, and no word is broken."""
    show, arguments = SHOWING[name], HARMLESSLY[name]()
    arguments += [False] if "as_json" in inspect.signature(show).parameters else []
    lines = shown(monkeypatch, columns, lambda: show(*arguments))
    whole = shown(monkeypatch, 1000, lambda: show(*arguments))
    assert set(" ".join(lines).split()) == set(" ".join(whole).split())
    for text in lines:
        assert len(text) <= columns or max(map(len, text.split())) > columns - 2, (text, lines)


@pytest.mark.parametrize("columns", [40, 60, 80, 200])
def test_help_is_wrapped_between_words(monkeypatch, columns):
    """It broke turbowan2.1-t2v-1.3b-480p at 40 columns, and tiny-wan at 100."""
    group = typer.main.get_command(app)

    def texts(width):
        monkeypatch.setenv("COLUMNS", str(width))
        return [command.get_help(typer.Context(command, info_name=path[-1])) for path, command in commands(group)]

    for text, wide in zip(texts(columns), texts(1000), strict=True):
        assert text.split() == wide.split()
        for row in text.splitlines():
            assert len(row) <= columns or len(row.split()) == 1, row


def commands(group, path=()):
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        yield (*path, name), command


ARGUMENTS = {
    ("generate",): ["x"], ("batch",): ["f.txt"], ("plan",): ["x"], ("bench",): [], ("models",): [],
    ("info",): ["none"], ("replay",): ["none"], ("convert",): ["none", "b"], ("doctor",): ["--selftest"],
    ("merge",): ["none", "b.safetensors", "--diff-base", "c", "--diff-target", "d"], ("finetune",): ["--data", "d"],
    ("finetune", "data"): ["d", "-o", "o"], ("decode",): ["none"], ("methods",): [], ("report",): ["none"],
    ("compare",): ["x"], ("attention",): ["x"], ("tune",): [],
}  # fmt: skip
TASKS = (
    "generation.generate.generate", "generation.decode.decode", "batch.run.batch", "batch.ray_workers.batch_on_ray",
    "training.finetune.finetune", "training.data.prepare.prepare", "benchmark.run.bench", "doctor.selftest.selftest",
    "generation.replay.replay", "generation.pages.write_page", "comparison.run.compare", "maps.run.draw",
    "tuning.run.tune",
)  # fmt: skip
CHECKS = (  # of what lies at the paths of a command line, before its task
    "generation.preflight.check_run", "generation.preflight.check_model", "batch.preflight.read_batch",
    "training.preflight.check_training", "training.preflight.check_data", "generation.provenance.needed_all_of_torch",
    "generation.latents.read_about",
)  # fmt: skip


def texts_in(value):
    parts = vars(value).values() if hasattr(value, "__dict__") else value if isinstance(value, tuple) else ()
    return [str(value)] if isinstance(value, str | Path) else [text for part in parts for text in texts_in(part)]


def replace_tasks(monkeypatch, hostile):
    """Have each of TASKS fail, and tell all that it was given. Returns the set of those that hostile text came to."""
    reached = set()

    def failing(task):
        def fail(*arguments, **options):
            told = "; ".join(text for value in (*arguments, *options.values()) for text in texts_in(value))
            if hostile[:20] in told:
                reached.add(task)
            raise SlagenError(told)

        return fail

    for task in TASKS:
        monkeypatch.setattr(f"slagen.{task}", failing(task))
    return reached


@pytest.mark.parametrize("checked", [True, False], ids=["checks", "tasks"])
@pytest.mark.parametrize("hostile", [HOSTILE.replace("\0", ""), "y" * 5000], ids=["hostile", "long"])
def test_every_argument_of_every_command(tmp_path, monkeypatch, hostile, checked):
    """One message with at most a line of the argument, whatever it is and whoever refuses it, a check or the task."""
    reached = replace_tasks(monkeypatch, hostile)
    for check in () if checked else CHECKS:
        monkeypatch.setattr(f"slagen.{check}", lambda *arguments, **options: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.chdir(tmp_path)
    every, seen, tried = 1 if os.environ.get("SLAGEN_SOAK_ARGUMENTS") else 12, 0, 0
    for path, command in commands(typer.main.get_command(app)):
        places = [parameter for parameter in command.params if parameter.param_type_name == "argument"]
        for parameter in command.params:
            seen += 1
            if seen % every and parameter not in places and parameter.name not in ("model", "ray_address"):
                continue
            words = list(ARGUMENTS[path])
            if parameter in places:
                words[places.index(parameter) : places.index(parameter) + 1] = [hostile]
            else:
                is_flag = getattr(parameter, "is_flag", False)
                words += [f"{parameter.opts[0]}={hostile}"] if is_flag else [parameter.opts[0], hostile]
            written = streams(monkeypatch)
            code = run([*path, *words])
            text = "".join(written())
            where = (path, parameter.opts, text[:500])
            assert code in (0, 1, 2, 4, 5) and is_harmless(text) and "a bug in slagen" not in text, where
            if code:
                assert len(text) < 1200 and text.count("\n") == 1 and text.startswith("error: "), where
            tried += 1
    assert tried >= 20 and (checked or reached == set(TASKS) - {"doctor.selftest.selftest"})  # which takes no text


def test_tracebacks(monkeypatch):
    def fail(config, on_event):
        raise SlagenError(HOSTILE)

    monkeypatch.setattr("slagen.generation.generate.generate", fail)
    monkeypatch.setenv("SLAGEN_DEBUG", "1")
    written = streams(monkeypatch)
    assert run(["generate", "x"]) == 1
    assert is_harmless(written()[1]) and "Traceback" in written()[1]
