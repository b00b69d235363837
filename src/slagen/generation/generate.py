"""generate(GenerateConfig) -> GenerateResult: one prompt, one or more videos, each with its report."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import hashlib
import json
import os
import shlex
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from safetensors import SafetensorError

from slagen import machine
from slagen.attention.sla.method import branches_of
from slagen.errors import SlagenError, UsageError
from slagen.events import Event
from slagen.formats.sla import SLAMetadata, find_sla_file, weights_hash
from slagen.generation import memory, report
from slagen.generation.config import GenerateConfig
from slagen.generation.latents import SUFFIX, keep_latents, latents_beside, latents_hash, write_latents
from slagen.generation.resolve import SIGMA_MAX, Plan, find_weights, make_plan
from slagen.generation.result import GenerateResult, Video
from slagen.io.files import check_writable, file_hash, reserved, staging, write_json
from slagen.io.paths import is_video, user_path
from slagen.io.text import counted, quote
from slagen.timing import StepRecorder
from slagen.video import check_ffmpeg, encode_mp4, not_written
from slagen.wan.install import apply_sla, install_projections, load_sla
from slagen.wan.loading import load_pipeline
from slagen.wan.processor import attach_recorder, denoising, install_method, processors
from slagen.wan.samplers import set_sampler
from slagen.wan.texts import load_tokenizer, may_be_cut, tell_cut
from slagen.wan.vae import decode_latents

CPU = torch.device("cpu")


def generate(config: GenerateConfig, on_event: Callable[[Event], None] = lambda event: None) -> GenerateResult:
    """Make the videos that a config asks for.

    Args:
        config: what to make.
        on_event: told of every stage, step, note and warning.
    Returns: the videos, each written with its report.
    Raises: SlagenError of some kind. Videos that were finished before stay.
    """
    check_ffmpeg()
    weights = find_weights(config, lambda text: on_event(Event("note", text)))
    plan = make_plan(config, weights)
    try:
        return _run(plan, on_event)
    except torch.OutOfMemoryError as error:
        config = plan.config
        raise SlagenError(
            f"the GPU ran out of memory at {config.width}x{config.height}, {counted(config.num_frames or 0, 'frame')}. "
            "Try fewer --num-frames or a smaller --size."
        ) from error


def check_memory(plan: Plan, *, loaded: bool = False) -> str | None:
    """A warning where a CPU may not have the memory for a video. Raises SlagenError where it surely has not.

    Args:
        loaded: whether the weights are there already.
    """
    weights, config = plan.weights, plan.config
    if weights.device != CPU:
        return None
    assert config.width and config.height and config.num_frames
    size = (config.width, config.height, config.num_frames)
    needed = memory.need(weights.source, *size, weights.dtype.itemsize)
    return memory.check(dataclasses.replace(needed, weights=0, fresh=0) if loaded else needed, *size)


def _run(plan: Plan, on_event: Callable[[Event], None]) -> GenerateResult:
    for text in plan.notes:
        on_event(Event("note", text))
    for text in plan.warnings:
        on_event(Event("warning", text))
    if (doubt := check_memory(plan)) is not None:
        on_event(Event("warning", doubt))
    with _claimed_paths(plan) as paths:
        return GenerateResult(_make(plan, paths, on_event))


def _make(plan: Plan, paths: list[Path], on_event: Callable[[Event], None]) -> list[Video]:
    stages = {"start": time.time() - psutil.Process().create_time()}

    on_event(Event("stage", "load"))
    began = time.perf_counter()
    session = Session(plan)
    stages["load"] = time.perf_counter() - began

    on_event(Event("stage", "text"))
    began = time.perf_counter()
    embeds = session.encode(plan)
    for text in session.cuts(plan):
        on_event(Event("warning", text))
    stages["text"] = time.perf_counter() - began

    videos = []
    for index, path in enumerate(paths):
        config = dataclasses.replace(plan.config, seed=(plan.config.seed or 0) + index)
        one = dataclasses.replace(plan, config=config)
        sample = session.sample(one, embeds, dict(stages), on_event)
        videos.append(save(sample, path, on_event, replace=config.overwrite))
        stages = {"start": 0.0, "load": 0.0, "text": 0.0}  # shared: counted once, with the first video
    return videos


@dataclass
class Sample:
    """One video, sampled and decoded but not written.

    Args:
        plan: what it was made with.
        frames: (F, H, W, 3) uint8.
        latents: (1, C, T, h, w) float32 on the CPU.
        recorder: its steps.
        stages: seconds of each stage so far.
        weights: what the report says of them.
        vae: what decoded it.
    """

    plan: Plan
    frames: np.ndarray
    latents: torch.Tensor
    recorder: StepRecorder
    stages: dict[str, float]
    weights: dict[str, Any]
    vae: Any = None


class Session:
    """A model in memory that makes the videos of every plan with the same weights and attention.

    Args:
        plan: the first of them, which says what to load.
        text_encoder: False where all prompts are encoded already.
        pipe: a pipeline with the plan's attention in it already; None loads one.
    Raises: WeightsError where weights are broken or do not fit, EnvironmentProblem where the kernels do not run.
    """

    def __init__(self, plan: Plan, text_encoder: bool = True, pipe: Any = None) -> None:
        self.tokenizer = None if pipe is None else pipe.tokenizer
        if pipe is not None:
            self.pipe, self.about = pipe, {"model": plan.weights.source.name}
            return
        weights, vae = plan.weights, plan.config.vae
        method = plan.method
        if plan.backend is not None and method.check is not None:
            method.check(plan.backend, weights.source.head_dim, weights.device, weights.dtype, plan.attention)
        self.pipe = load_pipeline(
            weights.source, weights.device, weights.dtype, None if vae is None else user_path(vae),
            text_encoder=text_encoder,
        )  # fmt: skip
        self.tokenizer = self.pipe.tokenizer
        self.about = _install_attention(self.pipe, plan)

    @torch.inference_mode()
    def encode(self, plan: Plan) -> dict[str, torch.Tensor | None]:
        """The embeddings of a plan's prompt and, where it is guided, its negative prompt."""
        prompt, negative = self.pipe.encode_prompt(
            prompt=plan.config.prompt, negative_prompt=plan.config.negative_prompt,
            do_classifier_free_guidance=(plan.config.guidance_scale or 0) > 1,
            max_sequence_length=plan.weights.source.defaults.max_sequence_length, device=self.pipe._execution_device,
        )  # fmt: skip
        return {"prompt_embeds": prompt, "negative_prompt_embeds": negative}

    def cuts(self, plan: Plan) -> list[str]:
        """What to tell of a plan's prompt and negative prompt where the text encoder does not read them to the end."""
        limit = plan.weights.source.defaults.max_sequence_length
        texts = dict(zip(("prompt", "negative prompt"), texts_of(plan), strict=False))
        if self.tokenizer is None and any(may_be_cut(text, limit) for text in texts.values()):
            self.tokenizer = load_tokenizer(plan.weights.source.folder)
        told = {name: tell_cut(self.tokenizer, text, limit) for name, text in texts.items()}
        return [f"the {name} {quote(texts[name])} {cut}" for name, cut in told.items() if cut]

    def release_text_encoder(self) -> None:
        """Give its memory back: every prompt is encoded."""
        self.pipe.text_encoder = self.pipe.tokenizer = None
        free_memory()

    @torch.no_grad()
    def denoise(
        self, plan: Plan, embeds: dict[str, torch.Tensor | None], on_event: Callable[[Event], None]
    ) -> tuple[torch.Tensor, StepRecorder]:
        """One video's final latents, (1, C, T, h, w), and its steps. Raises SlagenError where they are not finite."""
        c, pipe = plan.config, self.pipe
        assert c.sampler is not None and c.flow_shift is not None and c.steps
        set_sampler(pipe, c.sampler, c.flow_shift, sigma_max=c.sigma_max or SIGMA_MAX, stochastic=not c.ode)
        for processor in processors(pipe.transformer) if plan.attention is not None else []:
            processor.config = plan.attention
        on_event(Event("stage", "denoise", num_steps=c.steps))
        latents, recorder = _denoise(pipe, plan, embeds, on_event)
        if not torch.isfinite(latents).all():
            raise SlagenError(
                f"the latents of seed {c.seed} are not finite, so no video was written. "
                "Try --dtype fp32, or --backend reference to see whether a kernel is at fault."
            )
        return latents, recorder

    @torch.inference_mode()
    def sample(
        self,
        plan: Plan,
        embeds: dict[str, torch.Tensor | None],
        stages: dict[str, float],
        on_event: Callable[[Event], None],
    ) -> Sample:
        """Denoise and decode one video. Raises SlagenError for latents that are not finite."""
        began = time.perf_counter()
        latents, recorder = self.denoise(plan, embeds, on_event)
        stages["denoise"] = time.perf_counter() - began

        on_event(Event("stage", "decode"))
        began = time.perf_counter()
        frames = decode_latents(self.pipe.vae, latents).numpy()
        stages["decode"] = time.perf_counter() - began
        warn_of_one_colour(frames, plan.config.seed or 0, on_event)
        return Sample(plan, frames, latents.float().cpu().contiguous(), recorder, stages, self.about, self.pipe.vae)


def warn_of_one_colour(frames: np.ndarray, seed: int, on_event: Callable[[Event], None]) -> None:
    """Tell that frames (F, H, W, 3) uint8 show nothing, where they do not."""
    if (frames == frames[0, 0, 0]).all():
        colour = ", ".join(map(str, frames[0, 0, 0]))
        on_event(Event("warning", f"every pixel of the video of seed {seed} has the RGB {colour}"))


def texts_of(plan: Plan) -> list[str]:
    """What the text encoder reads for a plan: the prompt and, where it is guided, the negative prompt."""
    guided = (plan.config.guidance_scale or 0) > 1
    return [plan.config.prompt, plan.config.negative_prompt or ""][: 2 if guided else 1]


def free_memory() -> None:
    """Give back what nothing refers to any more, so that the next video has room for it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def save(
    sample: Sample, path: Path, on_event: Callable[[Event], None] = lambda event: None, *, replace: bool = True
) -> Video:
    """Write a sampled video, its report, and its latents where they are kept: all of them, so that none describes
    another, but of what is beside the video only that which can be written. What lay there of a video that is replaced
    goes with it.

    Args:
        replace: files of these names; otherwise they stay, and it is an error.
    Raises: SlagenError.
    """
    config = sample.plan.config
    assert config.fps
    on_event(Event("stage", "write"))
    began = time.perf_counter()
    hashes = {
        "latents_hash": latents_hash(sample.latents),
        "frames_hash": hashlib.sha256(sample.frames.tobytes()).hexdigest(),
    }
    report_path, latents_path = path.with_suffix(".json"), path.with_suffix(SUFFIX)
    lost: dict[Path, Exception] = {}
    try:
        with staging(path.parent) as stage:
            video, latents = stage.folder / path.name, stage.folder / latents_path.name
            comment = report.comment(sample.plan.told, hashes["latents_hash"], hashes["frames_hash"], sample.weights)
            encode_mp4(sample.frames, video, config.fps, comment)
            sample.stages["write"] = time.perf_counter() - began
            content = _report(sample, video, **hashes)
            going = []
            try:
                write_json(stage.folder / report_path.name, content)
            except OSError as error:
                lost[report_path] = error
                going.append(report_path.name)
            try:
                if config.save_latents:
                    write_latents(latents, sample.latents, weights_hash(sample.vae), content)
            except (OSError, SafetensorError) as error:
                lost[latents_path] = error
                latents.unlink(missing_ok=True)
            if not latents.exists():
                going += latents_beside(path)
            stage.publish(replace=replace, without=tuple(going))
    except OSError as error:
        raise _kept(sample, path, not_written(path, error), hashes) from error
    if lost:
        names = " and ".join(map(str, lost))
        text = f"{path} is written, but {names} could not be ({next(iter(lost.values()))}). Check the free space there."
        if latents_path in lost:
            kept = keep_latents(path, sample.latents, weights_hash(sample.vae), content)
            text += " The latents are lost." if kept is None else f" The latents are kept in {kept}."
        raise SlagenError(text) from next(iter(lost.values()))
    return Video(path, report_path, content, latents_path if config.save_latents else None)


def _kept(sample: Sample, path: Path, error: SlagenError, hashes: dict[str, str]) -> SlagenError:
    """What is said where a video could not be written: its latents are kept, and this command goes on from them."""
    kept = keep_latents(path, sample.latents, weights_hash(sample.vae), _report(sample, path, **hashes))
    if kept is None:
        return SlagenError(f"{error} Its latents could not be written either.")
    command = f"slagen decode {shlex.quote(str(kept))}"
    if kept.with_name(kept.name.removesuffix(SUFFIX) + ".mp4") != path:
        command += f" --output {shlex.quote(str(path))}"
    config = sample.plan.config
    for option, value in (("--model", config.model), ("--vae", config.vae)):
        if value is not None and report.shareable(value) != value:  # what the file itself does not say
            command += f" {option} {shlex.quote(value)}"
    return SlagenError(f"{error} What was sampled is kept; this makes the video of it: {command}")


def _install_attention(pipe: Any, plan: Plan) -> dict[str, Any]:
    """Put the planned attention into the pipeline; returns what the report says of the weights."""
    weights, source, config = plan.weights, plan.weights.source, plan.config
    found: dict[str, Any] = {
        "model": source.name, "model_file": None if source.weights is None else report.shareable(str(source.weights)),
        "model_hash": weights_hash(pipe.transformer), "sla_file": None, "sla_hash": None,
    }  # fmt: skip
    method = plan.method
    if not method.needs.weights:
        install_method(pipe.transformer, method, plan.attention, backend=config.backend)
        attention = "full" if method.family == "dense" else method.name
        return {**found, "used": "base" if source.weights is None else f"the same weights, {attention} attention"}
    branches = branches_of(method)
    assert plan.sla is not None
    if weights.sla_path is None:
        apply_sla(pipe, plan.sla, backend=config.backend, branches=branches)  # type: ignore[arg-type]
        return {**found, "used": "base with untrained SLA"}
    options: dict[str, Any] = {
        "backend": config.backend, "branches": branches, "allow_untrained": config.allow_untrained,
    }  # fmt: skip
    if not weights.sla_alone:
        install_projections(pipe, weights.sla_path, plan.sla, **options)
        return {**found, "used": "SLA", "sla_file": report.shareable(str(weights.sla_path))}
    metadata: SLAMetadata = load_sla(
        pipe, weights.sla_path, config=plan.sla, other_blocks=True, base_hash=found["model_hash"], **options
    )  # fmt: skip
    file = find_sla_file(weights.sla_path)
    return {**found, "used": "SLA", "sla_file": report.shareable(str(file)), "sla_hash": file_hash(file),
            "trained": metadata.trained, "trained_steps": metadata.steps,
            "trained_sparsity": metadata.config.sparsity}  # fmt: skip


def _denoise(
    pipe: Any, plan: Plan, embeds: dict[str, Any], on_event: Callable[[Event], None]
) -> tuple[Any, StepRecorder]:
    """Run the sampling loop; returns the final latents (1, C, T, h, w) and the recorder with its steps."""
    config = plan.config
    recorder = StepRecorder(plan.weights.device.type, config.timing)
    detach = attach_recorder(pipe.transformer, recorder)

    def after_step(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        step = recorder.end_step(float(timestep))
        end_step()
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
    with contextlib.ExitStack() as stack:
        stack.callback(detach)
        end_step = stack.enter_context(denoising(pipe.transformer, config.steps or 0))
        recorder.begin_step()
        output = pipe(
            **embeds, height=config.height, width=config.width, num_frames=config.num_frames,
            num_inference_steps=config.steps, guidance_scale=config.guidance_scale, generator=generator,
            output_type="latent", callback_on_step_end=after_step,
            max_sequence_length=plan.weights.source.defaults.max_sequence_length,
        )  # fmt: skip
    return output.frames, recorder


def _report(sample: Sample, path: Path, latents_hash: str, frames_hash: str) -> dict[str, Any]:
    """The report of a video, whose file may not be there yet."""
    plan, stages, recorder = sample.plan, sample.stages, sample.recorder
    config, method, steps = plan.config, plan.method, recorder.steps
    shape = plan.weights.source.shape
    attention = {
        "mode": config.attention, "tokens": plan.num_tokens, **method.describe(plan.attention, plan.num_tokens),
        **({} if plan.backend is None else {"backend": plan.backend}),
    }  # fmt: skip
    flops = method.cost(plan.attention, shape, plan.num_tokens)
    passes = len(steps) * (2 if (config.guidance_scale or 0) > 1 else 1)
    return {
        "schema_version": report.SCHEMA_VERSION,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "video": report.video_section(path, sample.frames.shape, config.fps or 1, frames_hash),
        "settings": plan.told,
        "versions": report.versions(),
        "device": machine.describe_device(plan.weights.device),
        "weights": sample.weights,
        "latents_hash": latents_hash,
        "attention": attention,
        "stages_s": {**stages, "total": sum(stages.values())},
        "since_process_start_s": time.time() - psutil.Process().create_time(),
        "peak_memory_gib": machine.peak_memory_gib(plan.weights.device),
        "steps": report.step_section(steps),
        "layers": report.layer_section(steps),
        "cost": report.cost_section(shape, plan.num_tokens, passes, flops, steps),
        "timing": report.timing_section(config.timing, steps, recorder.clock.cost_ms() if recorder.enabled else 0.0),
    }  # fmt: skip


@contextlib.contextmanager
def _claimed_paths(plan: Plan) -> Iterator[list[Path]]:
    """The final paths of all videos, which no other run writes meanwhile.

    Raises: UsageError if one exists, SlagenError if another run has it or the folder takes no files.
    """
    config = plan.config
    output = user_path(config.output)
    if is_video(config.output):
        if config.num_videos > 1:
            raise UsageError(
                f"{output} is one file, but --num-videos is {config.num_videos}. Give a folder with --output."
            )
        paths = [output]
    else:
        paths = [output / f"{_file_stem(plan, i)}.mp4" for i in range(config.num_videos)]
    folder = paths[0].parent
    try:
        check_writable(folder)
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
    # runs whose names are the same have the same first one; a report is one's own too: of v.mp4 and v.MP4 it is v.json
    with reserved(paths[0], paths[0].with_suffix(".json")):
        for path in paths:
            companions = [path, path.with_suffix(".json")]
            if config.save_latents:
                companions.append(path.with_suffix(SUFFIX))
            for file in companions:
                if file.is_dir() or (os.path.lexists(file) and not config.overwrite):
                    raise UsageError(
                        f"{file} exists. Choose another --output or --seed, or replace it with --overwrite."
                    )
        yield paths


def _file_stem(plan: Plan, index: int) -> str:
    """`<index>-<slug>-s<seed>-<hash>`; the hash tells settings apart that the rest of the name does not."""
    settings = {k: v for k, v in plan.settings.items() if k not in ("output", "overwrite", "save_latents", "timing")}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    return f"{index + 1:04d}-{plan.config.slug}-s{(plan.config.seed or 0) + index}-{digest}"
