"""decode(path) -> the video of latents that a run kept, with the report and metadata that it would have had."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from slagen import machine, packages
from slagen.errors import SlagenError, UsageError, WeightsError
from slagen.events import Event, loaded_parts
from slagen.formats.sla import weights_hash
from slagen.generation import memory, report
from slagen.generation.config_checks import check_encoding
from slagen.generation.frames import EncodedFrames, decode_into
from slagen.generation.generate import CPU
from slagen.generation.latents import SUFFIX, latents_beside, read_latents
from slagen.generation.placing import choose_placement, move, sizes_of
from slagen.generation.result import GenerateResult, Video
from slagen.generation.video_report import Decoded, VideoReport
from slagen.interrupts import telling_what_is_kept
from slagen.io.files import check_writable, reserved, write_json
from slagen.io.paths import check_not_taken, check_video, kind_of, user_path
from slagen.video import check_ffmpeg, not_written
from slagen.wan.folder import ModelSource
from slagen.wan.loading import load_pipeline
from slagen.wan.models import check_recorded_model, resolve_model
from slagen.wan.vae import vae_dtype_of

LESS = "Close other programs, or use --device cuda if there is a GPU"  # of this machine's memory


def decode(
    path_text: str, output: str | None = None, *, overwrite: bool = False, model: str | None = None,
    vae: str | None = None, device: str = "auto", local_files_only: bool = False, crf: int | None = None,
    no_metadata: bool = False,
    on_event: Callable[[Event], None] = lambda event: None,
) -> GenerateResult:  # fmt: skip
    """Make the video of a file of latents.

    Args:
        output: the video's file; None: the latents' name with .mp4.
        model, vae: where they lie, if not where the file says.
        crf, no_metadata: see GenerateConfig.
    Raises: WeightsError for a damaged file or another VAE, UsageError for a video that exists or a model that only the
        file names and would be downloaded, EnvironmentProblem without ffmpeg.
    """
    path = user_path(path_text)
    latents, about = read_latents(path)
    recorded = about.report
    target = _target(path, output)
    check_encoding(str(target), crf, recorded.settings["fps"])
    check_ffmpeg(kind_of(target))
    if model is None:
        check_recorded_model(path, recorded.settings["model"])
    source = _find_model(path, model or recorded.settings["model"], local_files_only, on_event)
    size = _check_shape(path, latents, recorded.settings, source)
    place, own = machine.pick_device(device), vae or recorded.settings.get("vae")
    if place == CPU:
        needed = memory.need(source, *size, 4, parts=("vae",))
        if (text := memory.check(needed, *size, advice=LESS)) is not None:
            on_event(Event("warning", text))
    with reserved(target, target.with_suffix(".json")):
        for file in (target, target.with_suffix(".json")):
            check_not_taken(file, overwrite)
        check_writable(target.parent)
        on_event(Event("stage", "load"))
        pipe = load_pipeline(
            source, torch.float32, None if own is None else user_path(own), text_encoder=False,
            transformer=False, vae_dtype=vae_dtype_of(recorded.settings.get("vae_dtype")),
            on_part=loaded_parts(on_event),
        )  # fmt: skip
        decoder = pipe.vae
        if weights_hash(decoder) != about.vae_hash or latents.shape[1] != decoder.config.z_dim:
            raise WeightsError(
                f"{path} was generated for a different VAE than {own or f'that of {source.name}'}. Give the right VAE "
                "with --vae, or the folder of its model with --model."
            )
        placement = choose_placement(
            place, lambda: sizes_of(pipe, source.shape, 0, size, 4, vae_bytes=decoder.dtype.itemsize),
            lambda text: on_event(Event("note", text)), "none", _tiling(recorded),
        )  # fmt: skip
        move(pipe, place, placement)
        recorded = dataclasses.replace(recorded, placement=placement.to_record())
        kept = f"The latents in {path} are kept, and no video was written. Run the same command again."
        with telling_what_is_kept(lambda: kept):
            made = _write(recorded, latents, decoder, place, path, target, overwrite, crf, no_metadata, on_event)
            return GenerateResult([made])


def _write(
    recorded: VideoReport, latents: torch.Tensor, decoder: Any, place: torch.device, path: Path, target: Path,
    overwrite: bool, crf: int | None, no_metadata: bool, on_event: Callable[[Event], None],
) -> Video:  # fmt: skip
    """Decode latents, and write the video and its report."""

    def comment(frames_hash: str) -> str:
        if no_metadata:
            return ""
        return report.comment(
            settings, recorded.latents_hash, frames_hash, weights=recorded.weights, packages=recorded.versions
        )

    settings, stages = recorded.settings, {name: s for name, s in recorded.stages_s.items() if name != "total"}
    with EncodedFrames(target, settings["fps"], crf, keep=False) as frames:
        frames.comment = comment
        began = time.perf_counter()
        try:
            with torch.inference_mode():
                decode_into(frames, decoder, latents.to(place), on_event)
        except torch.OutOfMemoryError as error:
            raise SlagenError("the GPU ran out of memory. Try --device cpu.") from error
        stages["decode"] = time.perf_counter() - began
        frames.warn_of_one_colour(settings["seed"], on_event)
        on_event(Event("stage", "write"))
        began = time.perf_counter()
        if recorded.video.frames_hash != frames.sha256:
            text = (
                "the frames are not identical to those of the original run, which can happen on another device or with "
                "other package versions"
            )
            on_event(Event("note", text))
        return _publish(recorded, frames, comment, stages, began, place, path, target, overwrite)


def _publish(
    recorded: VideoReport, frames: EncodedFrames, comment: Callable[[str], str], stages: dict[str, float],
    began: float, place: torch.device, path: Path, target: Path, overwrite: bool,
) -> Video:  # fmt: skip
    """Write the video, whose writing began by `time.perf_counter`, and its report."""
    try:
        with frames.staged(target, frames.fps, comment, frames.crf) as stage:
            video = stage.folder / target.name
            stages["write"] = time.perf_counter() - began
            record = dataclasses.replace(
                recorded, created=datetime.now(UTC).isoformat(timespec="seconds"),
                video=report.video_section(video, frames.shape, frames.fps, frames.sha256),
                stages_s={**stages, "total": sum(stages.values())}, wall_s=None,
                decoded=Decoded(packages.versions(), machine.describe_device(place)),
            )  # fmt: skip
            write_json(stage.folder / target.with_suffix(".json").name, record.to_dict())
            beside = target.with_suffix(SUFFIX)
            own = beside.exists() and beside.samefile(path)
            stage.publish(replace=overwrite, without=() if own else tuple(latents_beside(target)))
    except OSError as error:
        raise not_written(target, error) from error
    return Video(target, target.with_suffix(".json"), record, path)


def _tiling(recorded: VideoReport) -> str:
    """As the run decoded that kept the latents, for tiles change the frames a little."""
    placement = recorded.placement
    asked = str(recorded.settings.get("vae_tiling", "auto"))
    return asked if placement is None or asked != "auto" else "on" if placement.vae_tiling else "auto"


def _target(path: Path, output: str | None) -> Path:
    """The video's file. Raises UsageError for one of another kind."""
    if output is None:
        return path.with_name(path.name.removesuffix(SUFFIX).removesuffix(".safetensors") + ".mp4")
    check_video(output)
    return user_path(output)


def _find_model(path: Path, model: str, local_files_only: bool, on_event: Callable[[Event], None]) -> ModelSource:
    """The model that latents were made with, of which the VAE is needed."""
    try:
        return resolve_model(
            model, "cpu", own_transformer=False, local_files_only=local_files_only,
            on_note=lambda text: on_event(Event("note", text)),
        )  # fmt: skip
    except UsageError as error:
        raise UsageError(
            f"{path} was made with the model {model!r}, which cannot be found. Give it with --model."
        ) from error


def _check_shape(
    path: Path, latents: torch.Tensor, settings: dict[str, Any], source: ModelSource
) -> tuple[int, int, int]:
    """Width, height and frames of the video. Raises WeightsError unless latents are of the size that their settings say
    and their model makes."""
    width, height = map(int, settings["size"].split("x"))
    rows, columns = height // source.spatial_factor, width // source.spatial_factor
    frames = (settings["num_frames"] - 1) // source.temporal_factor + 1
    if tuple(latents.shape[2:]) != (frames, rows, columns):
        raise WeightsError(
            f"{path} contains latents of shape {tuple(latents.shape[2:])}, but {settings['num_frames']} frames of "
            f"{settings['size']} have the shape {(frames, rows, columns)} in the model {source.name}. With --model, "
            "give the model that generated them."
        )
    return width, height, settings["num_frames"]
