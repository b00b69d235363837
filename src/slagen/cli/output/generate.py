"""What `generate`, `decode` and `replay` print: a report's steps and totals, paths, and a comparison."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from slagen.attention.choices import named_steps
from slagen.cli.console import log, log_table, stdout_is_terminal, write, write_json, write_sentence, write_table
from slagen.cli.table import Cell, Table
from slagen.generation.cache_use import describe_use
from slagen.generation.measured_dense import describe_dense
from slagen.io.text import counted

if TYPE_CHECKING:
    from slagen.generation.replay import ReplayResult
    from slagen.generation.result import GenerateResult
    from slagen.generation.video_report import VideoReport

SHORTEST_S = 0.05  # of a stage that is named
MAX_DENSITIES = 4  # of steps, in one line


def show_videos(result: GenerateResult, as_json: bool, verbose: bool = False) -> None:
    """Print what `generate` made: its path on stdout and a few lines on stderr, or JSON alone on stdout.

    Args:
        verbose: print each report's table and totals too.
    Of several processes, the first has the videos, and the others print nothing.
    """
    if not result.videos:
        return
    if as_json:
        rows = [{"video": str(v.path), "report": str(v.report_path), **v.record.to_dict()} for v in result.videos]
        write_json(rows if len(rows) > 1 else rows[0])
        return
    for video in result.videos:
        if verbose:
            show_report(video.record)
        about = described_video(video.record, video.path)
        if stdout_is_terminal():
            write_sentence(f"{video.path}: {about}")
        else:
            write(str(video.path))
            log(f"{video.path}: {about}")
        for text in () if verbose else measured_first(video.record):
            log(text)
        log(described_times(video.record))
        for text in () if verbose else described_processes(video.record):
            log(text)
    file = shlex.quote(str(result.videos[-1].path))
    log(f"Details: slagen info {file}. To make it again: slagen replay {file}")


def described_video(report: VideoReport, path: Path | None) -> str:
    """Length, size and seed of a video."""
    video = report.video
    length = f"{counted(video.frames, 'frame')}, {video.duration_s:.1f} s of {video.width}x{video.height}"
    there = path is not None and path.is_file()
    size = "" if path is None or not there else f", {_size(path.stat().st_size)}"
    return f"{length}{size}, seed {report.settings['seed']}"


def _size(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.0f} KiB"


def described_times(report: VideoReport) -> str:
    """Seconds by stage, with the share of attention as measured."""
    share = report.cost.measured_attention_share
    stages = {name: seconds for name, seconds in report.stages_s.items() if name != "total"}
    parts = []
    for name, seconds in stages.items():
        if name == "denoise" and share is not None:
            parts.append(f"denoise {seconds:.1f} (measured: {share:.0%} attention)")
        elif seconds >= SHORTEST_S:
            parts.append(f"{name} {seconds:.1f}")
    known = "; the prompt was known, so no text encoder was loaded" if report.weights.cached_prompt else ""
    return f"{sum(stages.values()):.1f} s: {', '.join(parts)}{known}"


def described_processes(report: VideoReport) -> list[str]:
    """What several processes shared, and what communication took; empty for one process."""
    processes = report.processes
    if processes is None:
        return []
    ranks = processes.ranks
    passes = ", the two passes of guidance in one half of them each" if processes.cfg_parallel else ""
    heads = f", {counted(ranks[0].heads, 'head')} and {ranks[0].tokens:,} of {report.attention.tokens:,} tokens each"
    shares = [r.communication_ms / r.denoise_ms for r in ranks if r.communication_ms is not None and r.denoise_ms]
    took = f"; measured: communication and waiting took {min(shares):.0%} to {max(shares):.0%}" if shares else ""
    return [f"{counted(len(ranks), 'process')} ({processes.backend}){passes}{heads}{took}"]


def measured_first(report: VideoReport) -> list[str]:
    """The measured speed-up over dense attention, which stands before all else; empty where it was not measured."""
    return [] if report.measured_dense is None else [describe_dense(report.measured_dense)]


def show_report(report: VideoReport) -> None:
    """A report as a table of steps, and lines for the totals, on stderr."""
    for text in measured_first(report):
        log(text)
    if report.timing.level != "off":
        log_table(step_table(report))
    for text in totals(report):
        log(text)


def write_report(report: VideoReport) -> None:
    """The same on stdout."""
    for text in measured_first(report):
        write_sentence(text)
    if report.timing.level != "off":
        write_table(step_table(report))
    for text in totals(report):
        write_sentence(text)


def totals(report: VideoReport) -> list[str]:
    """Sentences on what attended, and what a run took in all."""
    attention, cost = report.attention, report.cost
    what = f"{attention.mode} attention, {counted(attention.tokens, 'token')}"
    if by_step := attention.step_densities:
        what += f", {_by_step(by_step)} of all query-key pairs exactly; {attention.backend} backend"
    elif (blocks := attention.blocks) is not None:
        what += (
            f", {counted(blocks.key_blocks, 'key block')} of {counted(blocks.block_n, 'token')}: "
            f"{blocks.critical:g} critical ({blocks.critical_share:.1%}), "
            f"{blocks.marginal:g} marginal, {blocks.negligible:g} negligible; {attention.backend} backend"
        )
    elif attention.density is not None:
        what += f", {attention.density:.1%} of all query-key pairs attended exactly; {attention.backend} backend"
    if report.settings.get("compile"):
        what += "; compiled blocks"
    if "delta" in attention.method:
        what += f"; one query row in {attention.method['delta']} attended exactly (delta)"
    for name in ("steps", "layers"):
        if places := attention.method.get(f"dense_{name}"):
            noun = name if len(places) > 1 else name.removesuffix("s")
            what += f"; dense attention in {noun} {', '.join(map(str, places))}"
    loras = "".join(f", LoRA {lora.file} at scale {lora.scale:g}" for lora in report.weights.loras or ())
    lines = [what, f"weights: {report.weights.used}, model {report.weights.model}{loras}"]
    if attention.mode != "dense":
        lines.append(
            f"computed, not measured: attention takes {cost.attention_tflop:.3g} TFLOP instead of "
            f"{cost.dense_attention_tflop:.3g} with dense attention, so all forward passes take "
            f"{cost.flops_speedup:.2f}x fewer FLOPs; with free attention it would be {cost.amdahl_ceiling:.2f}x"
        )
    if report.cache is not None:
        lines.append(describe_use(report.cache))
    if cost.measured_attention_share is not None:
        lines.append(
            f"attention time: {cost.measured_attention_share:.1%} of the step time; the overhead of timing is "
            f"{report.timing.overhead_share:.2%}"
        )
    spent = ", ".join(f"{name} {seconds:.1f}" for name, seconds in report.stages_s.items())
    spent += " (no text encoder was loaded: the prompt was known)" if report.weights.cached_prompt else ""
    lines.append(f"time in seconds: {spent}; peak memory {report.peak_memory_gib:.2f} GiB")
    lines += described_processes(report)
    lines.append(f"seed {report.settings['seed']}, hash of the latents {report.latents_hash[:12]}")
    return lines


def _by_step(densities: list[float]) -> str:
    """The densities of the steps: "20.0% in steps 0-9, 5.0% in step 10"; of many different ones their range."""
    steps: dict[str, list[int]] = {}
    for step, density in enumerate(densities):
        steps.setdefault(f"{density:.1%}", []).append(step)
    if len(steps) > MAX_DENSITIES:
        return f"{min(densities):.1%} to {max(densities):.1%}, {sum(densities) / len(densities):.1%} on average,"
    return ", ".join(f"{density} in {named_steps(own)}" for density, own in steps.items())


def step_table(report: VideoReport) -> Table:
    """The times of each step; of many steps the first and the last ones."""
    steps, densities = report.steps, report.attention.step_densities
    columns = ("step", "timestep", "step ms", "attention ms", "cond", "uncond", "share", *["exact"] * bool(densities))
    table = Table(*columns, right=True)
    shown = steps if len(steps) <= 12 else [*steps[:6], *steps[-5:]]
    for step in shown:
        if len(steps) > 12 and step is steps[-5]:
            table.add_row("...")
        table.add_row(
            str(step.step + 1), f"{step.timestep:g}", _ms(step.latency_ms), _ms(step.attention_ms),
            _ms(step.attention_conditional_ms), _ms(step.attention_unconditional_ms),
            "" if step.attention_share is None else f"{step.attention_share:.0%}",
            *[f"{densities[step.step]:.1%}" for _ in columns[7:]],
        )  # fmt: skip
    return table


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def show_replay(result: ReplayResult, as_json: bool) -> None:
    """Print whether a replayed video is the same: a table on stdout, or JSON alone."""
    if as_json:
        write_json(result.to_dict())
        return
    table = Table("", "before", "now", "")
    for name, row in result.hashes.items():
        verdict = "same" if row.same else Cell("different", "bold red")
        if name == "file" and result.same and not row.same:
            verdict = "same frames, different metadata"
        table.add_row(name, row.before[:16], row.now[:16], verdict)
    for name, (before, now) in result.versions_changed.items():
        table.add_row(name, str(before or "not installed"), str(now or "not installed"), "changed")
    write_table(table)
