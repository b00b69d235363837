"""generate(GenerateConfig) -> GenerateResult: one prompt, one or more videos, each with its report."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import secrets
import shutil
import time
import unicodedata
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
from slagen.config import Backend, GenerateConfig, SLAConfig
from slagen.errors import EnvironmentProblem, SlagenError, UsageError, WeightsError
from slagen.timing import StepRecorder, StepTimes
from slagen.video import part_path, write_mp4
from slagen.wan.checkpoints import FILE_NAME, SLAMetadata, apply_sla, load_sla, read_metadata, weights_hash
from slagen.wan.loading import (
    ModelSource,
    decode_latents,
    load_pipeline,
    resolve_model,
    set_flow_shift,
)
from slagen.wan.processor import attach_recorder, install


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
    sla_path: Path | None
    num_tokens: int
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    backend: str | None = None  # what SLA will run on; None where the attention is dense

    @property
    def settings(self) -> dict[str, Any]:
        """Every setting by option name, as it will be used."""
        c = self.config
        sparsity = None if self.sla is None else self.sla.sparsity
        return {
            "prompt": c.prompt,
            "negative_prompt": c.negative_prompt,
            "model": self.source.name,
            "weights": None if self.sla_path is None else str(self.sla_path),
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
            "flow_shift": c.flow_shift,
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
    plan = make_plan(config)
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
    pipe = load_pipeline(plan.source, plan.device, plan.dtype)
    set_flow_shift(pipe, plan.config.flow_shift)  # type: ignore[arg-type]
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


def make_plan(config: GenerateConfig) -> Plan:
    """Fill in every default and check all that can be checked without reading weights. Raises SlagenError."""
    device = machine.pick_device(config.device)
    dtype = machine.pick_dtype(config.dtype, device)
    source = resolve_model(config.model, device.type)
    defaults = source.defaults
    notes, warnings = [], []
    if config.model is None and device.type != "cuda":
        notes.append(f"no CUDA device, so the bundled model {source.name} runs; choose another with --model")
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
    sla, sla_path = _plan_attention(config, source)
    if sla is not None:
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
    return Plan(config, source, device, dtype, sla, sla_path, num_tokens, notes, warnings, backend)


def _pick_backend(name: Backend, head_dim: int, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that SLA will run on. Raises EnvironmentProblem where a named one can not."""
    try:
        return choose_backend(torch.empty(1, 1, 1, head_dim, dtype=dtype, device=device), name)
    except ValueError as error:
        raise EnvironmentProblem(str(error)) from error


def _plan_attention(config: GenerateConfig, source: ModelSource) -> tuple[SLAConfig | None, Path | None]:
    """The SLA settings to run with, and the file they come from. Raises WeightsError where there is no file."""
    if config.attention == "dense":
        return None, None
    path = Path(config.weights).expanduser() if config.weights is not None else source.folder / FILE_NAME
    sparsity = config.sparsity if config.sla_topk is None else 1 - config.sla_topk
    if config.weights is None and not path.is_file():
        if not config.allow_untrained:
            raise WeightsError(
                f"{source.name} has no SLA weights beside it, and untrained SLA makes poor video. Give them "
                "with --weights, run the base model with --attention dense, or go on with --allow-untrained."
            )
        sla, found = SLAConfig(), None
    else:
        sla, found = read_metadata(path).config, path
    return (sla if sparsity is None else dataclasses.replace(sla, sparsity=sparsity)), found


def _install_attention(pipe: Any, plan: Plan) -> dict[str, Any]:
    """Put the planned attention into the pipeline; returns what the report says of the weights."""
    found: dict[str, Any] = {"model": plan.source.name, "model_hash": weights_hash(pipe.transformer)}
    branches: Branches = {"sparse": "sparse", "linear": "linear"}.get(plan.config.attention, "both")  # type: ignore[assignment]
    if plan.sla is None:
        install(pipe.transformer, None)
        return {**found, "used": "base", "sla_file": None, "sla_hash": None}
    if plan.sla_path is None:
        apply_sla(pipe, plan.sla, backend=plan.config.backend, branches=branches)
        return {**found, "used": "base with untrained SLA", "sla_file": None, "sla_hash": None}
    metadata: SLAMetadata = load_sla(
        pipe, plan.sla_path, config=plan.sla, backend=plan.config.backend, branches=branches,
        allow_untrained=plan.config.allow_untrained, base_hash=found["model_hash"],
    )  # fmt: skip
    file = plan.sla_path / FILE_NAME if plan.sla_path.is_dir() else plan.sla_path
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
    model = json.loads((plan.source.folder / "transformer" / "config.json").read_text(encoding="utf-8"))
    shape = report.ModelShape(
        model["num_layers"], model["num_attention_heads"], model["attention_head_dim"], model["ffn_dim"],
        plan.source.defaults.max_sequence_length,
    )  # fmt: skip
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
    plain = unicodedata.normalize("NFKD", plan.config.prompt.lower()).encode("ascii", "ignore").decode()
    slug = re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:60].rstrip("-") or "video"
    return f"{index + 1:04d}-{slug}-s{(plan.config.seed or 0) + index}-{digest}"
