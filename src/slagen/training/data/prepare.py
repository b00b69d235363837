"""Prepare a data set for training: encode its videos or generate them, into a folder that can be resumed."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch
from filelock import Timeout

from slagen.errors import SlagenError, UsageError
from slagen.events import Event
from slagen.generation.config import GenerateConfig
from slagen.generation.resolve import find_weights
from slagen.interrupts import telling_what_is_kept
from slagen.io.files import write_json
from slagen.io.locks import locked_folder
from slagen.io.paths import check_utf8, user_path
from slagen.training.config import DataConfig
from slagen.training.data.dataset import VERSION, Dataset
from slagen.training.data.encode import encode_videos
from slagen.training.data.job import Job
from slagen.training.data.self_generate import generate_clips
from slagen.training.data.store import SET_FILE, Store
from slagen.wan.folder import check_image


def prepare(
    config: DataConfig, base: GenerateConfig, folder: Path, cache: Path, seed: int, on_event: Callable[[Event], None]
) -> Dataset:
    """Encode a set of videos, or generate one with the dense model, into a folder; existing clips are kept.

    Args:
        base: model, device and dtype; its weights, if any, are a whole transformer.
        seed: chooses the held-out clips, and the noise of generated ones.
    Raises: UsageError with every fault of the set, WeightsError for a broken model.
    """
    if base.dtype == "fp16":
        raise UsageError(
            "--dtype fp16 is not precise enough for data sets, because small values become 0. Try --dtype bf16 or "
            "--dtype fp32."
        )
    weights = find_weights(
        dataclasses.replace(base, attention="dense", backend="auto"),
        lambda text: on_event(Event("note", text)), transformer=config.self_generate is not None,
    )  # fmt: skip
    check_image(weights.source.name, weights.source.takes_image, False)
    if weights.dtype == torch.float16:  # picked for a GPU without bf16
        weights = dataclasses.replace(weights, dtype=torch.float32)
    check_utf8(folder)
    raw = None if config.path is None else user_path(config.path)
    if raw is not None and raw.is_dir() and folder.resolve().is_relative_to(raw.resolve()):
        raise UsageError(f"{folder} is inside the data set {raw} and would become part of it. Give another --output.")
    try:
        kept = f"The clips that are prepared are kept in {folder}. Run the same command again to prepare the rest."
        with telling_what_is_kept(lambda: kept), locked_folder(folder):
            return _prepare(Job(config, base, weights, Store(folder), cache, seed, on_event))
    except Timeout as error:
        raise SlagenError(
            f"another slagen run is preparing {folder}. Wait for it, or give another --output."
        ) from error
    except OSError as error:
        raise SlagenError(
            f"{error.filename or folder} cannot be read or written ({error.strerror or error}). Fix this and run again."
        ) from error


def _prepare(job: Job) -> Dataset:
    """Make what is missing, then write what the set consists of."""
    store, source = job.store, job.source
    store.sweep()
    store.drop_changed()
    made = (encode_videos if job.config.self_generate is None else generate_clips)(job)
    store.flush()
    content = {
        "version": VERSION, "identity": job.encoder_identity(), "model": source.name, "negative": made.negative,
        "negative_prompt": source.defaults.negative_prompt, "fps": made.fps,
        "clips": [dataclasses.asdict(clip) for clip in made.clips],
    }  # fmt: skip
    try:
        write_json(store.folder / SET_FILE, content)
    except OSError as error:
        raise SlagenError(
            f"{store.folder / SET_FILE} could not be written ({error}). Free some space and run again."
        ) from error
    return Dataset(store.folder)
