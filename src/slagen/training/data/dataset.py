"""Clips as a transformer is trained on them: latents and text, encoded once, kept in checked shards.

A prepared folder holds shards of tensors, `tensors.jsonl`, which says where each is and what it must hash to, and
`dataset.json`, written last, which says what the set consists of and what encoded it. Tensors are named by a hash of
all that they were made from, so that preparing again makes what is missing or changed and nothing else; `decoded.txt`
has the names of those whose videos could be decoded, before the first is encoded.
"""

from __future__ import annotations

import dataclasses
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from slagen.config import DataConfig, GenerateConfig
from slagen.errors import SlagenError, UsageError, WeightsError
from slagen.events import Event
from slagen.formats import reading
from slagen.formats.model_files import read_header
from slagen.generation import prompts
from slagen.generation.embeddings import component_files, content_hashes, file_hashes, tensor_hash
from slagen.generation.generate import Session, texts_of
from slagen.generation.resolve import Weights, find_weights, make_plan
from slagen.io import forms
from slagen.io.documents import parse_json, read_bytes, read_lines
from slagen.io.files import append, delete, digest, sweep, write_json, writing
from slagen.io.forms import Fault, Kind, check
from slagen.io.paths import check_utf8, user_path
from slagen.io.text import counted, quote
from slagen.training.data.videos import Cut, plan_cuts, read_cut, read_footage, tell
from slagen.training.metrics import Example
from slagen.wan.loading import encode_video, load_pipeline
from slagen.wan.presets import ModelSource
from slagen.wan.texts import tell_cut

SET_FILE, INDEX_FILE, DECODED_FILE = "dataset.json", "tensors.jsonl", "decoded.txt"
VERSION = 1
CLIPS_PER_PROMPT = 4
SHARD_BYTES = 256 * 2**20
SHARD_TENSORS = 16
AGAIN = "Prepare it again, which makes what is missing: slagen finetune data, or the finetune that prepared it."
MAX_TOLD = 10  # texts that are cut
SHARD_S = 20.0  # of work, which a killed run loses at most


MAX_SET = 256 * 2**20
_SHAPE = Kind("a list of 1 to 8 sizes", [forms.whole(1, 2**31)], lambda shape: 1 <= len(shape) <= 8)
INDEX = {
    "name": str, "shard": forms.matching(r"\w[\w.-]*\.safetensors", "a plain file name"), "sha256": str,
    "shape": _SHAPE,
}  # fmt: skip
SET = {
    "identity": str, "negative": str, "negative_prompt": str, "fps": forms.whole(1, 240),
    "clips": [{"latents": str, "text": str, "caption": str, "held_out": bool,
               "shape": Kind("four sizes", _SHAPE, lambda shape: len(shape) == 4)}],
}  # fmt: skip


@dataclass(frozen=True)
class Clip:
    """One clip of a prepared set: names of its tensors, and the shape of its latents (C, T, h, w)."""

    latents: str
    text: str
    caption: str
    shape: tuple[int, ...]
    held_out: bool


class Store:
    """Tensors by name, in shards. Added ones are on disk once `flush` has returned."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.places: dict[str, tuple[str, str]] = {}  # name -> shard, SHA-256
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._waiting: dict[str, Tensor] = {}
        self._flushed = time.monotonic()
        self.named = whole = dict[str, bool]()  # shards that the index speaks of
        for entry in read_lines(folder / INDEX_FILE, INDEX):  # a line may be torn by a kill
            name, shard, sha256, shape = entry["name"], entry["shard"], entry["sha256"], entry["shape"]
            if shard not in whole:
                whole[shard] = _is_whole(folder / shard)
            if whole[shard]:
                self.places[name], self.shapes[name] = (shard, sha256), tuple(shape)

    def __contains__(self, name: str) -> bool:
        return name in self.places or name in self._waiting

    def add(self, name: str, tensor: Tensor, what: str) -> None:
        """Keep a tensor. Raises SlagenError where the disk does not take it, or where, made of `what`, it is not
        finite."""
        if not torch.isfinite(tensor).all():
            self.flush()
            raise SlagenError(
                f"{what} becomes numbers that are not finite. Leave it out; where others do too, get the model again."
            )
        self._waiting[name] = tensor.detach().cpu().contiguous()
        size = sum(t.numel() * t.element_size() for t in self._waiting.values())
        late = time.monotonic() - self._flushed > SHARD_S
        if late or len(self._waiting) >= SHARD_TENSORS or size >= SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what waits: a shard, and then its lines in the index.

        What said that the set is whole goes first: it says so again when it is.
        """
        self._flushed = time.monotonic()
        if not self._waiting:
            return
        shard = f"{digest(sorted(self._waiting))[:16]}.safetensors"
        entries: list[dict[str, Any]] = [
            {"name": name, "shard": shard, "sha256": tensor_hash(tensor), "shape": list(tensor.shape)}
            for name, tensor in self._waiting.items()
        ]
        lines = map(json.dumps, entries)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            delete(self.folder / SET_FILE)
            with writing(self.folder / shard) as part:
                save_file(self._waiting, part)
            append(self.folder / INDEX_FILE, ("\n".join(lines) + "\n").encode())
        except (OSError, SafetensorError) as error:
            raise SlagenError(f"{self.folder} takes no more ({error}). Free some space, and start again.") from error
        for entry in entries:
            self.places[entry["name"]] = shard, entry["sha256"]
            self.shapes[entry["name"]] = tuple(entry["shape"])
        self._waiting = {}

    def sweep(self) -> None:
        """Delete what killed runs left: their temporary files, and shards that they wrote no whole line about.

        The caller holds the folder's lock, so that nobody is writing them.
        """
        sweep(self.folder)
        for path in self.folder.glob("*.safetensors"):
            if self.named and re.fullmatch(r"[0-9a-f]{16}", path.stem) and path.name not in self.named:
                delete(path)
        for path in [*self.folder.glob("*.safetensors.part"), *self.folder.glob(".tmp*")]:  # as versions before did
            if path.suffix == ".part" or re.fullmatch(r"\.tmp[A-Za-z0-9]{6}", path.name):
                delete(path)

    def drop_changed(self) -> None:
        """Forget every tensor whose bytes are not those that were written, so that it is made again."""
        for name in list(self.places):
            try:
                self.load(name)
            except WeightsError:
                del self.places[name], self.shapes[name]

    def load(self, name: str) -> Tensor:
        """A tensor that was kept. Raises WeightsError if its bytes are not those that were written."""
        shard, sha256 = self.places[name]
        try:
            with safe_open(self.folder / shard, framework="pt") as handle:
                tensor = handle.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise WeightsError(f"{self.folder / shard} is broken ({error}). {AGAIN}") from error
        if tensor_hash(tensor) != sha256:
            raise WeightsError(f"{self.folder / shard} has changed since it was written. {AGAIN}")
        return tensor


class Dataset:
    """A prepared set.

    Args:
        folder: as `prepare` made it.
    Raises: WeightsError where it is not whole.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.store = folder, Store(folder)
        try:
            content = parse_json(read_bytes(folder / SET_FILE, MAX_SET), {"version": int})
            if content["version"] != VERSION:
                raise WeightsError(f"{folder} has version {content['version']}; this slagen reads {VERSION}. {AGAIN}")
            check(content, SET)
        except (OSError, Fault) as error:
            raise WeightsError(f"{folder} is no prepared data set ({SET_FILE}: {error}). {AGAIN}") from error
        self.identity: str = content["identity"]
        self.negative: str = content["negative"]
        self.negative_prompt: str = content["negative_prompt"]
        self.fps: int = content["fps"]
        clips = [
            Clip(c["latents"], c["text"], c["caption"], tuple(c["shape"]), c["held_out"]) for c in content["clips"]
        ]
        names = {name for clip in clips for name in (clip.latents, clip.text)} | {self.negative}
        lost = sum(name not in self.store for name in names)
        if lost:
            raise WeightsError(f"{folder} lacks {lost} of {len(names)} tensors. {AGAIN}")
        self.training = [clip for clip in clips if not clip.held_out]
        self.held_out = [clip for clip in clips if clip.held_out]
        if not self.training or not self.held_out:
            raise WeightsError(
                f"{folder} has {len(self.training)} clips to train on, {len(self.held_out)} held out. {AGAIN}"
            )
        self.hash = digest([self.identity, self.negative, [dataclasses.astuple(clip) for clip in clips]])

    def example(self, clip: Clip) -> Example:
        """A clip's latents and text, both float32."""
        return Example(self.store.load(clip.latents).float(), self.store.load(clip.text).float())

    def negative_text(self) -> Tensor:
        """The negative prompt as the text encoder gives it, (S, E)."""
        return self.store.load(self.negative).float()


def is_prepared(path: Path) -> bool:
    """Whether a folder was written by `prepare`, to its end."""
    return (path / SET_FILE).is_file() and (path / INDEX_FILE).is_file()


def encoder_identity(source: ModelSource, cache: Path) -> str:
    """A hash of what makes latents and text: VAE, text encoder, tokenizer, length of texts."""
    files = component_files(source.folder, ("vae", "text_encoder", "tokenizer"))
    return digest([file_hashes(files, cache), source.defaults.max_sequence_length])


def transformer_files(source: ModelSource) -> list[Path]:
    """The files that a model's transformer is read from."""
    path = source.weights or source.folder
    if path.is_file():
        return [path]
    return reading.component_files(path / "transformer" if (path / "transformer").is_dir() else path)


def open_dataset(folder: Path, source: ModelSource, cache: Path) -> Dataset:
    """A prepared set for a model. Raises WeightsError if it was encoded by another VAE or text encoder."""
    data = Dataset(folder)
    if data.identity != encoder_identity(source, cache):
        raise WeightsError(
            f"{folder} was encoded with another VAE or text encoder than {source.name}'s, and would teach noise. "
            "Give that model with --model, or the raw data with --data."
        )
    if data.negative_prompt != source.defaults.negative_prompt:
        raise WeightsError(
            f"{folder} was prepared for another negative prompt than {source.name}'s. Prepare it again with --model "
            f"{source.name}; what is encoded already is kept."
        )
    return data


def prepare(
    config: DataConfig, base: GenerateConfig, folder: Path, cache: Path, seed: int, on_event: Callable[[Event], None]
) -> Dataset:
    """Encode a set of videos, or have the dense model make one, into a folder; what is there already is kept.

    Args:
        base: model, device and dtype; its weights, if any, are a whole transformer.
        seed: which clips are held out, and with what noise own ones are made.
    Raises: UsageError with every fault of the set, WeightsError for a broken model.
    """
    if base.dtype == "fp16":
        raise UsageError("small numbers are lost in fp16. Try --dtype bf16, or fp32.")
    weights = find_weights(
        dataclasses.replace(base, attention="dense", backend="auto"),
        lambda text: on_event(Event("note", text)), transformer=config.self_generate is not None,
    )  # fmt: skip
    if weights.dtype == torch.float16:  # picked for a card without bf16
        weights = dataclasses.replace(weights, dtype=torch.float32)
    check_utf8(folder)
    raw = None if config.path is None else user_path(config.path)
    if raw is not None and raw.is_dir() and folder.resolve().is_relative_to(raw.resolve()):
        raise UsageError(f"{folder} lies within the data of {raw}, and would become part of it. Give another --output.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock", timeout=0):
            return _prepare(config, base, weights, folder, cache, seed, on_event)
    except Timeout as error:
        raise SlagenError(f"another slagen prepares {folder}. Wait for it, or give another --output.") from error
    except OSError as error:
        raise SlagenError(
            f"{error.filename or folder}: {error.strerror or error}. Mend that and start again."
        ) from error


def _prepare(
    config: DataConfig, base: GenerateConfig, weights: Weights, folder: Path, cache: Path, seed: int,
    on_event: Callable[[Event], None],
) -> Dataset:  # fmt: skip
    make = _generated if config.self_generate is not None else _encoded
    store = Store(folder)
    store.sweep()
    store.drop_changed()
    clips, negative, fps = make(config, base, weights, store, cache, seed, on_event)
    store.flush()
    content = {
        "version": VERSION, "identity": encoder_identity(weights.source, cache), "model": weights.source.name,
        "negative": negative, "negative_prompt": weights.source.defaults.negative_prompt, "fps": fps,
        "clips": [dataclasses.asdict(clip) for clip in clips],
    }  # fmt: skip
    try:
        write_json(folder / SET_FILE, content)
    except OSError as error:
        raise SlagenError(f"{folder / SET_FILE} cannot be written ({error}). Free some space.") from error
    return Dataset(folder)


Made = tuple[list[Clip], str, int]


def _encoded(
    config: DataConfig, base: GenerateConfig, weights: Weights, store: Store, cache: Path, seed: int,
    on_event: Callable[[Event], None],
) -> Made:  # fmt: skip
    """Clips of a data set of videos."""
    source = weights.source
    assert config.path is not None
    full = _full_cut(config, source)
    footage, faults = read_footage(user_path(config.path))

    def look(number: int) -> None:
        on_event(Event("clip", f"{number + 1} of {len(footage)} to look at: {footage[number].path.name}"))

    cuts = plan_cuts(footage, full, max(16, source.spatial_grid), faults, look)
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
    texts = {text: _text_name(identity, weights, text) for text in [*(item.caption for item in footage), negative]}
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
            read_cut(footage[i].path, cuts[i])
        except UsageError as error:
            faults.append(f"{footage[i].where}: {error}")
            continue
        append(decoded, f"{names[i]}\n".encode())
    tell(faults)
    if todo or missing:
        on_event(Event("stage", "load"))
        pipe = load_pipeline(
            source, weights.device, weights.dtype, text_encoder=bool(missing), transformer=False
        )  # fmt: skip
        _encode_texts(pipe, missing, texts, store, source, on_event)
        pipe.text_encoder = pipe.tokenizer = None
    try:
        for number, i in enumerate(todo):
            on_event(Event("clip", f"{number + 1} of {len(todo)} to encode: {footage[i].path.name}"))
            frames = torch.from_numpy(read_cut(footage[i].path, cuts[i]))
            with torch.inference_mode():
                store.add(names[i], encode_video(pipe.vae, frames), str(footage[i].path))
    finally:
        store.flush()
    clips = {
        (name, item.caption): Clip(name, texts[item.caption], item.caption, store.shapes[name], name in kept)
        for name, item in zip(names, footage, strict=True)
    }
    return list(clips.values()), texts[negative], full.fps


def _text_name(identity: str, weights: Weights, text: str) -> str:
    return digest([identity, str(weights.dtype), text])


def _full_cut(config: DataConfig, source: ModelSource) -> Cut:
    """The largest clip. Raises UsageError for a size that the model does not make."""
    d, grid = source.defaults, max(16, source.spatial_grid)
    width, height = config.width or d.width, config.height or d.height
    if width % grid or height % grid:
        nearest = "x".join(str(max(grid, round(size / grid) * grid)) for size in (width, height))
        raise UsageError(
            f"size is {width}x{height}, but {source.name} takes multiples of {grid} pixels. Try --size {nearest}."
        )
    return Cut(width, height, config.num_frames or d.num_frames, config.fps or d.fps)


@torch.inference_mode()
def _encode_texts(
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


def _generated(
    config: DataConfig, base: GenerateConfig, weights: Weights, store: Store, cache: Path, seed: int,
    on_event: Callable[[Event], None],
) -> Made:  # fmt: skip
    """Clips that the dense model makes of prompts, the last of each line held out."""
    assert config.self_generate is not None
    source = weights.source
    identity = encoder_identity(source, cache)
    made_by = [identity, file_hashes(transformer_files(source), cache)]
    settings = dataclasses.replace(
        base, attention="dense", backend="auto", width=config.width, height=config.height, num_frames=config.num_frames,
        fps=config.fps, save_latents=False, timing="off",
    )  # fmt: skip
    jobs, faults, count = [], [], config.clips_per_prompt or CLIPS_PER_PROMPT
    asked: dict[str, int] = {}  # clips of a prompt so far: a prompt may be there twice
    requests = prompts.read_prompts(config.self_generate)
    prompts.check_count(requests, count)
    for request in requests:
        clips_of = request.fields.get("num_videos", count) + 1
        first = asked.get(request.prompt, 0)
        asked[request.prompt] = first + clips_of
        for number in range(clips_of):
            try:
                one = dataclasses.replace(prompts.apply(settings, request), num_videos=1)
                drawn = int(digest([seed, request.prompt, first + number])[:8], 16)
                chosen = drawn if one.seed is None else one.seed + number
                plan = make_plan(dataclasses.replace(one, seed=chosen), weights)
            except SlagenError as error:
                faults.append(f"{request.where}: {error}")
                break
            pixels = {k: v for k, v in plan.settings.items() if k not in ("output", "device", "model", "overwrite")}
            name = digest([made_by, pixels])
            jobs.append((plan, name, number == clips_of - 1))
    tell(faults)
    own_negative = source.defaults.negative_prompt
    used = [text for plan, _, _ in jobs for text in texts_of(plan)] + [own_negative]
    texts = {text: _text_name(identity, weights, text) for text in used}
    todo = list({name: plan for plan, name, _ in jobs if name not in store}.items())
    missing = [text for text, name in texts.items() if name not in store]
    if todo or missing:
        on_event(Event("stage", "load"))
        session = Session(jobs[0][0])
        _encode_texts(session.pipe, missing, texts, store, source, on_event)
        session.release_text_encoder()
    for number, (name, plan) in enumerate(todo):
        on_event(Event("clip", f"{number + 1} of {len(todo)} to make: {plan.config.prompt:.60}"))
        embeds = [store.load(texts[text])[None].to(session.pipe._execution_device) for text in texts_of(plan)]
        named = dict(zip(("prompt_embeds", "negative_prompt_embeds"), [*embeds, None], strict=False))
        latents, _ = session.denoise(plan, named, lambda event: None)
        store.add(name, latents[0].float(), plan.config.prompt)
    store.flush()
    held_out = {name for _, name, held in jobs if held}  # two lines with seeds of their own may make one clip
    clips = [
        Clip(name, texts[plan.config.prompt], plan.config.prompt, store.shapes[name], held)
        for plan, name, held in jobs if held or name not in held_out
    ]  # fmt: skip
    return clips, texts[own_negative], jobs[0][0].config.fps or source.defaults.fps


def _is_whole(path: Path) -> bool:
    try:
        read_header(path)
    except WeightsError:
        return False
    return True
