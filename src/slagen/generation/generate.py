"""generate(GenerateConfig) -> GenerateResult: one prompt, one or more videos, each with its report."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import shlex
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from safetensors import SafetensorError

from slagen import machine
from slagen.errors import SlagenError
from slagen.events import Event, nth
from slagen.formats.sla import weights_hash
from slagen.generation import memory, report
from slagen.generation.config import GenerateConfig, vae_bytes
from slagen.generation.frames import EncodedFrames, Frames
from slagen.generation.latents import SUFFIX, keep_latents, latents_beside, latents_hash, write_latents
from slagen.generation.pages import is_report_page
from slagen.generation.preflight import check_free, check_output, check_trace
from slagen.generation.preview import Preview
from slagen.generation.prompt_cache import PromptCache
from slagen.generation.report_page import Shown, report_page
from slagen.generation.resolve import Plan
from slagen.generation.result import GenerateResult, Video
from slagen.generation.sample import Sample
from slagen.generation.session import Session
from slagen.generation.sharing import ALONE, Sharing, sharing
from slagen.generation.stage_clock import StageClock
from slagen.generation.trace import write_trace
from slagen.interrupts import telling_what_is_kept
from slagen.io.files import check_writable, delete, reserved, write_json, write_text
from slagen.io.paths import FRAMES, GIF, is_video, kind_of_output, user_path
from slagen.io.text import counted
from slagen.video import check_ffmpeg, not_written

CPU = torch.device("cpu")
PIXEL_BYTES = {GIF: 1, FRAMES: 3}  # at most; of the others a quarter


def generate(
    config: GenerateConfig,
    on_event: Callable[[Event], None] = lambda event: None,
    *,
    from_python: bool = False,
    write: bool = True,
) -> GenerateResult:
    """Make the videos that a config asks for.

    Args:
        config: what to make.
        on_event: called for every stage, step, note and warning.
        from_python: hand back the frames too, and do not count the time since the process began.
        write: False writes no file, wherever the config's output is.
    Returns: the videos, each written with its report. Under torchrun, all processes make them together, and the first
        has them; a call from Python runs in its process alone.
    Raises: SlagenError of some kind. Videos that were finished before stay.
    """
    clock = StageClock(0.0 if from_python else machine.process_age_s())
    clock.begin("prepare")
    check_ffmpeg(kind_of_output(config.output))
    with nullcontext(ALONE) if from_python else sharing(config) as shared:
        tell = on_event if shared.first else lambda event: None
        plan = shared.plan(config, lambda text: tell(Event("note", text)))
        with enough_gpu_memory(plan.config):
            return GenerateResult(_run(plan, clock, tell, from_python, write and shared.first, shared))


@contextmanager
def enough_gpu_memory(config: GenerateConfig) -> Iterator[None]:
    """Raise SlagenError where the GPU runs out of memory for videos of a config within the block."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise SlagenError(
            f"the GPU ran out of memory at {config.width}x{config.height}, {counted(config.num_frames or 0, 'frame')}. "
            "Try a lower --num-frames or a smaller --size."
        ) from error


def check_memory(plan: Plan, *, loaded: bool = False, text_encoder: bool = True) -> str | None:
    """A warning where a CPU may not have the memory for a video. Raises SlagenError where it surely has not.

    Args:
        loaded: whether the weights are there already. text_encoder: whether it is loaded.
    """
    weights, config = plan.weights, plan.config
    if weights.device != CPU:
        return None
    assert config.width and config.height and config.num_frames
    size = (config.width, config.height, config.num_frames)
    merges = bool(config.lora) and not config.live_lora
    parts = (*["text_encoder"] * text_encoder, "transformer", "vae")
    needed = memory.need(weights.source, *size, weights.dtype.itemsize, parts=parts, merges=merges,
                         vae_bytes=vae_bytes(config))  # fmt: skip
    needed = needed.keeping(plan.remembered.num_bytes)
    return memory.check(dataclasses.replace(needed, weights=0, fresh=0) if loaded else needed, *size)


def _run(
    plan: Plan, clock: StageClock, on_event: Callable[[Event], None], from_python: bool, write: bool, shared: Sharing
) -> list[Video]:
    for text in plan.notes:
        on_event(Event("note", text))
    for text in plan.warnings:
        on_event(Event("warning", text))
    prompts = PromptCache([plan], on_event, use=shared.first)
    if (doubt := check_memory(plan, text_encoder=not prompts.known)) is not None:
        on_event(Event("warning", doubt))
    with _claimed_paths(plan) if write else nullcontext() as paths:
        shared.member.wait()
        return _make(plan, prompts, clock, paths, on_event, from_python, shared)


def _make(
    plan: Plan, prompts: PromptCache, clock: StageClock, paths: list[Path] | None, on_event: Callable[[Event], None],
    from_python: bool, shared: Sharing,
) -> list[Video]:  # fmt: skip
    clock.begin("load")
    memory = machine.PeakMemory(plan.weights.device)
    clock.watch(memory)
    on_event(Event("stage", "load"))
    session = shared.load(plan, prompts, on_event)

    clock.begin("text")
    embeds = shared.encode(session, prompts, plan)
    for text in session.cuts(plan):
        on_event(Event("warning", text))
    session.release_text_encoder()

    videos: list[Video] = []
    with telling_what_is_kept(lambda: _kept_so_far(plan.config, len(videos))):
        for index in range(plan.config.num_videos):
            config = dataclasses.replace(plan.config, seed=(plan.config.seed or 0) + index)
            one = dataclasses.replace(plan, config=config)
            about = nth("video", index + 1, plan.config.num_videos, config.prompt)
            on_event(Event("run", num_steps=plan.config.num_videos, done=index, about=about))
            path = paths[index] if paths else None
            streamed = path if shared.member.size == 1 else None  # what others did is told when all are done
            with _previewing(one, session, path, on_event) as preview, taking(one, streamed, from_python) as taken:
                sample = shared.sample(session, one, embeds, clock, on_event, preview, *taken)
                if sample is None:
                    continue
                video = _unwritten(sample) if path is None else save(sample, path, on_event, replace=config.overwrite)
            if config.trace is not None:
                write_trace(sample, user_path(config.trace))
                on_event(Event("note", f"the trace is in {config.trace}; open it at ui.perfetto.dev"))
            videos.append(dataclasses.replace(video, frames=sample.frames.whole() if from_python else None))
            clock = StageClock()  # start, load and text are shared: counted once, with the first video
            clock.watch(memory)
    return videos


@contextmanager
def taking(plan: Plan, path: Path | None, keep: bool) -> Iterator[tuple[Frames, Callable[[Sample], None]]]:
    """What takes the frames of a video, and encodes them for a path; and what it is told before the first."""
    if path is None:
        yield Frames(), lambda sample: None
        return
    config = plan.config
    assert config.fps
    with EncodedFrames(path, config.fps, config.crf, keep) as frames:

        def begin(sample: Sample) -> None:
            frames.comment = functools.partial(_comment, sample)

        yield frames, begin


@contextmanager
def _previewing(
    plan: Plan, session: Session, video: Path | None, on_event: Callable[[Event], None]
) -> Iterator[Preview | None]:
    """The preview of one video, which goes when the block ends; None where none is asked for."""
    if plan.config.preview is None or video is None:
        yield None
        return
    preview = Preview(video, plan.config.preview, session.pipe.vae, on_event)
    try:
        yield preview
    finally:
        preview.close()


def _kept_so_far(config: GenerateConfig, made: int) -> str:
    """What an interrupted run says of the videos that it has made."""
    total, seed = config.num_videos, (config.seed or 0) + made
    if total == 1:
        return f"No video was written. Run the same command again, with --seed {seed} for the same noise."
    return (
        f"Videos complete: {made} of {total}. To generate the rest, run the same command with --seed {seed} "
        f"--num-videos {total - made}."
    )


def _hashes(sample: Sample) -> dict[str, str]:
    return {
        "latents_hash": latents_hash(sample.latents),
        "frames_hash": sample.frames.sha256,
    }


def _comment(sample: Sample, frames_hash: str) -> str:
    """What the video's file says of itself; empty where it is to say nothing."""
    if sample.plan.config.no_metadata:
        return ""
    return report.comment(report.recorded(sample), latents_hash(sample.latents), frames_hash, sample.weights)


def _unwritten(sample: Sample) -> Video:
    """A video that stays in memory; its report names no file."""
    record = report.video_report(sample, None, **_hashes(sample))
    return Video(None, None, dataclasses.replace(record, settings={**record.settings, "output": None}))


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
    sample.clock.begin("write")
    on_event(Event("stage", "write"))
    hashes = _hashes(sample)
    report_path, latents_path, page_path = (path.with_suffix(suffix) for suffix in (".json", SUFFIX, ".html"))
    lost: dict[Path, Exception] = {}
    try:
        with sample.frames.staged(path, config.fps, functools.partial(_comment, sample), config.crf) as stage:
            video, latents = stage.folder / path.name, stage.folder / latents_path.name
            record = report.video_report(sample, video, **hashes)
            going = [] if config.report or not is_report_page(page_path) else [page_path.name]  # that of the old video
            try:
                write_json(stage.folder / report_path.name, record.to_dict())
            except OSError as error:
                lost[report_path] = error
                going.append(report_path.name)
            try:
                if config.report:
                    page = report_page(
                        [Shown(report_path.name, record, video.read_bytes() if video.is_file() else None)]
                    )
                    write_text(stage.folder / page_path.name, page)
            except OSError as error:
                lost[page_path] = error
                going.append(page_path.name)
            try:
                if config.save_latents:
                    write_latents(latents, sample.latents, weights_hash(sample.vae), record)
            except (OSError, SafetensorError) as error:
                lost[latents_path] = error
                delete(latents)
            if not latents.exists():
                going += latents_beside(path)
            stage.publish(replace=replace, without=tuple(going))
    except OSError as error:
        raise _kept(sample, path, not_written(path, error), hashes) from error
    if lost:
        names = " and ".join(map(str, lost))
        reason = next(iter(lost.values()))
        text = f"{path} was written, but {names} could not be written ({reason}). Check the free space on that disk."
        if latents_path in lost:
            kept = keep_latents(path, sample.latents, weights_hash(sample.vae), record)
            text += " The latents are lost." if kept is None else f" The latents are kept in {kept}."
        raise SlagenError(text) from next(iter(lost.values()))
    return Video(path, report_path, record, latents_path if config.save_latents else None)


def _kept(sample: Sample, path: Path, error: SlagenError, hashes: dict[str, str]) -> SlagenError:
    """What is said where a video could not be written: its latents are kept, and this command goes on from them."""
    kept = keep_latents(path, sample.latents, weights_hash(sample.vae), report.video_report(sample, path, **hashes))
    if kept is None:
        return SlagenError(f"{error} The latents could not be written either.")
    command = f"slagen decode {shlex.quote(str(kept))}"
    if kept.with_name(kept.name.removesuffix(SUFFIX) + ".mp4") != path:
        command += f" --output {shlex.quote(str(path))}"
    config = sample.plan.config
    command += "" if config.crf is None else f" --crf {config.crf}"
    command += " --no-metadata" if config.no_metadata else ""
    for option, value in (("--model", config.model), ("--vae", config.vae)):
        if value is not None and report.shareable(value) != value:  # what the file itself does not say
            command += f" {option} {shlex.quote(value)}"
    return SlagenError(f"{error} The latents are saved. To decode them, run: {command}")


@contextmanager
def _claimed_paths(plan: Plan) -> Iterator[list[Path]]:
    """The final paths of all videos, which no other run writes meanwhile.

    Raises: UsageError if one exists, SlagenError if another run has it or the folder is not writable.
    """
    config = plan.config
    output = user_path(config.output)
    if is_video(config.output):
        check_output(config)
        paths = [output]
    else:
        paths = [output / f"{_file_stem(plan, i)}.mp4" for i in range(config.num_videos)]
    folder = paths[0].parent
    try:
        check_writable(folder)
    except OSError as error:
        raise SlagenError(
            f"{folder} is not writable ({error.strerror or error}). Give a folder you can write to with --output."
        ) from error
    num_pixels = (config.num_frames or 0) * (config.width or 0) * (config.height or 0)
    needed = config.num_videos * (2**20 + int(num_pixels * PIXEL_BYTES.get(kind_of_output(config.output), 0.25)))
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise SlagenError(
            f"{folder} has {free / 2**20:.1f} MiB free, but the videos may need {needed / 2**20:.1f} MiB. "
            "Free some space, or give another folder with --output."
        )
    # runs whose names are the same have the same first one; a report is one's own too: of v.mp4 and v.MP4 it is v.json
    traces = [] if config.trace is None else [user_path(config.trace)]
    with reserved(paths[0], paths[0].with_suffix(".json"), *traces):
        check_trace(config)
        for path in paths:
            check_free(path, config)
        yield paths


def _file_stem(plan: Plan, index: int) -> str:
    """`<index>-<slug>-s<seed>-<hash>`; the hash tells apart settings that the rest of the name leaves out."""
    settings = {k: v for k, v in plan.settings.items() if k not in ("output", "overwrite", "save_latents", "timing")}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    return f"{index + 1:04d}-{plan.config.slug}-s{(plan.config.seed or 0) + index}-{digest}"
