"""generate(GenerateConfig) -> GenerateResult: one prompt, one or more videos, each with its report."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import secrets
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import save_file

from slagen import machine, report
from slagen.attention.functional import Branches, choose_backend
from slagen.config import Backend, GenerateConfig, ModelDefaults, SLAConfig
from slagen.errors import EnvironmentProblem, SlagenError, UsageError, WeightsError
from slagen.models import SLA_FILE, ModelSource
from slagen.timing import StepRecorder, StepTimes
from slagen.video import part_path, write_mp4
from slagen.wan.checkpoints import (
    SLAMetadata,
    apply_sla,
    install_projections,
    load_sla,
    read_metadata,
    weights_hash,
)
from slagen.wan.formats import Found, peek
from slagen.wan.loading import decode_latents, load_pipeline, resolve_model, set_sampler
from slagen.wan.processor import attach_recorder, install

SIGMA_MAX = 80.0  # of the rCM sampler: what TurboDiffusion's text-to-video script takes


@dataclass(frozen=True)
class Event:
    """What a run tells while it goes on: a stage begins, a step has ended, or something the user should know."""

    kind: str  # "stage", "step", "note" or "warning"
    text: str = ""
    step: StepTimes | None = None
    num_steps: int = 0


@dataclass(frozen=True)
class Video:
    """One finished video: its file, its report (file and content), and its latents' file if they were kept."""

    path: Path
    report_path: Path
    report: dict[str, Any]
    latents_path: Path | None = None


@dataclass(frozen=True)
class GenerateResult:
    """What a call of `generate` made, in the order of the seeds."""

    videos: list[Video]


@dataclass(frozen=True)
class Plan:
    """A GenerateConfig with every default filled in, checked against the model, before any weight is read."""

    config: GenerateConfig
    source: ModelSource
    device: torch.device
    dtype: torch.dtype
    sla: SLAConfig | None  # None runs dense
    sla_path: Path | None  # the file that holds SLA's weights: its own, or the transformer's
    num_tokens: int
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    backend: str | None = None  # what SLA will run on; None where the attention is dense
    sla_alone: bool = True  # whether `sla_path` is a file of slagen's, with metadata

    @property
    def settings(self) -> dict[str, Any]:
        """Every setting by option name, as it will be used."""
        c = self.config
        sparsity = None if self.sla is None else self.sla.sparsity
        return {
            "prompt": c.prompt,
            "negative_prompt": c.negative_prompt,
            "model": self.source.name,
            "weights": str(self.source.weights or self.sla_path or "") or None,
            "vae": c.vae,
            "allow_untrained": c.allow_untrained,
            "attention": c.attention,
            "backend": c.backend,
            "sparsity": sparsity,
            "sla_topk": None if sparsity is None else round(1 - sparsity, 12),
            "size": f"{c.width}x{c.height}",
            "num_frames": c.num_frames,
            "fps": c.fps,
            "steps": c.steps,
            "guidance_scale": c.guidance_scale,
            "sampler": c.sampler,
            "flow_shift": None if c.sampler == "rcm" else c.flow_shift,
            "sigma_max": c.sigma_max if c.sampler == "rcm" else None,
            "ode": c.ode if c.sampler == "rcm" else None,
            "seed": c.seed,
            "num_videos": c.num_videos,
            "dtype": next(name for name, dtype in machine.DTYPES.items() if dtype == self.dtype),
            "device": str(self.device),
            "timing": c.timing,
            "output": c.output,
            "save_latents": c.save_latents,
            "overwrite": c.overwrite,
        }


def generate(config: GenerateConfig, on_event: Callable[[Event], None] = lambda event: None) -> GenerateResult:
    """Make the videos that a config asks for.

    Args:
        config: what to make.
        on_event: told of every stage, step, note and warning.
    Returns: the videos, each written with its report.
    Raises: SlagenError of some kind. Videos that were finished before stay.
    """
    plan = make_plan(config, on_event)
    try:
        return _run(plan, on_event)
    except torch.OutOfMemoryError as error:
        config = plan.config
        raise SlagenError(
            f"the GPU ran out of memory at {config.width}x{config.height}, {config.num_frames} frames. "
            "Try fewer --num-frames or a smaller --size."
        ) from error


def _run(plan: Plan, on_event: Callable[[Event], None]) -> GenerateResult:
    for text in plan.notes:
        on_event(Event("note", text))
    for text in plan.warnings:
        on_event(Event("warning", text))
    paths = _claim_paths(plan)
    stages = {"start": time.time() - psutil.Process().create_time()}

    on_event(Event("stage", "load"))
    began = time.perf_counter()
    c = plan.config
    pipe = load_pipeline(plan.source, plan.device, plan.dtype, None if c.vae is None else Path(c.vae).expanduser())
    assert c.sampler is not None and c.flow_shift is not None
    set_sampler(pipe, c.sampler, c.flow_shift, sigma_max=c.sigma_max or SIGMA_MAX, stochastic=not c.ode)
    weights = _install_attention(pipe, plan)
    stages["load"] = time.perf_counter() - began

    on_event(Event("stage", "text"))
    began = time.perf_counter()
    embeds = _encode_prompt(pipe, plan)
    stages["text"] = time.perf_counter() - began

    videos = []
    for index, path in enumerate(paths):
        videos.append(_make_video(pipe, plan, index, path, embeds, weights, dict(stages), on_event))
        stages = {"start": 0.0, "load": 0.0, "text": 0.0}  # shared: counted once, with the first video
    return GenerateResult(videos)


def make_plan(config: GenerateConfig, on_event: Callable[[Event], None] = lambda event: None) -> Plan:
    """Fill in every default and check all that can be checked without reading weights. Raises SlagenError."""
    device = machine.pick_device(config.device)
    dtype = machine.pick_dtype(config.dtype, device)
    notes: list[str] = []
    warnings: list[str] = []
    found = None if config.weights is None else _look_at(Path(config.weights).expanduser())
    source = resolve_model(
        config.model, device.type, own_transformer=found is None or found.kind != "transformer",
        local_files_only=config.local_files_only, on_note=lambda text: on_event(Event("note", text)),
    )  # fmt: skip
    if config.model is None and device.type != "cuda":
        notes.append(f"no CUDA device, so the bundled model {source.name} runs; choose another with --model")
    if found is not None and found.kind == "transformer":
        source = dataclasses.replace(source, weights=Path(config.weights or "").expanduser())
    sla, sla_path, sla_alone, distilled = _plan_attention(config, source, found)
    if config.attention == "dense" and source.weights is not None:
        notes.append(
            f"{source.weights.name} is all the weights there are: dense runs the same ones with full attention"
        )
    defaults = _defaults(source.defaults, distilled)
    config = _plan_sampler(config, defaults, distilled, warnings)
    filled = {
        name: getattr(defaults, name)
        for name in ("width", "height", "num_frames", "fps", "steps", "guidance_scale", "flow_shift", "negative_prompt")
        if getattr(config, name) is None
    }
    if config.seed is None:
        filled["seed"] = secrets.randbelow(2**31)
    config = dataclasses.replace(config, **filled)
    assert config.width and config.height and config.num_frames
    grid = max(16, source.spatial_grid)  # WanPipeline itself takes multiples of 16 only
    if config.width % grid or config.height % grid:
        width, height = (max(grid, round(x / grid) * grid) for x in (config.width, config.height))
        raise UsageError(
            f"size is {config.width}x{config.height}, but {source.name} makes multiples of {grid} pixels. "
            f"Try --size {width}x{height}."
        )
    unknown = defaults.unknown_words(config.prompt)
    if unknown:
        warnings.append(
            f"{source.name} does not know {', '.join(map(repr, unknown))} and will guess; "
            f'it knows prompts like "{defaults.example_prompt}"'
        )
    num_tokens = source.num_tokens(config.width, config.height, config.num_frames)
    if sla is not None:
        trained = sla
        sparsity = config.sparsity if config.sla_topk is None else 1 - config.sla_topk
        if sparsity is not None:
            sla = dataclasses.replace(sla, sparsity=sparsity)
        if sla_path is not None and not math.isclose(sla.sparsity, trained.sparsity, abs_tol=1e-9):
            warnings.append(f"the weights were trained at sparsity {trained.sparsity:g}, not {sla.sparsity:g}")
        counts = report.block_counts(sla, num_tokens)
        if counts["key_blocks"] < 2:
            sla, sla_path = None, None
            config = dataclasses.replace(config, attention="dense", sparsity=None, sla_topk=None, weights=None)
            warnings.append(
                f"{num_tokens} tokens are fewer than 2 key blocks, so nothing can be left out: this clip runs dense"
            )
        elif config.attention != "linear":
            notes.append(
                f"sparsity {sla.sparsity:g} -> {counts['critical']} of {counts['key_blocks']} key blocks "
                "per query block"
            )
    backend = None
    if sla is not None:
        backend = _pick_backend(config.backend, source.head_dim, device, dtype)
        notes.append(f"SLA runs on the {backend} backend")
    return Plan(config, source, device, dtype, sla, sla_path, num_tokens, notes, warnings, backend, sla_alone)


def _look_at(path: Path) -> Found:
    """What --weights names. A folder may hold a transformer, SLA weights, or, as `slagen convert` writes it, both."""
    if path.is_dir() and not (path / "transformer").is_dir() and (path / SLA_FILE).is_file():
        return Found("sla")
    return peek(path)


def _defaults(defaults: ModelDefaults, distilled: bool) -> ModelDefaults:
    """The model's own, but where its weights were replaced by ones of another kind of sampler."""
    if distilled and defaults.sampler != "rcm":
        return dataclasses.replace(defaults, steps=4, guidance_scale=1.0, sampler="rcm", negative_prompt="")
    if not distilled and defaults.sampler == "rcm":
        return dataclasses.replace(defaults, steps=50, guidance_scale=5.0, sampler="unipc")
    return defaults


def _plan_sampler(
    config: GenerateConfig, defaults: ModelDefaults, distilled: bool, warnings: list[str]
) -> GenerateConfig:
    """Choose the sampler that the weights are made for. Raises WeightsError if another is asked for."""
    sampler = config.sampler or defaults.sampler
    if distilled and sampler != "rcm":
        raise WeightsError(
            f"--sampler is {sampler}, but these weights are distilled for rcm and make noise with any other. "
            "Leave --sampler out."
        )
    if not distilled and sampler == "rcm":
        raise WeightsError(
            "--sampler is rcm, but these weights are not distilled for it and make noise with it. Leave --sampler out."
        )
    if sampler == "rcm":
        if config.flow_shift is not None:
            raise UsageError("the rcm sampler has no flow shift. Leave --flow-shift out.")
        if config.steps is not None and config.steps > 4:
            raise UsageError(f"steps is {config.steps}, but rcm takes 1 to 4. Try --steps 4.")
        if config.guidance_scale is not None and config.guidance_scale > 1:
            warnings.append(
                f"guidance {config.guidance_scale:g}: these weights are distilled with guidance in them; 1 is right"
            )
        return dataclasses.replace(config, sampler=sampler, sigma_max=config.sigma_max or SIGMA_MAX)
    if config.sigma_max is not None or config.ode:
        raise UsageError(f"--sigma-max and --ode are for the rcm sampler, but this is {sampler}. Leave them out.")
    return dataclasses.replace(config, sampler=sampler)


def _pick_backend(name: Backend, head_dim: int, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that SLA will run on. Raises EnvironmentProblem where a named one can not."""
    try:
        return choose_backend(torch.empty(1, 1, 1, head_dim, dtype=dtype, device=device), name)
    except ValueError as error:
        raise EnvironmentProblem(str(error)) from error


def _plan_attention(
    config: GenerateConfig, source: ModelSource, found: Found | None
) -> tuple[SLAConfig | None, Path | None, bool, bool]:
    """What SLA to run and from where.

    Returns: the settings it was trained with (None runs dense), the file of its weights (None without any), whether
        that is a file of slagen's own, and whether the weights in all are distilled for rCM.
    Raises: WeightsError where SLA is asked for and there are no weights for it.
    """
    path, alone = None, True
    if found is not None and found.kind in ("sla", "side-file"):
        if config.attention == "dense":
            raise UsageError("dense attention takes no SLA weights. Leave --weights out.")
        path, alone = Path(config.weights or "").expanduser(), found.kind == "sla"
    elif found is None and source.weights is None and (source.folder / SLA_FILE).is_file():
        path = source.folder / SLA_FILE
    elif source.weights is not None and source.weights.is_dir() and (source.weights / SLA_FILE).is_file():
        path = source.weights / SLA_FILE
    inside = None if source.weights is None or path is not None else peek(source.weights)
    if inside is not None and inside.sla is not None:
        path, alone = source.weights, False
    metadata = read_metadata(path) if path is not None and alone else None
    if metadata is not None:
        distilled = metadata.sampler_family == "rcm"
    elif source.weights is not None:
        distilled = inside is not None and inside.sampler == "rcm"
    else:
        distilled = source.defaults.sampler == "rcm"
    if config.attention == "dense":
        return None, None, True, distilled
    if path is None:
        if not config.allow_untrained:
            raise WeightsError(
                f"{source.name} was never tuned for SLA: without tuning the attention that SLA leaves out is simply "
                "lost, and the video is poor. Give SLA weights with --weights, run these as they are with "
                "--attention dense, or go on with --allow-untrained."
            )
        return SLAConfig(), None, True, distilled
    if metadata is not None:
        return metadata.config, path, True, distilled
    sla = inside.sla if inside is not None else found.sla if found is not None else None
    assert sla is not None
    return sla, path, False, distilled


def _install_attention(pipe: Any, plan: Plan) -> dict[str, Any]:
    """Put the planned attention into the pipeline; returns what the report says of the weights."""
    found: dict[str, Any] = {
        "model": plan.source.name, "model_file": None if plan.source.weights is None else str(plan.source.weights),
        "model_hash": weights_hash(pipe.transformer), "sla_file": None, "sla_hash": None,
    }  # fmt: skip
    branches: Branches = {"sparse": "sparse", "linear": "linear"}.get(plan.config.attention, "both")  # type: ignore[assignment]
    backend, untrained = plan.config.backend, plan.config.allow_untrained
    if plan.sla is None:
        install(pipe.transformer, None)
        return {**found, "used": "base" if plan.source.weights is None else "the same weights, full attention"}
    if plan.sla_path is None:
        apply_sla(pipe, plan.sla, backend=backend, branches=branches)
        return {**found, "used": "base with untrained SLA"}
    if not plan.sla_alone:
        install_projections(
            pipe, plan.sla_path, plan.sla, backend=backend, branches=branches, allow_untrained=untrained
        )
        return {**found, "used": "SLA", "sla_file": str(plan.sla_path)}
    metadata: SLAMetadata = load_sla(
        pipe, plan.sla_path, config=plan.sla, backend=backend, branches=branches, allow_untrained=untrained,
        base_hash=found["model_hash"],
    )  # fmt: skip
    file = plan.sla_path / SLA_FILE if plan.sla_path.is_dir() else plan.sla_path
    with file.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    return {**found, "used": "SLA", "sla_file": str(file), "sla_hash": digest, "trained": metadata.trained,
            "trained_steps": metadata.steps, "trained_sparsity": metadata.config.sparsity}  # fmt: skip


@torch.inference_mode()
def _encode_prompt(pipe: Any, plan: Plan) -> dict[str, Any]:
    guided = plan.config.guidance_scale > 1  # type: ignore[operator]
    prompt, negative = pipe.encode_prompt(
        prompt=plan.config.prompt, negative_prompt=plan.config.negative_prompt, do_classifier_free_guidance=guided,
        max_sequence_length=plan.source.defaults.max_sequence_length, device=pipe._execution_device,
    )  # fmt: skip
    return {"prompt_embeds": prompt, "negative_prompt_embeds": negative}


@torch.inference_mode()
def _make_video(
    pipe: Any,
    plan: Plan,
    index: int,
    path: Path,
    embeds: dict[str, Any],
    weights: dict[str, Any],
    stages: dict[str, float],
    on_event: Callable[[Event], None],
) -> Video:
    config = dataclasses.replace(plan.config, seed=plan.config.seed + index)  # type: ignore[operator]
    plan = dataclasses.replace(plan, config=config)
    assert config.width and config.height and config.num_frames and config.fps and config.steps

    on_event(Event("stage", "denoise", num_steps=config.steps))
    began = time.perf_counter()
    latents, recorder = _denoise(pipe, plan, embeds, on_event)
    if not torch.isfinite(latents).all():
        raise SlagenError(
            f"the latents of seed {config.seed} are not finite, so no video was written. "
            "Try --dtype fp32, or --backend reference to see whether a kernel is at fault."
        )
    stages["denoise"] = time.perf_counter() - began

    on_event(Event("stage", "decode"))
    began = time.perf_counter()
    frames = decode_latents(pipe.vae, latents).numpy()
    stages["decode"] = time.perf_counter() - began

    on_event(Event("stage", "write"))
    began = time.perf_counter()
    write_mp4(frames, path, config.fps)
    latents = latents.float().cpu().contiguous()
    latents_path = None
    try:
        if config.save_latents:
            latents_path = path.with_suffix(".latents.safetensors")
            save_file({"latents": latents}, part_path(latents_path))
            os.replace(part_path(latents_path), latents_path)
        stages["write"] = time.perf_counter() - began
        content = _report(plan, path, frames.shape, latents, weights, stages, recorder)
        report.write_json(path.with_suffix(".json"), content)
    except OSError as error:
        raise SlagenError(
            f"{path} is written, but a file beside it could not be ({error.strerror}). Check the free space there."
        ) from error
    return Video(path, path.with_suffix(".json"), content, latents_path)


def _denoise(
    pipe: Any, plan: Plan, embeds: dict[str, Any], on_event: Callable[[Event], None]
) -> tuple[Any, StepRecorder]:
    """Run the sampling loop; returns the final latents (1, C, T, h, w) and the recorder with its steps."""
    config = plan.config
    recorder = StepRecorder(plan.device.type, config.timing)
    detach = attach_recorder(pipe.transformer, recorder)

    def after_step(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        step = recorder.end_step(float(timestep))
        on_event(Event("step", "denoise", step, config.steps or 0))
        return {}

    generator = torch.Generator().manual_seed(config.seed)  # type: ignore[arg-type]
    if config.sampler == "rcm":
        assert config.width and config.height and config.num_frames
        frames = (config.num_frames - 1) // pipe.vae_scale_factor_temporal + 1
        height, width = (size // pipe.vae_scale_factor_spatial for size in (config.height, config.width))
        pipe.scheduler.generator = generator
        shape = (1, pipe.transformer.config.in_channels, frames, height, width)
        embeds = {**embeds, "latents": pipe.scheduler.initial_latents(shape, pipe._execution_device)}
    try:
        recorder.begin_step()
        output = pipe(
            **embeds, height=config.height, width=config.width, num_frames=config.num_frames,
            num_inference_steps=config.steps, guidance_scale=config.guidance_scale, generator=generator,
            output_type="latent", callback_on_step_end=after_step,
            max_sequence_length=plan.source.defaults.max_sequence_length,
        )  # fmt: skip
    finally:
        detach()
    return output.frames, recorder


def _report(
    plan: Plan,
    path: Path,
    frames_shape: tuple[int, ...],
    latents: torch.Tensor,
    weights: dict[str, Any],
    stages: dict[str, float],
    recorder: StepRecorder,
) -> dict[str, Any]:
    config, sla, steps = plan.config, plan.sla, recorder.steps
    num_frames, height, width, _ = frames_shape
    shape = plan.source.shape
    attention: dict[str, Any] = {"mode": config.attention, "tokens": plan.num_tokens}
    if sla is None:
        flops = report.dense_attention_flops(shape, plan.num_tokens)
    else:
        counts = report.block_counts(sla, plan.num_tokens)
        fractions = {name: counts[name] / counts["key_blocks"] for name in ("critical", "negligible", "marginal")}
        attention |= {**sla.to_dict(), **counts, "fractions": fractions, "backend": plan.backend}
        flops = report.sla_attention_flops(
            shape, plan.num_tokens, sla, sparse=config.attention != "linear", linear=config.attention != "sparse"
        )
    passes = len(steps) * (2 if (config.guidance_scale or 0) > 1 else 1)
    return {
        "schema_version": report.SCHEMA_VERSION,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "video": {
            "file": path.name, "frames": num_frames, "width": width, "height": height, "fps": config.fps,
            "duration_s": num_frames / (config.fps or 1),
        },
        "settings": plan.settings,
        "versions": report.versions(),
        "device": machine.describe_device(plan.device),
        "weights": weights,
        "latents_hash": hashlib.sha256(latents.numpy().tobytes()).hexdigest(),
        "attention": attention,
        "stages_s": {**stages, "total": sum(stages.values())},
        "since_process_start_s": time.time() - psutil.Process().create_time(),
        "peak_memory_gib": machine.peak_memory_gib(plan.device),
        "steps": report.step_section(steps),
        "layers": report.layer_section(steps),
        "cost": report.cost_section(shape, plan.num_tokens, passes, flops, steps),
        "timing": report.timing_section(config.timing, steps, recorder.clock.cost_ms() if recorder.enabled else 0.0),
    }  # fmt: skip


def _claim_paths(plan: Plan) -> list[Path]:
    """The final paths of all videos. Raises SlagenError if one exists, or the folder takes no files."""
    config = plan.config
    output = Path(config.output).expanduser()
    if output.suffix.lower() == ".mp4":
        if config.num_videos > 1:
            raise UsageError(
                f"{output} is one file, but --num-videos is {config.num_videos}. Give a folder with --output."
            )
        paths = [output]
    else:
        paths = [output / f"{_file_stem(plan, i)}.mp4" for i in range(config.num_videos)]
    folder = paths[0].parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".slagen-{os.getpid()}.part"
        try:
            probe.write_bytes(b"\0" * 4096)
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise SlagenError(
            f"{folder} takes no files ({error.strerror or error}). Give a folder you can write to with --output."
        ) from error
    needed = config.num_videos * (2**20 + (config.num_frames or 0) * (config.width or 0) * (config.height or 0) // 4)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise SlagenError(
            f"{folder} has {free / 2**20:.1f} MiB free, but the videos may need {needed / 2**20:.1f} MiB. "
            "Free some space, or give another folder with --output."
        )
    for path in paths:
        companions = [path, path.with_suffix(".json")]
        if config.save_latents:
            companions.append(path.with_suffix(".latents.safetensors"))
        for file in companions:
            if file.is_dir() or (file.exists() and not config.overwrite):
                raise UsageError(f"{file} exists. Choose another --output or --seed, or replace it with --overwrite.")
    return paths


def _file_stem(plan: Plan, index: int) -> str:
    """`<index>-<slug>-s<seed>-<hash>`; the hash tells settings apart that the rest of the name does not."""
    settings = {k: v for k, v in plan.settings.items() if k not in ("output", "overwrite", "save_latents", "timing")}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    return f"{index + 1:04d}-{plan.config.slug}-s{(plan.config.seed or 0) + index}-{digest}"
