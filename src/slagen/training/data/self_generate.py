"""Generate the clips of a data set with the dense model, from a prompt file."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from slagen.errors import SlagenError
from slagen.events import Event
from slagen.generation import prompts
from slagen.generation.embeddings import file_hashes
from slagen.generation.resolve import Plan, make_plan
from slagen.generation.session import Session, texts_of
from slagen.io.reading import digest
from slagen.io.text import quote
from slagen.training.data.clips import raise_faults
from slagen.training.data.dataset import Clip, transformer_files
from slagen.training.data.encode import encode_texts, text_name
from slagen.training.data.job import Job, Made, clip_event

CLIPS_PER_PROMPT = 4


@dataclass(frozen=True)
class _Planned:
    """A clip to generate, and the name that its latents will have in the store."""

    name: str
    plan: Plan
    held_out: bool


def generate_clips(job: Job) -> Made:
    """Generate clips of prompts with the dense model, the last of each line held out; what is there is kept.

    Raises: UsageError with every fault of the prompt file, before anything is generated.
    """
    source, store = job.source, job.store
    identity = job.encoder_identity()
    clips = _plan(job, identity)
    own_negative = source.defaults.negative_prompt
    used = [text for clip in clips for text in texts_of(clip.plan)] + [own_negative]
    texts = {text: text_name(identity, job.weights, text) for text in used}
    _generate(job, clips, texts)
    held_out = {clip.name for clip in clips if clip.held_out}  # two lines with seeds of their own may make one clip
    kept = [clip for clip in clips if clip.held_out or clip.name not in held_out]
    made = []
    for clip in kept:
        prompt = clip.plan.config.prompt
        made.append(Clip(clip.name, texts[prompt], prompt, store.shapes[clip.name], clip.held_out))
    return Made(made, texts[own_negative], clips[0].plan.config.fps or source.defaults.fps)


def _plan(job: Job, identity: str) -> list[_Planned]:
    """Every clip that the prompt file asks for. Raises UsageError with its faults."""
    config = job.config
    assert config.self_generate is not None
    made_by = [identity, file_hashes(transformer_files(job.source), job.cache)]
    settings = dataclasses.replace(
        job.base, attention="dense", backend="auto", width=config.width, height=config.height,
        num_frames=config.num_frames, fps=config.fps, save_latents=False, timing="off",
    )  # fmt: skip
    clips: list[_Planned] = []
    faults: list[str] = []
    count = config.clips_per_prompt or CLIPS_PER_PROMPT
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
                drawn = int(digest([job.seed, request.prompt, first + number])[:8], 16)
                chosen = drawn if one.seed is None else one.seed + number
                plan = make_plan(dataclasses.replace(one, seed=chosen), job.weights)
            except SlagenError as error:
                faults.append(f"{request.where}: {error}")
                break
            pixels = {k: v for k, v in plan.settings.items() if k not in ("output", "device", "model", "overwrite")}
            clips.append(_Planned(digest([made_by, pixels]), plan, number == clips_of - 1))
    raise_faults(faults)
    return clips


def _generate(job: Job, clips: list[_Planned], texts: dict[str, str]) -> None:
    """Generate the clips, and encode the texts, that are not in the store yet."""
    store = job.store
    todo = list({clip.name: clip.plan for clip in clips if clip.name not in store}.items())
    missing = [text for text, name in texts.items() if name not in store]
    if todo or missing:
        job.emit(Event("stage", "load"))
        session = Session(clips[0].plan, on_event=job.emit, several=True)
        encode_texts(session.pipe, missing, texts, store, job.source, job.emit)
        session.release_text_encoder()
    for number, (name, plan) in enumerate(todo):
        job.emit(clip_event("generating", "clip", number, len(todo), plan.config.prompt))
        embeds = [store.load(texts[text])[None].to(session.pipe._execution_device) for text in texts_of(plan)]
        named = dict(zip(("prompt_embeds", "negative_prompt_embeds"), [*embeds, None], strict=False))
        latents, _ = session.denoise(plan, named, job.emit)
        store.add(name, latents[0].float(), f"the prompt {quote(plan.config.prompt)}")
    store.flush()
