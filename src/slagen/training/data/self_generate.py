"""Generate the clips of a data set with the dense model, from a prompt file."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from slagen.errors import SlagenError
from slagen.events import Event
from slagen.generation import prompts
from slagen.generation.config import GenerateConfig
from slagen.generation.embeddings import file_hashes
from slagen.generation.resolve import Weights, make_plan
from slagen.generation.session import Session, texts_of
from slagen.io.reading import digest
from slagen.training.config import DataConfig
from slagen.training.data.clips import raise_faults
from slagen.training.data.dataset import Clip, encoder_identity, transformer_files
from slagen.training.data.encode import Made, encode_texts, text_name
from slagen.training.data.store import Store

CLIPS_PER_PROMPT = 4


def generate_clips(
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
    raise_faults(faults)
    own_negative = source.defaults.negative_prompt
    used = [text for plan, _, _ in jobs for text in texts_of(plan)] + [own_negative]
    texts = {text: text_name(identity, weights, text) for text in used}
    todo = list({name: plan for plan, name, _ in jobs if name not in store}.items())
    missing = [text for text, name in texts.items() if name not in store]
    if todo or missing:
        on_event(Event("stage", "load"))
        session = Session(jobs[0][0])
        encode_texts(session.pipe, missing, texts, store, source, on_event)
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
