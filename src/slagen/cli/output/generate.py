"""What `generate`, `decode` and `replay` print: a report's steps and totals, paths, and a comparison."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slagen.attention.choices import named_steps
from slagen.cli.console import log, log_table, write, write_json, write_table
from slagen.cli.table import Cell, Table
from slagen.generation.measured_dense import describe_dense
from slagen.io.text import counted

if TYPE_CHECKING:
    from slagen.generation.replay import ReplayResult
    from slagen.generation.result import GenerateResult
    from slagen.generation.video_report import ReportedStep, VideoReport

MAX_DENSITIES = 4  # of steps, in one line


def show_videos(result: GenerateResult, as_json: bool) -> None:
    """Print what `generate` made: tables on stderr and one path a line on stdout, or JSON alone on stdout."""
    if as_json:
        rows = [{"video": str(v.path), "report": str(v.report_path), **v.record.to_dict()} for v in result.videos]
        write_json(rows if len(rows) > 1 else rows[0])
        return
    for video in result.videos:
        show_report(video.record)
        write(str(video.path))


def show_report(report: VideoReport) -> None:
    """A report as a table of steps, and lines for the totals, on stderr."""
    attention, cost = report.attention, report.cost
    if report.measured_dense is not None:
        log(describe_dense(report.measured_dense))
    if report.timing.level != "off":
        log_table(_step_table(report.steps, attention.step_densities))
    what = f"{attention.mode} attention, {counted(attention.tokens, 'token')}"
    if by_step := attention.step_densities:
        what += f", {_by_step(by_step)} of all query-key pairs exactly; {attention.backend} backend"
    elif (blocks := attention.blocks) is not None:
        what += (
            f", {counted(blocks.key_blocks, 'key block')} of {counted(blocks.block_n, 'token')}: "
            f"{blocks.critical} critical ({blocks.critical_share:.1%}), "
            f"{blocks.marginal} marginal, {blocks.negligible} negligible; {attention.backend} backend"
        )
    elif attention.density is not None:
        what += f", {attention.density:.1%} of all query-key pairs attended exactly; {attention.backend} backend"
    if "delta" in attention.method:
        what += f"; one query row in {attention.method['delta']} attended exactly (delta)"
    for name in ("steps", "layers"):
        if places := attention.method.get(f"dense_{name}"):
            noun = name if len(places) > 1 else name.removesuffix("s")
            what += f"; dense attention in {noun} {', '.join(map(str, places))}"
    log(what)
    log(f"weights: {report.weights.used}, model {report.weights.model}")
    if attention.mode != "dense":
        log(
            f"computed, not measured: attention takes {cost.attention_tflop:.3g} TFLOP instead of "
            f"{cost.dense_attention_tflop:.3g} with dense attention, so all forward passes take "
            f"{cost.flops_speedup:.2f}x fewer FLOPs; with free attention it would be {cost.amdahl_ceiling:.2f}x"
        )
    if cost.measured_attention_share is not None:
        log(
            f"attention time: {cost.measured_attention_share:.1%} of the step time; the overhead of timing is "
            f"{report.timing.overhead_share:.2%}"
        )
    spent = ", ".join(f"{name} {seconds:.1f}" for name, seconds in report.stages_s.items())
    log(f"time in seconds: {spent}; peak memory {report.peak_memory_gib:.2f} GiB")
    log(f"seed {report.settings['seed']}, hash of the latents {report.latents_hash[:12]}")


def _by_step(densities: list[float]) -> str:
    """The densities of the steps: "20.0% in steps 0-9, 5.0% in step 10"; of many different ones their range."""
    steps: dict[str, list[int]] = {}
    for step, density in enumerate(densities):
        steps.setdefault(f"{density:.1%}", []).append(step)
    if len(steps) > MAX_DENSITIES:
        return f"{min(densities):.1%} to {max(densities):.1%}, {sum(densities) / len(densities):.1%} on average,"
    return ", ".join(f"{density} in {named_steps(own)}" for density, own in steps.items())


def _step_table(steps: list[ReportedStep], densities: list[float]) -> Table:
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
