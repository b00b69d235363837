"""Refuse a run before torch is imported: a path that does not exist, an unknown model, a video that exists."""

from __future__ import annotations

import os
from pathlib import Path

from slagen import torchrun
from slagen.errors import UsageError
from slagen.formats.headers import check_weights
from slagen.generation.config import GenerateConfig
from slagen.generation.latents import SUFFIX
from slagen.generation.lora import read_lora_option
from slagen.generation.picture import look_at
from slagen.io.paths import check_not_taken, is_video, user_path
from slagen.io.reading import open_regular
from slagen.wan.folder import check_image, describe_folder
from slagen.wan.presets import local_folder


def check_run(config: GenerateConfig) -> None:
    """Look at all that one call of `slagen generate` reads and writes.

    Raises: as `check_model`; UsageError for a video that exists, and for a denoising step that there is not.
    """
    if config.image is not None:
        look_at(config.image)
    check_model(config.model, config.weights, config.vae, image=config.image is not None)
    for text in config.lora:
        check_weights(user_path(read_lora_option(text).path))
    check_steps(config)
    check_output(config)
    check_trace(config)


def check_processes(config: GenerateConfig, elsewhere: str = "") -> None:
    """Raise UsageError for what the processes that torchrun started cannot do together, and for --cfg-parallel alone.

    Args:
        elsewhere: an option by which the command does something else than to make one video, in one process.
    """
    size, start = torchrun.size(), "torchrun --nproc-per-node 2 -m slagen generate"
    if config.cfg_parallel and elsewhere == "--prompts":
        raise UsageError("--cfg-parallel is for one video, but --prompts gives many. Leave one of them out.")
    if config.cfg_parallel and size == 1 and not elsewhere:
        raise UsageError(
            f"--cfg-parallel needs an even number of processes. Start them with {start}, or leave --cfg-parallel out."
        )
    if size == 1:
        return
    if elsewhere:
        raise UsageError(
            f"{elsewhere} runs in one process, but torchrun started {size} processes. Start slagen without torchrun."
        )
    if config.cfg_parallel and size % 2:
        raise UsageError(
            f"--cfg-parallel needs an even number of processes, but torchrun started {size}. Try {start}, or leave "
            "--cfg-parallel out."
        )
    if config.cfg_parallel and config.guidance_scale is not None and config.guidance_scale <= 1:
        raise one_pass(config.guidance_scale)
    if config.offload not in ("auto", "none"):
        raise UsageError(
            f"--offload {config.offload} does not run in several processes: each keeps its model on its own GPU. Leave "
            "--offload out."
        )
    alone = {"--measure-dense": config.measure_dense, "--compile": config.compile, "--cache": config.cache}
    for option, given in alone.items():
        if given:
            raise UsageError(f"{option} runs in one process. Leave it out, or start slagen without torchrun.")
    if config.device.startswith("cuda:"):
        raise UsageError(
            f"--device {config.device} names one GPU, but under torchrun each process takes its own. Try --device cuda."
        )


def one_pass(guidance_scale: float) -> UsageError:
    """What is said of --cfg-parallel without guidance."""
    return UsageError(
        "--cfg-parallel computes the two passes of guidance at the same time, but the guidance scale is "
        f"{guidance_scale:g}, so there is only one pass. Leave --cfg-parallel out, or give a --guidance-scale above 1."
    )


PREVIEW = ".preview.png"
PREVIEW_MARK = "slagen preview"  # what a picture says of who wrote it


def is_preview(path: Path) -> bool:
    """Whether a file is a picture of --preview, as a run that was killed leaves it."""
    try:
        with open_regular(path) as handle:
            return PREVIEW_MARK.encode() in handle.read(256)
    except OSError:
        return False


def check_trace(config: GenerateConfig) -> None:
    """Raise UsageError for a trace that would replace what is there, unless that is wanted."""
    if config.trace is None:
        return
    file = user_path(config.trace)
    if file.is_dir() or (os.path.lexists(file) and not config.overwrite):
        raise UsageError(f"{file} exists. Choose another --trace, or replace it with --overwrite.")


def check_steps(config: GenerateConfig) -> None:
    """Raise UsageError for a denoising step that there is not, where their number is given."""
    if config.steps is not None:
        config.policy.check_steps(config.steps)


def check_model(
    model: str | None, weights: str | None = None, vae: str | None = None, *, image: bool | None = False
) -> None:
    """Check what a model is loaded from by its small files and the headers of safetensors files.

    Args: image: whether videos begin with one; None where some may.
    Raises: UsageError for an unknown model, a path that does not exist, and a model that needs an image or takes none;
        WeightsError for broken files.
    """
    for path in (weights, vae):
        if path is not None:
            check_weights(user_path(path))
    folder = None if model is None else local_folder(model)
    if folder is not None:
        source = describe_folder(folder, folder.resolve().name)
        if image is not None:
            check_image(source.name, source.takes_image, image)


def check_output(config: GenerateConfig) -> None:
    """Raise UsageError for one video's file that cannot be written; a folder's names are not known yet."""
    if not is_video(config.output):
        return
    output = user_path(config.output)
    if config.num_videos > 1:
        raise UsageError(
            f"{output} is a single file, but --num-videos is {config.num_videos}. Give a folder with --output."
        )
    check_free(output, config)


def check_free(video: Path, config: GenerateConfig) -> None:
    """Raise UsageError where a video, its report or its latents would replace what is there, unless that is wanted."""
    latents = [video.with_suffix(SUFFIX)] if config.save_latents else []
    page = [video.with_suffix(".html")] if config.report else []
    picture = [video.with_suffix(PREVIEW)] if config.preview else []
    pictures = [path for path in picture if not is_preview(path)]
    for file in (video, video.with_suffix(".json"), *latents, *page, *pictures):
        check_not_taken(file, config.overwrite, "--output or --seed")
