"""From what a run measured to the report of its video, and to what the MP4 says of itself."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any

from slagen.attention.cost import ModelShape, dense_attention_flops, other_flops
from slagen.attention.delta.method import exact_share
from slagen.attention.policy import DensePart
from slagen.generation import step_cache
from slagen.generation.config import GenerateConfig
from slagen.generation.measured_dense import dense_section
from slagen.generation.video_report import (
    SCHEMA_VERSION,
    Cost,
    Overhead,
    ReportedAttention,
    ReportedLayer,
    ReportedStep,
    StagePeaks,
    UsedWeights,
    VideoFile,
    VideoReport,
)
from slagen.io.reading import file_hash
from slagen.io.text import to_json
from slagen.packages import versions
from slagen.settings import names_where
from slagen.timing import StepTimes

if TYPE_CHECKING:
    from slagen.generation.sample import Sample
    from slagen.generation.stage_clock import StageClock

COMMENT_BYTES = 32 * 1024
AROUND = names_where(GenerateConfig, lambda option: not option.pixels)  # settings that are not of the video


def cost_section(
    shape: ModelShape, num_tokens: int, num_passes: int, attention_flops: float, steps: list[StepTimes],
    share: float = 1.0,
) -> Cost:  # fmt: skip
    """What dense attention would have cost, what was spent, and how near that is to the limit Amdahl's law sets.

    Args:
        num_passes: forward passes of the whole run.
        attention_flops: of the attention that ran, in one pass.
        steps: as timed.
        share: of all blocks, those that ran.
    """
    dense, other = dense_attention_flops(shape, num_tokens), other_flops(shape, num_tokens)
    ceiling = (dense + other) / other
    speedup = (dense + other) / (attention_flops + share * other)
    timed = [s for s in steps if s.attention_share is not None]
    latency = sum(s.latency_ms or 0.0 for s in timed)
    attention = sum(sum(s.attention_ms) for s in timed)
    return Cost(
        forward_passes=num_passes,
        dense_attention_tflop=dense * num_passes / 1e12,
        attention_tflop=attention_flops * num_passes / 1e12,
        other_tflop=share * other * num_passes / 1e12,
        attention_flops_saved=1 - attention_flops / dense,
        dense_attention_share_of_flops=dense / (dense + other),
        amdahl_ceiling=ceiling,
        flops_speedup=speedup,
        achieved_share_of_ceiling=speedup / ceiling,
        measured_attention_share=attention / latency if latency else None,
        remaining_time_ceiling=latency / (latency - attention) if latency > attention else None,
    )


def step_section(steps: list[StepTimes]) -> list[ReportedStep]:
    """The steps as the report lists them."""
    rows = []
    for step in steps:
        passes = step.attention_ms
        row = ReportedStep(
            step=step.index,
            timestep=step.timestep,
            latency_ms=step.latency_ms,
            attention_ms=sum(passes) if passes else None,
            attention_conditional_ms=passes[0] if passes else None,
            attention_unconditional_ms=passes[1] if len(passes) > 1 else None,
            attention_share=step.attention_share,
            layers_ms=list(step.layers_ms) or None,
            parts_ms=dict(step.parts_ms) or None,
            compile_ms=step.compile_ms or None,
        )
        rows.append(row)
    return rows


def density_section(densities: Sequence[float | None], dense: DensePart, exact_rows: float = 0.0) -> dict[str, Any]:
    """The fraction of all query-key pairs that was attended exactly, on average and by layer, dense passes
    included; empty if no layer reports it.

    Args:
        densities: of the layers, over the passes in which they did not use dense attention.
        exact_rows: the fraction of the query rows that was attended exactly in these passes all the same.
    """
    if not any(density is not None for density in densities):
        return {}
    steps = len(dense.steps) / dense.num_steps
    exactly = steps + exact_rows * (1 - steps)
    layers = [
        1.0 if layer in dense.layers else None if density is None else density + exactly * (1 - density)
        for layer, density in enumerate(densities)
    ]
    known = [density for density in layers if density is not None]
    return {"density": sum(known) / len(known), "layer_densities": layers}


def layer_section(steps: list[StepTimes]) -> list[ReportedLayer]:
    """Attention time of each layer; empty if it was not taken."""
    timed = [s.layers_ms for s in steps if s.layers_ms]
    return [ReportedLayer(i, sum(times)) for i, times in enumerate(zip(*timed, strict=True))]


def timing_section(level: str, steps: list[StepTimes], span_cost_ms: float, compiled: bool = False) -> Overhead:
    """How the times were taken, and what taking them cost: spans x measured cost of one, as a share of the steps.

    Args: compiled: nothing was timed inside the blocks.
    """
    means = (
        "the choice of key blocks, the attention itself and proj_l, but not the projections to q, k, v and the output"
    )
    spans = sum(s.num_spans + 1 for s in steps) if level != "off" else 0
    latency = sum(s.latency_ms or 0.0 for s in steps)
    return Overhead(
        level=level,
        spans=spans,
        span_cost_ms=span_cost_ms if spans else 0.0,
        overhead_share=spans * span_cost_ms / latency if latency else 0.0,
        attention_means="nothing: blocks are compiled, and attention is not timed by itself" if compiled else means,
    )


def memory_section(clock: StageClock) -> StagePeaks | None:
    """The most memory of each stage that has ended; None where it was not noted."""
    memory = clock.memory
    if memory is None:
        return None
    reason = memory.unknown or "other videos are generated at the same time"
    lacks = None in clock.peaks_gib.values()
    return StagePeaks(memory.owner, dict(clock.peaks_gib), reason if lacks else None)


def shareable(path: str | None) -> str | None:
    """A path to record in public files: as typed if it is relative, otherwise only its last name, because the folders
    above reveal this machine and its user. None stays None."""
    if path is None or not (path.startswith("~") or Path(path).is_absolute() or PureWindowsPath(path).is_absolute()):
        return path
    return PureWindowsPath(path).name if "\\" in path and not Path(path).is_absolute() else Path(path).name


def video_section(path: Path | None, shape: tuple[int, ...], fps: int, frames_hash: str) -> VideoFile:
    """What a report says of a video's file, which may not be there yet, or ever. `shape`: (F, H, W, 3)."""
    num_frames, height, width, _ = shape
    return VideoFile(
        file=None if path is None else path.name, frames=num_frames, width=width, height=height, fps=fps,
        duration_s=num_frames / fps, frames_hash=frames_hash,
        sha256=None if path is None or not path.is_file() else file_hash(path),
    )  # fmt: skip


def comment(
    settings: dict[str, Any], latents_hash: str, frames_hash: str, weights: UsedWeights,
    packages: dict[str, str] | None = None,
) -> str:  # fmt: skip
    """What an MP4 says of itself: how it was made, in at most 32 KiB; a longer prompt is there as its hash.

    Args:
        settings: as they are recorded. weights: whose hashes are recorded.
        packages: their versions; None: those installed now.
    """
    kept = {name: value for name, value in settings.items() if name not in AROUND}
    hashes = {"model_hash": weights.model_hash, "sla_hash": weights.sla_hash, "loras": weights.to_dict().get("loras")}
    content = {
        "schema_version": SCHEMA_VERSION, "settings": kept, "versions": packages or versions(),
        "weights": {name: value for name, value in hashes.items() if value is not None},
        "latents_hash": latents_hash, "video": {"frames_hash": frames_hash},
    }  # fmt: skip
    text = to_json(content)
    for name in ("prompt", "negative_prompt"):
        if len(text.encode()) > COMMENT_BYTES and isinstance(kept.get(name), str):
            kept[f"{name}_sha256"] = hashlib.sha256(kept.pop(name).encode()).hexdigest()
            text = to_json(content)
    return text


def recorded(sample: Sample) -> dict[str, Any]:
    """The settings of a sampled video, with the number of processes where several made it: one rounds differently."""
    several = {} if sample.processes is None else {"processes": len(sample.processes.ranks)}
    return {**sample.plan.recorded, **several}


def video_report(sample: Sample, path: Path | None, latents_hash: str, frames_hash: str) -> VideoReport:
    """The report of a video, whose file may not be there yet."""
    from slagen import machine  # with torch, which nothing else here needs

    plan, clock, done, recorder = sample.plan, sample.clock, sample.denoised, sample.denoised.recorder
    config, schedule, steps = plan.config, plan.schedule, recorder.steps
    shape = plan.weights.source.shape
    passes, ran = len(steps) * (2 if (config.guidance_scale or 0) > 1 else 1), step_cache.blocks_ran(steps)
    exact = exact_share(plan.num_tokens, config.delta)
    if ran is None:
        counted = density_section(done.densities, plan.dense, exact)
        flops, share = float(plan.attention_flops(done.densities)), 1.0
    else:
        counted = step_cache.density_section(plan, done.densities, ran)
        flops = step_cache.attention_flops(plan, done.densities, ran) / passes
        share = sum(map(sum, ran)) / (passes * shape.num_layers)
    by_step = schedule.by_step is not None and ran is None  # with skipped blocks it would be of some layers only
    about = {
        **schedule.describe(),
        **counted,
        **plan.dense.to_dict(),
        **({"step_densities": schedule.densities(done.step_densities)} if by_step else {}),
    }  # fmt: skip
    return VideoReport(
        schema_version=SCHEMA_VERSION,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        video=video_section(path, sample.frames.shape, config.fps or 1, frames_hash),
        settings=recorded(sample),
        versions=versions(),
        device=machine.describe_device(plan.weights.device),
        weights=sample.weights,
        latents_hash=latents_hash,
        attention=ReportedAttention(config.attention, plan.num_tokens, about, plan.backend),
        measured_dense=dense_section(steps),
        cache=step_cache.use_of(plan, recorder),
        processes=sample.processes,
        steps=step_section(steps),
        layers=layer_section(steps),
        cost=cost_section(shape, plan.num_tokens, passes, flops, steps, share),
        timing=timing_section(
            recorder.level, steps, recorder.clock.cost_ms() if recorder.enabled else 0.0, config.compile
        ),
        stages_s=clock.read(),  # last, for all of the above takes time too
        stage_memory=memory_section(clock),
        placement=sample.placement.to_record(),
        peak_memory_gib=clock.memory.most() if clock.memory else machine.peak_memory_gib(plan.weights.device),
        wall_s=clock.wall_s(),
        since_process_start_s=machine.process_age_s(),
    )
