"""Encode the videos and captions of a data set into latents and text embeddings."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from slagen.errors import UsageError
from slagen.events import Event
from slagen.generation.config import GenerateConfig
from slagen.generation.embeddings import content_hashes
from slagen.generation.resolve import Weights
from slagen.io.files import append
from slagen.io.paths import user_path
from slagen.io.reading import digest
from slagen.io.text import counted, quote
from slagen.training.config import DataConfig
from slagen.training.data.clips import ClipSpec, plan_clips, raise_faults, read_clip
from slagen.training.data.dataset import Clip, encoder_identity
from slagen.training.data.store import DECODED_FILE, Store
from slagen.training.data.videos import find_videos
from slagen.wan.folder import ModelSource
from slagen.wan.loading import load_pipeline
from slagen.wan.texts import tell_cut
from slagen.wan.vae import encode_video

MAX_TOLD = 10  # texts that are cut
Made = tuple[list[Clip], str, int]


def encode_videos(
    config: DataConfig, base: GenerateConfig, weights: Weights, store: Store, cache: Path, seed: int,
    on_event: Callable[[Event], None],
) -> Made:  # fmt: skip
    """Clips of a data set of videos."""
    source = weights.source
    assert config.path is not None
    full = _largest_clip(config, source)
    footage, faults = find_videos(user_path(config.path))

    def look(number: int) -> None:
        on_event(Event("clip", f"{number + 1} of {len(footage)} to look at: {footage[number].path.name}"))

    cuts = plan_clips(footage, full, max(16, source.spatial_grid), faults, look)
    combed = [item.path.name for item, cut in zip(footage, cuts, strict=True) if cut.interlaced]
    if combed:
        text = f"interlaced, and deinterlaced (bwdif): {len(combed)} of {counted(len(footage), 'video')}, {combed[0]}"
        on_event(Event("note", text + (f" and {len(combed) - 1} more" if combed[1:] else "")))
    identity = encoder_identity(source, cache)
    contents = content_hashes([item.path for item in footage], cache)
    names = [digest([identity, content, dataclasses.astuple(cut)]) for content, cut in zip(contents, cuts, strict=True)]
    order = sorted(dict.fromkeys(names), key=lambda name: digest([seed, name]))
    held = config.held_out or min(16, max(1, len(order) // 10))
    if held >= len(order):
        raise UsageError(
            f"the data set has {counted(len(order), 'clip')}, of which {held} would be held out. Give more videos."
        )
    kept = set(order[:held])
    negative = source.defaults.negative_prompt
    texts = {text: text_name(identity, weights, text) for text in [*(item.caption for item in footage), negative]}
    first = {name: i for i, name in reversed(list(enumerate(names)))}  # a video may be there twice
    todo = sorted(i for name, i in first.items() if name not in store)
    missing = [text for text, name in texts.items() if name not in store]
    decoded = store.folder / DECODED_FILE
    known = set(decoded.read_bytes().decode(errors="replace").split()) if decoded.is_file() else set()
    for number, i in enumerate(todo):  # decoding costs little beside encoding, and all its faults are told before
        on_event(Event("clip", f"{number + 1} of {len(todo)} to decode: {footage[i].path.name}"))
        if names[i] in known:
            continue
        try:
            read_clip(footage[i].path, cuts[i])
        except UsageError as error:
            faults.append(f"{footage[i].where}: {error}")
            continue
        append(decoded, f"{names[i]}\n".encode())
    raise_faults(faults)
    if todo or missing:
        on_event(Event("stage", "load"))
        pipe = load_pipeline(
            source, weights.device, weights.dtype, text_encoder=bool(missing), transformer=False
        )  # fmt: skip
        encode_texts(pipe, missing, texts, store, source, on_event)
        pipe.text_encoder = pipe.tokenizer = None
    try:
        for number, i in enumerate(todo):
            on_event(Event("clip", f"{number + 1} of {len(todo)} to encode: {footage[i].path.name}"))
            frames = torch.from_numpy(read_clip(footage[i].path, cuts[i]))
            with torch.inference_mode():
                store.add(names[i], encode_video(pipe.vae, frames), str(footage[i].path))
    finally:
        store.flush()
    clips = {
        (name, item.caption): Clip(name, texts[item.caption], item.caption, store.shapes[name], name in kept)
        for name, item in zip(names, footage, strict=True)
    }
    return list(clips.values()), texts[negative], full.fps


def text_name(identity: str, weights: Weights, text: str) -> str:
    return digest([identity, str(weights.dtype), text])


def _largest_clip(config: DataConfig, source: ModelSource) -> ClipSpec:
    """The largest clip. Raises UsageError for a size that the model does not make."""
    d, grid = source.defaults, max(16, source.spatial_grid)
    width, height = config.width or d.width, config.height or d.height
    if width % grid or height % grid:
        nearest = "x".join(str(max(grid, round(size / grid) * grid)) for size in (width, height))
        raise UsageError(
            f"size is {width}x{height}, but {source.name} takes multiples of {grid} pixels. Try --size {nearest}."
        )
    return ClipSpec(width, height, config.num_frames or d.num_frames, config.fps or d.fps)


@torch.inference_mode()
def encode_texts(
    pipe: Any, missing: list[str], texts: dict[str, str], store: Store, source: ModelSource,
    on_event: Callable[[Event], None],
) -> None:  # fmt: skip
    if missing:
        on_event(Event("stage", "text"))
    limit = source.defaults.max_sequence_length
    cuts = [f"the text {quote(text)} {cut}" for text in missing if (cut := tell_cut(pipe.tokenizer, text, limit))]
    for number, told in enumerate(cuts[:MAX_TOLD]):
        more = f" ({len(cuts)} texts are cut)" if number + 1 == MAX_TOLD < len(cuts) else ""
        on_event(Event("warning", told + more))
    for text in missing:
        embeds, _ = pipe.encode_prompt(
            prompt=text, do_classifier_free_guidance=False, device=pipe._execution_device,
            max_sequence_length=limit,
        )  # fmt: skip
        store.add(texts[text], embeds[0], f"the text {text[:60]!r}")
    store.flush()
