"""Encode the videos and captions of a data set into latents and text embeddings."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from slagen.errors import UsageError
from slagen.events import Event, counted_parts, loaded_parts
from slagen.generation.embeddings import content_hashes
from slagen.generation.placing import choose_placement, move, sizes_of
from slagen.generation.resolve import Weights
from slagen.generation.sizes import check_grid
from slagen.io.files import append
from slagen.io.paths import user_path
from slagen.io.reading import digest
from slagen.io.text import counted, quote
from slagen.training.config import DataConfig
from slagen.training.data.clips import ClipSpec, plan_clips, raise_faults, read_clip
from slagen.training.data.dataset import Clip
from slagen.training.data.job import Job, Made, clip_event
from slagen.training.data.store import DECODED_FILE, Store
from slagen.training.data.videos import SourceVideo, find_videos
from slagen.wan.folder import ModelSource
from slagen.wan.loading import load_pipeline
from slagen.wan.placement import release_text_encoder
from slagen.wan.texts import describe_cut
from slagen.wan.vae import encode_video

MAX_WARNINGS = 10  # about truncated captions


@dataclasses.dataclass(frozen=True)
class _Pending:
    """A clip that is not in the store yet, and the name that its latents will have there."""

    name: str
    video: SourceVideo
    spec: ClipSpec


def encode_videos(job: Job) -> Made:
    """Encode the clips of a data set of videos; what is in the store already is kept.

    Raises: UsageError with every fault of the set, before anything is encoded.
    """
    assert job.config.path is not None
    largest = _largest_clip(job.config, job.source)
    videos, faults = find_videos(user_path(job.config.path))
    specs = _plan(job, videos, largest, faults)
    identity = job.encoder_identity()
    contents = content_hashes([video.path for video in videos], job.cache)
    names = [
        digest([identity, content, dataclasses.astuple(spec)]) for content, spec in zip(contents, specs, strict=True)
    ]
    held_out = _choose_held_out(job, names)
    negative = job.source.defaults.negative_prompt
    captions = [*(video.caption for video in videos), negative]
    texts = {text: text_name(identity, job.weights, text) for text in captions}
    first = {name: i for i, name in reversed(list(enumerate(names)))}  # a video may be there twice
    pending = [_Pending(names[i], videos[i], specs[i]) for i in sorted(first.values()) if names[i] not in job.store]
    _check_decoding(job, pending, faults)
    _encode(job, pending, texts)
    clips = {
        (name, video.caption): Clip(
            name, texts[video.caption], video.caption, job.store.shapes[name], name in held_out
        )
        for name, video in zip(names, videos, strict=True)
    }  # fmt: skip
    return Made(list(clips.values()), texts[negative], largest.fps)


def text_name(identity: str, weights: Weights, text: str) -> str:
    """The name of a caption's tensor: a hash of the caption and of what encodes it."""
    return digest([identity, str(weights.dtype), text])


def _largest_clip(config: DataConfig, source: ModelSource) -> ClipSpec:
    """The largest size and length of a clip. Raises UsageError for a size that the model does not take."""
    d = source.defaults
    width, height = config.width or d.width, config.height or d.height
    check_grid(width, height, source.spatial_grid)
    return ClipSpec(width, height, config.num_frames or d.num_frames, config.fps or d.fps)


def _plan(job: Job, videos: list[SourceVideo], largest: ClipSpec, faults: list[str]) -> list[ClipSpec]:
    """The clip of each video, with a note on those that are deinterlaced. Raises UsageError with every fault."""

    def look(number: int) -> None:
        job.emit(clip_event("reading", "video", number, len(videos), videos[number].path.name))

    grid = max(16, job.source.spatial_grid)
    specs = plan_clips(
        videos, largest, grid, faults, look, upscale=not job.config.no_upscale,
        own_length=job.source.defaults.num_frames,
    )  # fmt: skip
    names = [video.path.name for video, spec in zip(videos, specs, strict=True) if spec.interlaced]
    if names:
        text = f"deinterlacing {len(names)} of {counted(len(videos), 'video')} with the bwdif filter: {names[0]}"
        job.emit(Event("note", text + (f" and {len(names) - 1} more" if names[1:] else "")))
    return specs


def _choose_held_out(job: Job, names: list[str]) -> set[str]:
    """The clips that are never trained on, chosen by the seed. Raises UsageError where none would be left to train."""
    order = sorted(dict.fromkeys(names), key=lambda name: digest([job.seed, name]))
    count = job.config.held_out or min(16, max(1, len(order) // 10))
    if count >= len(order):
        raise UsageError(
            f"the data set has {counted(len(order), 'clip')}, but {count} would be held out for validation, so none "
            "would be left to train on. Give more videos."
        )
    return set(order[:count])


def _check_decoding(job: Job, pending: Sequence[_Pending], faults: list[str]) -> None:
    """Decode every clip once before the first is encoded: that costs little beside encoding, and every fault is known.

    Raises: UsageError with the faults, those known before among them.
    """
    file = job.store.folder / DECODED_FILE
    known = set(file.read_bytes().decode(errors="replace").split()) if file.is_file() else set()
    for number, clip in enumerate(pending):
        job.emit(clip_event("checking", "clip", number, len(pending), clip.video.path.name))
        if clip.name in known:
            continue
        try:
            read_clip(clip.video.path, clip.spec)
        except UsageError as error:
            faults.append(f"{clip.video.where}: {error}")
            continue
        append(file, f"{clip.name}\n".encode())
    raise_faults(faults)


def _encode(job: Job, pending: Sequence[_Pending], texts: dict[str, str]) -> None:
    """Encode the clips, and the captions that are not in the store yet."""
    missing = [text for text, name in texts.items() if name not in job.store]
    if pending or missing:
        job.emit(Event("stage", "load"))
        pipe = load_pipeline(
            job.source, job.weights.dtype, text_encoder=bool(missing), transformer=False,
            on_part=loaded_parts(job.emit),
        )  # fmt: skip
        _place(job, pipe, pending)
        encode_texts(pipe, missing, texts, job.store, job.source, job.emit)
        release_text_encoder(pipe)
    try:
        for number, clip in enumerate(pending):
            job.emit(clip_event("encoding", "clip", number, len(pending), clip.video.path.name))
            frames = torch.from_numpy(read_clip(clip.video.path, clip.spec))
            with torch.inference_mode():
                job.store.add(clip.name, encode_video(pipe.vae, frames), str(clip.video.path))
    finally:
        job.store.flush()


def _place(job: Job, pipe: Any, pending: Sequence[_Pending]) -> None:
    """Move the VAE and the text encoder to the device; one at a time where it has not the memory for both."""
    specs = [clip.spec for clip in pending]
    largest = max(specs, key=lambda spec: spec.width * spec.height * spec.num_frames, default=None)
    size = (0, 0, 0) if largest is None else (largest.width, largest.height, largest.num_frames)
    weights = job.weights
    sizes = lambda: sizes_of(pipe, job.source.shape, 0, size, weights.dtype.itemsize)  # noqa: E731
    note = lambda text: job.emit(Event("note", text))  # noqa: E731
    move(pipe, weights.device, choose_placement(weights.device, sizes, note, vae_tiling="off", whole=True))


@torch.inference_mode()
def encode_texts(
    pipe: Any, missing: list[str], texts: dict[str, str], store: Store, source: ModelSource,
    on_event: Callable[[Event], None],
) -> None:  # fmt: skip
    """Encode captions into the store, with a warning for those that are longer than the model reads."""
    if missing:
        on_event(Event("stage", "text", num_steps=len(missing)))
    limit = source.defaults.max_sequence_length
    cuts = [
        f"the caption {quote(text)} {cut}" for text in missing if (cut := describe_cut(pipe.tokenizer, text, limit))
    ]
    for number, warning in enumerate(cuts[:MAX_WARNINGS]):
        more = f" ({len(cuts)} captions are truncated)" if number + 1 == MAX_WARNINGS < len(cuts) else ""
        on_event(Event("warning", warning + more))
    advance = counted_parts(on_event, len(missing))
    for text in missing:
        embeds, _ = pipe.encode_prompt(
            prompt=text, do_classifier_free_guidance=False, device=pipe._execution_device,
            max_sequence_length=limit,
        )  # fmt: skip
        store.add(texts[text], embeds[0], f"the caption {quote(text)}")
        advance()
    store.flush()
