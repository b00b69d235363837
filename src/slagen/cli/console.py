"""What the user sees: progress and notes on stderr, results on stdout. The only file that prints."""

from __future__ import annotations

import json
import sys
import textwrap
import time
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from slagen.cli import plain
from slagen.errors import STAGE
from slagen.io.text import counted, encodable, escaped, line, message, to_json

if TYPE_CHECKING or find_spec("rich") is not None:
    from rich.console import Console as RichConsole
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
    from rich.table import Table as RichTable
    from rich.text import Text

    class Console(RichConsole):
        """Shows every string as it is: nothing in it is markup, nothing of it is obeyed by the terminal."""

        def __init__(self, **options: Any) -> None:
            super().__init__(markup=False, highlight=False, emoji=False, **options)

        def render_str(self, text: str, **options: Any) -> Text:
            return super().render_str(encodable(escaped(text), self.encoding), **options)

    class Table(RichTable):
        """Columns without lines; a cell is one line unless it is a Text, and is folded where it is too wide."""

        def __init__(self, **options: Any) -> None:
            super().__init__(box=None, pad_edge=False, header_style="dim", **options)

        def add_column(self, *header: Any, **options: Any) -> None:
            super().add_column(*header, overflow="fold", **options)

        def add_row(self, *cells: Any, **options: Any) -> None:
            while len(self.columns) < len(cells):
                self.add_column()
            super().add_row(*(cell if isinstance(cell, Text) else line(cell) for cell in cells), **options)

else:
    from slagen.cli.plain import (
        BarColumn,
        Console,
        MofNCompleteColumn,
        Progress,
        Table,
        TaskID,
        Text,
        TextColumn,
        TimeElapsedColumn,
    )

STAGES = {
    "hash": "reading the weights' hashes",
    "load": "loading the model",
    "text": "reading the prompt",
    "measure": "measuring",
    "denoise": "denoising",
    "decode": "decoding",
    "write": "writing",
    "train": "training",
}

LINE_S = 15.0  # between lines on what goes on, where there is no terminal

stderr = Console(stderr=True)


class GenerateProgress:
    """Shows a run's events: a live line on a terminal, plain lines of notes elsewhere."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[detail]}", markup=False),
            console=stderr,
            transient=True,
            disable=not stderr.is_terminal,
        )
        self._tasks: dict[int, TaskID] = {}  # by worker
        self._jobs: dict[int, str] = {}
        self._last_line = 0.0
        self._stage = "starting"

    def __enter__(self) -> GenerateProgress:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
        if error is not None:
            error.add_note(f"{STAGE}{self._stage}")

    def __call__(self, event: Any) -> None:
        """Show one `slagen.generation.generate.Event`, or a `slagen.training.finetune.Progress`."""
        if not hasattr(event, "kind"):
            self._show_step(event)
        elif event.kind in ("note", "warning"):
            _say(event.kind, "yellow" if event.kind == "warning" else "dim", event.text)
        elif event.kind == "plan":
            _tell(event.text)
        elif event.kind == "clip":
            self._stage = "preparing clips"
            self._show_stage(0, event.text, None)
            if not stderr.is_terminal and time.monotonic() - self._last_line > LINE_S:
                self._last_line = time.monotonic()
                _tell(event.text)
        elif event.kind == "job":
            who = f"worker {event.worker}: " if event.worker else ""
            self._jobs[event.worker] = who + event.text
            if not stderr.is_terminal:
                _tell(self._jobs[event.worker])
        elif event.kind == "stage":
            self._stage = STAGES[event.text]
            text = f"{self._jobs.get(event.worker, '')} {self._stage}".strip()
            self._show_stage(event.worker, text, event.num_steps or None)
        elif event.kind == "step" and event.worker in self._tasks:
            step = event.step
            detail = f"step {step.latency_ms:.0f} ms" if step.latency_ms is not None else ""
            if step.attention_share is not None:
                detail += f", attention {step.attention_share:.0%}"
            self._progress.update(self._tasks[event.worker], completed=step.index + 1, detail=detail)

    def _show_stage(self, worker: int, text: str, total: int | None) -> None:
        if worker in self._tasks:
            self._progress.remove_task(self._tasks[worker])
        self._tasks[worker] = self._progress.add_task(line(text), total=total, detail="")

    def _show_step(self, step: Any) -> None:
        """A training's step: live on a terminal, one line in twenty elsewhere."""
        error = "" if step.error is None else f", error to the teacher {step.error:.4f}"
        norms = step.proj_norms
        projections = f", proj_l {min(norms):.3g} to {max(norms):.3g}" if norms else ""
        detail = (
            f"loss {step.loss:.4e}{error}, gradient {step.grad_norm:.3e}{projections}, "
            f"{step.tokens_per_s:,.0f} tokens/s, {step.memory_gib:.1f} GiB, {step.left_s / 60:.1f} min left"
        )
        if -1 not in self._tasks:
            self._show_stage(-1, "training", step.steps)
        self._progress.update(self._tasks[-1], completed=step.step, detail=detail)
        if not stderr.is_terminal and (step.step % 20 == 0 or step.step in (1, step.steps)):
            _tell(f"step {step.step} of {step.steps}: {detail}")


def show_finetune(result: Any, as_json: bool) -> None:
    """Print what a training came to: the weights' path on stdout and the rest on stderr, or JSON alone."""
    if as_json:
        content = {
            name: value if isinstance(value, int | float) else str(value) for name, value in vars(result).items()
        }
        write_json(content)
        return
    before, after = result.teacher_error_before, result.teacher_error_after
    _tell(f"error to the dense teacher on held-out clips: {before:.4f} before, {after:.4f} after")
    _tell(f"curves and clips: {result.page}")
    write(str(result.weights))


def show_data(data: Any, as_json: bool) -> None:
    """Print what a prepared set holds: its folder on stdout and counts on stderr, or JSON alone."""
    counts = {"training": len(data.training), "held_out": len(data.held_out)}
    if as_json:
        write_json({"folder": str(data.folder), "hash": data.hash, **counts})
        return
    stderr.print(f"{counted(counts['training'], 'clip')} to train on, {counts['held_out']} held out")
    write(str(data.folder))


def show_videos(result: Any, as_json: bool) -> None:
    """Print what `generate` made: tables on stderr and one path a line on stdout, or JSON alone on stdout."""
    if as_json:
        rows = [{"video": str(v.path), "report": str(v.report_path), **v.report} for v in result.videos]
        write_json(rows if len(rows) > 1 else rows[0])
        return
    for video in result.videos:
        show_report(video.report)
        write(str(video.path))


def show_batch(result: Any, as_json: bool) -> None:
    """Print what `batch` made: one path a line on stdout and counts on stderr, or JSON alone on stdout."""
    if as_json:
        content = {**vars(result), "folder": str(result.folder), "page": result.page and str(result.page)}
        content["failed"] = [{"video": name, "reason": reason} for name, reason in result.failed]
        write_json(content)
        return
    for name in result.made:
        write(str(result.folder / name))
    for name, reason in result.failed:
        _say("failed", "bold red", f"{name}: {reason}")
    if result.page is not None:
        _tell(f"all of them: {result.page}")
    elsewhere = f", {len(result.elsewhere)} by another process" if result.elsewhere else ""
    _tell(f"{len(result.made)} made{elsewhere}, {len(result.kept)} were there, {len(result.failed)} failed")


def show_report(content: dict[str, Any]) -> None:
    """A report as a table of steps, and lines for the totals, on stderr."""
    attention, cost, stages = content["attention"], content["cost"], content["stages_s"]
    if content["timing"]["level"] != "off":
        stderr.print(_step_table(content["steps"]))
    what = f"{attention['mode']} attention, {counted(attention['tokens'], 'token')}"
    if "critical" in attention:
        fractions = attention["fractions"]
        what += (
            f", {counted(attention['key_blocks'], 'key block')} of {attention['block_n']}: "
            f"{attention['critical']} critical ({fractions['critical']:.1%}), "
            f"{attention['marginal']} marginal, {attention['negligible']} negligible; {attention['backend']} backend"
        )
    _tell(what)
    _tell(f"weights: {content['weights']['used']}, model {content['weights']['model']}")
    _tell(
        f"attention FLOPs: {cost['attention_tflop']:.3g} T instead of {cost['dense_attention_tflop']:.3g} T dense; "
        f"forward {cost['flops_speedup']:.2f}x fewer, {cost['achieved_share_of_ceiling']:.0%} of the "
        f"{cost['amdahl_ceiling']:.2f}x limit (Amdahl)"
    )
    if cost["measured_attention_share"] is not None:
        _tell(
            f"attention time: {cost['measured_attention_share']:.1%} of the steps; timing itself cost "
            f"{content['timing']['overhead_share']:.2%}"
        )
    spent = ", ".join(f"{name} {seconds:.1f}" for name, seconds in stages.items())
    _tell(f"seconds: {spent}; peak memory {content['peak_memory_gib']:.2f} GiB")
    _tell(f"seed {content['settings']['seed']}, latents {content['latents_hash'][:12]}")


def note(text: str) -> None:
    """A line about what is going on, on stderr."""
    _say("note", "dim", text)


def show_bench(result: Any, as_json: bool) -> None:
    """Print what `bench` measured: tables on stdout that fit 80 columns, or JSON alone."""
    content = result.content
    if as_json:
        write_json(content, allow_nan=False)
        return
    about = content["machine"]
    write(f"{about['name']}: matmul {about['matmul_tflops']:.3g} TFLOP/s, copy {about['copy_gb_s']:.3g} GB/s")
    for heading, columns, rows, below in result.short_tables:
        table = plain.Table()
        used = [index for index, name in enumerate(columns) if any(row[index] for row in rows)]
        for index in used:
            table.add_column(columns[index])
        for row in rows:
            table.add_row(*(row[index] for index in used))
        _put("")
        write(heading)
        write_table(table)
        for text in below:
            _write_sentence(text)
    if result.short_tables:
        _put("")
        write("Times are medians; their quartiles and repeats are in the files and in --json.")
    for verdict in result.verdicts:
        _write_sentence(verdict)
    for path in result.files:
        write(str(path))


def show_findings(findings: list[Any], as_json: bool) -> None:
    """Print what `doctor` found: a table on stdout, or JSON alone."""
    if as_json:
        write_json({"findings": [vars(finding) for finding in findings]})
        return
    colours = {"ok": "green", "note": "yellow", "problem": "bold red"}
    table = _table(show_header=False)
    for finding in findings:
        status = Text(finding.status, colours[finding.status])
        found = "\n".join(line(text) for text in (finding.found, finding.fix) if text)
        table.add_row(status, finding.name, _text(found))
    write_table(table)


def show_selftest(content: dict[str, Any], path: Path, as_json: bool) -> None:
    """Print what `doctor --selftest` tried: a table and the file on stdout, or JSON alone.

    Checks of one backend and dtype that end alike are one line of the table.
    """
    if as_json:
        write_json(content)
        note(f"also in {path}")
        return
    colours = {"ok": "green", "missing": "yellow", "failed": "bold red"}
    table = _table(show_header=False)
    for (name, status, detail), found in groupby(content["checks"], _end_of_check):
        checks = list(found)
        several = len(checks) > 1
        seconds = f"{sum(check['seconds'] for check in checks):.1f} s"
        said = f"{len(checks)} checks: {detail}" if several else detail
        table.add_row(Text(status, colours[status]), name if several else checks[0]["name"], seconds, said)
    write_table(table)
    write(str(path))


def _end_of_check(check: dict[str, Any]) -> tuple[str, str, str]:
    """The backend and dtype, or what else was tried, and how that ended."""
    return check["name"].partition(",")[0], check["status"], check["detail"]


MAIN_KERNELS = ("attend", "attend-128", "key-states", "dq", "dkv", "select")  # at heads of 128


def show_kernels(content: dict[str, Any], as_json: bool) -> None:
    """Print what the kernels cost on each card: tables on stdout that fit 80 columns, or JSON alone, a kernel a line.

    A table has the main kernels of one card, and those that break a limit; "at once" are the programs that a
    multiprocessor holds, "copies in flight" the groups of copies during the products.
    """
    if as_json:
        about = {name: value for name, value in content.items() if name != "kernels"}
        rows = ",\n".join(map(_json, content["kernels"]))
        _put(f'{_json(about)[:-1]}, "kernels": [\n{rows}\n]}}')
        return
    shown = 0
    targets: dict[str, list[dict[str, Any]]] = {}
    for row in content["kernels"]:
        targets.setdefault(row["target"], []).append(row)
    for target, compiled in targets.items():
        main = [row for row in compiled if row["kernel"] in MAIN_KERNELS and row["head_dim"] == 128]
        broken = [row for row in compiled if row["faults"]]
        others = [row for row in broken if row not in main]
        shown += len(main) + len(others)
        _put("")
        write(f"{target}, {compiled[0]['shared_limit'] // 1024} KiB of shared memory")
        for part in (main, *(others[i : i + 3] for i in range(0, len(others), 3))):
            if part:
                write_table(_kernel_table(part))
        for row in broken:
            _write_sentence(f"{row['kernel']}, D = {row['head_dim']}: {'; '.join(row['faults'])}")
    _put("")
    _write_sentence(
        f"{shown} of {len(content['kernels'])} kernels are shown: the main ones at heads of 128, and those that break "
        "a limit. --json has all of them."
    )
    _show_operator(content["operator"])


def _kernel_table(rows: list[dict[str, Any]]) -> plain.Table:
    """A column for each kernel, a line for each thing that it costs."""
    table = plain.Table()
    table.add_column()
    for row in rows:
        table.add_column(line(row["kernel"]), justify="right")
    values = {
        "D": [row["head_dim"] for row in rows],
        "tile": [f"{row['config']['tile_m']}x{row['config']['tile_n']}" if "tile_m" in row["config"] else ""
                 for row in rows],
        "warps": [row["config"]["num_warps"] for row in rows],
        "stages": [row["config"]["num_stages"] for row in rows],
        "shared KiB": [f"{row['shared_bytes'] / 1024:.0f}" for row in rows],
        "registers": [row["registers"] for row in rows],
        "spilled bytes": [row["spill_bytes"] for row in rows],
        "tensor cores": [row["mma"] or "" for row in rows],
        "at once": [row["programs_per_sm"] for row in rows],
        "instructions": [row["instructions"] for row in rows],
        "of a round": [row["round_instructions"] or "" for row in rows],
        "of a row": [row["row_instructions"] or "" for row in rows],
        "copies in flight": [row["copies_in_flight"] for row in rows],
    }  # fmt: skip
    for name, cells in values.items():
        if any(cell != "" for cell in cells):
            table.add_row(name, *cells)
    return table


def _show_operator(operator: dict[str, Any]) -> None:
    """One call of the operator: its launches, and the bounds of each kernel."""
    _put("")
    _write_sentence(
        f"one call at {operator['shape']}, {operator['dtype']}, sparsity {operator['sparsity']:g}, domain "
        f"{operator['linear_domain']}: {operator['launches']} launches, {operator['estimate_ms']['total']:.2f} ms "
        f"on one {operator['card']} (estimated, not measured)"
    )
    table = plain.Table()
    table.add_column("kernel")
    for name in ("launches", "tensor ms", "issue ms", "L2 ms", "DRAM ms", "estimate ms"):
        table.add_column(name, justify="right")
    for name, row in operator["bounds_ms"].items():
        times = (row[bound] for bound in ("tensor", "issue", "l2", "dram", "estimate"))
        table.add_row(name, row["launches"], *(f"{time:.3f}" for time in times))
    write_table(table)


def _kept(settings: dict[str, Any]) -> str:
    """How it was said how many blocks are kept."""
    if settings["sla_topk"] is None:
        return f"sparsity {settings['sparsity']:g}"
    return f"sla-topk {settings['sla_topk']:g}"


def show_plan(content: dict[str, Any], as_json: bool) -> None:
    """Print what a run will be: a table on stdout, or JSON alone."""
    if as_json:
        write_json(content)
        return
    settings, memory = content["settings"], content["memory_gib"]
    tera = {name: flops / 1e12 for name, flops in content["flops"].items()}
    tail = f", the last with {counted(content['tail_tokens'], 'token')}" if content["tail_tokens"] else ""
    blocks = (
        ""
        if content["key_blocks"] is None
        else (
            f": {counted(content['query_blocks'], 'query block')} of {settings['block_m']}, "
            f"{counted(content['key_blocks'], 'key block')} of {settings['block_n']}{tail}"
        )
    )
    of = "SLA" if content["flops_of"] == "sla" else content["flops_of"]
    rows = [
        ("model", content["model"]),
        ("video", f"{settings['width']}x{settings['height']}, {counted(settings['num_frames'], 'frame')}, "
                  f"{settings['fps']} fps"),
        ("sampling", f"{counted(settings['steps'], 'step')} of {settings['sampler']}, "
                     f"guidance {settings['guidance_scale']:g}: "
                     f"{counted(content['forward_passes'], 'forward pass')}"),
        ("tokens", f"{content['tokens']}{blocks}"),
        ("attention", _planned_attention(content)),
        ("TFLOP a forward", f"dense {tera['dense_forward']:.1f} (attention {tera['dense_attention']:.1f}), "
                            f"{of} {tera['sla_forward']:.1f} (attention {tera['sla_attention']:.1f})"),
        ("fewer FLOPs", f"{content['flops_speedup']:.2f}x; free attention would be {content['amdahl_ceiling']:.2f}x "
                        "(Amdahl)"),
        *_memory_rows(content["device"], memory),
        *[("download", f"{row['repository']}, about {row['gib']:.1f} GiB unless here") for row in content["downloads"]],
        *[("output", name) for name in content["outputs"]],
    ]  # fmt: skip
    table = _table(show_header=False)
    for name, text in rows:
        table.add_row(Text(name, "dim"), text)
    write_table(table)
    for text in content["notes"]:
        note(text)


def _planned_attention(content: dict[str, Any]) -> str:
    """What a plan says is kept of all query-key pairs."""
    settings = content["settings"]
    if settings["attention"] == "dense":
        return "dense: every key block"
    if content["topk_blocks"] is None:
        return f"{settings['attention']}: {content['kept_fraction']:.2%} of all query-key pairs exactly"
    return (
        f"{_kept(settings)} -> top-k {content['topk_blocks']} of {counted(content['key_blocks'], 'key block')} "
        f"(kept {content['kept_fraction']:.2%})"
    )


def _memory_rows(device: str | None, memory: dict[str, Any]) -> list[tuple[str, str]]:
    """What a plan says of memory: of the machine's own where it runs on a CPU, of a card's, or of both."""
    cpu = memory["cpu"]
    on_cpu = f"about {cpu['peak']:.1f} GiB of RAM on a CPU, where {cpu['left']:.1f} GiB is left"
    if device == "cpu":
        stages = (
            f"weights {cpu['weights']:.1f}, denoise + {cpu['denoise']:.1f}, decode + {cpu['decode']:.1f} (estimates)"
        )
        return [("memory", on_cpu), ("by stage, GiB", stages)]
    parts = memory["stages"].items()
    stages = ", ".join(f"{name} {stage['weights']:.1f} + {stage['activations']:.1f}" for name, stage in parts)
    on_card = (
        f"about {memory['gpu_peak_all_resident']:.1f} GiB on {'the' if device else 'a'} GPU with all parts there, "
        f"{memory['gpu_peak_offloaded']:.1f} one at a time; host {memory['host']:.1f}"
    )
    rows = [("memory", on_card), ("by stage, GiB", f"weights + activations: {stages} (estimates)")]
    return rows if device is not None else [("memory", on_cpu), ("", on_card), *rows[1:]]


def show_models(rows: list[dict[str, Any]], as_json: bool) -> None:
    """Print the presets: a table on stdout, or JSON alone."""
    if as_json:
        write_json(rows)
        return
    table = _table(show_header=False)
    for row in rows:
        sampler = f"{row['steps']} x {row['sampler']}"
        sampler += "" if row["flow_shift"] is None else f", shift {row['flow_shift']:g}"
        sla = row["sla"]
        said = [f"{row['size']}, {counted(row['num_frames'], 'frame')}; {sampler}, guidance {row['guidance_scale']:g}"]
        if sla is not None:
            said.append(f"SLA trained at sparsity {sla['sparsity']:g}, blocks {sla['block_m']}x{sla['block_n']}")
        said.append(f"from {row['weights'] or row['base'] or 'this installation'}")
        table.add_row(row["name"], _text("\n".join(map(line, said))))
    write_table(table)


def show_methods(rows: list[dict[str, Any]], as_json: bool) -> None:
    """Print the attention methods: a table on stdout, or JSON alone."""
    if as_json:
        write_json(rows)
        return
    table = _table(show_header=False)
    for row in rows:
        known = {"needs_training": "training", "needs_weights": "weights", "needs_gpu": "a CUDA device"}
        needs = [text for name, text in known.items() if row[name]]
        options = ", ".join(f"{name} {value}" for name, value in row["options"].items())
        said = [row["summary"], f"needs {' and '.join(needs) or 'nothing'}"]
        said += [f"options: {options}"] if options else []
        if len(row["backends"]) > 1:
            said.append(f"backends: {', '.join(row['backends'])}")
        wrapped = [part for text in said for part in textwrap.wrap(line(text), 70, break_on_hyphens=False)]
        table.add_row(row["name"], _text("\n".join(wrapped)))
    write_table(table)


def show_info(content: dict[str, Any], as_json: bool) -> None:
    """Print what a weight file is: a table on stdout, or JSON alone."""
    if as_json:
        write_json(content)
        return
    table = _table(show_header=False)
    _add_rows(table, content, "")
    write_table(table)


def show_replay(content: dict[str, Any], as_json: bool) -> None:
    """Print whether a video came out the same: a table on stdout, or JSON alone."""
    if as_json:
        write_json(content)
        return
    table = _table()
    for name in ("", "before", "now", ""):
        table.add_column(name)
    for name, row in content["hashes"].items():
        table.add_row(
            name,
            str(row["before"])[:16],
            str(row["now"])[:16],
            "same" if row["same"] else Text("different", "bold red"),
        )
    for name, (before, now) in content["versions_changed"].items():
        table.add_row(name, str(before), str(now), "changed")
    write_table(table)


def _add_rows(table: Any, content: dict[str, Any], prefix: str) -> None:
    for name, value in content.items():
        if isinstance(value, dict):
            _add_rows(table, value, f"{prefix}{name}.")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            table.add_row(_key(prefix + name), f"{counted(len(value), 'item')} (--json shows them)")
        elif name == "proj_l_norms":
            norms = ", ".join(f"{norm:.3g}" for norm in value) or "none"
            table.add_row(_key(f"{prefix}proj_l norms by layer"), norms)
        else:
            plain = isinstance(value, bool) or not isinstance(value, int) or name == "seed"  # a seed is typed again
            text = str(value) if plain else f"{value:,}"
            table.add_row(_key(prefix + name), text)


def show_error(text: str) -> None:
    """One message on stderr, prefixed so that it is found in a log; it may have several lines."""
    stderr.print(Text("error:", "bold red"), message(text), soft_wrap=True)


def _say(kind: str, style: str, text: str) -> None:
    """A message of one kind, on one line of stderr."""
    stderr.print(Text(f"{kind}:", style), line(message(text)), soft_wrap=True)


def _tell(text: str) -> None:
    """One line on stderr."""
    stderr.print(line(text), soft_wrap=True)


def write(text: str) -> None:
    """One line of result on stdout."""
    _put(line(text))


def write_json(content: Any, **options: Any) -> None:
    """JSON on stdout, exactly the content when it is read."""
    _put(_json(content, indent=2, **options))


def _json(content: Any, **options: Any) -> str:
    """JSON that stdout takes: in ASCII where it does not take the rest."""
    text = to_json(content, exact=True, **options)
    return text if encodable(text, sys.stdout.encoding) == text else json.dumps(content, **options)


def _put(text: str) -> None:
    sys.stdout.write(encodable(text, sys.stdout.encoding) + "\n")
    sys.stdout.flush()


def _key(text: str) -> Text:
    return _text(line(text), "dim")


def _text(text: str, style: str = "") -> Text:
    """Text in a style, for stdout; it is escaped already."""
    return Text(encodable(text, sys.stdout.encoding), style)


def _table(show_header: bool = True) -> Any:
    """A table that wraps where stdout is a terminal; elsewhere a plain one, without blanks at the ends of its lines."""
    kind = Table if Console().is_terminal else plain.Table
    return kind(show_header=show_header)


def _write_sentence(text: str) -> None:
    """A line on stdout, which a terminal gets broken between words."""
    out = Console()
    if out.is_terminal:
        out.print(line(text))
    else:
        write(text)


def write_table(table: Any) -> None:
    """A table on stdout. A plain one is as wide as its text: nothing of it is cut, however narrow a terminal is."""
    if isinstance(table, plain.Table):
        _put(str(table))
    else:
        Console().print(table)


def _step_table(steps: list[dict[str, Any]]) -> Table:
    table = Table()
    for name in ("step", "timestep", "step ms", "attention ms", "cond", "uncond", "share"):
        table.add_column(name, justify="right")
    shown = steps if len(steps) <= 12 else [*steps[:6], *steps[-5:]]
    for step in shown:
        if len(steps) > 12 and step is steps[-5]:
            table.add_row("...")
        table.add_row(
            str(step["step"] + 1), f"{step['timestep']:g}", _ms(step["latency_ms"]), _ms(step["attention_ms"]),
            _ms(step["attention_conditional_ms"]), _ms(step["attention_unconditional_ms"]),
            "" if step["attention_share"] is None else f"{step['attention_share']:.0%}",
        )  # fmt: skip
    return table


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"
