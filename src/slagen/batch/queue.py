"""From prompts to jobs: a plan for every video, and its entry in the manifest."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from slagen.attention import registry
from slagen.batch.manifest import Job, Manifest, Wanted
from slagen.errors import SlagenError, UsageError
from slagen.events import Event
from slagen.generation import prompts
from slagen.generation.config import GenerateConfig
from slagen.generation.embeddings import component_files, file_hashes
from slagen.generation.lora import asked_loras
from slagen.generation.resolve import Plan, Weights, make_plan
from slagen.io.paths import user_path
from slagen.io.text import counted
from slagen.settings import names_where

NOT_IN_KEY = names_where(GenerateConfig, lambda option: not (option.pixels and option.in_key))


@dataclass(frozen=True)
class Task:
    """A job and the plan that makes it."""

    job: Job
    plan: Plan


def plan_videos(base: GenerateConfig, requests: list[prompts.Request], weights: Weights) -> list[tuple[Plan, str]]:
    """A plan for every video (seed None if none is given) and its id. Raises UsageError that lists the faults."""
    prompts.check_count(requests, base.num_videos)
    found, faults = [], []
    for request in requests:
        try:
            config = prompts.apply(base, request)
            plan = make_plan(config, weights)
            if plan.config.attention != config.attention:
                nothing = registry.get(config.attention).nothing_to_skip(plan.num_tokens)
                raise UsageError(
                    f"{nothing}. Choose a larger --size or more frames, or put this prompt into a file of its own and "
                    "give --attention dense."
                )
        except SlagenError as error:
            faults.append(f"{request.where}: {error}")
            continue
        for number in range(config.num_videos):
            seed = None if config.seed is None else config.seed + number
            one = dataclasses.replace(plan, config=dataclasses.replace(plan.config, seed=seed, num_videos=1))
            name = request.id and (request.id if config.num_videos == 1 else f"{request.id}-{number + 1}")
            found.append((one, name))
    if faults:
        more = [f"... and {len(faults) - 10} more"] if len(faults) > 10 else []
        raise UsageError(*faults[:10], *more)
    return found


def _warn(plans: list[tuple[Plan, str]], on_event: Callable[[Event], None]) -> None:
    """Warn of what `generate` would warn of for each video."""
    warn_of_each((text for plan, _ in plans for text in plan.warnings), on_event)


def warn_of_each(texts: Iterable[str], on_event: Callable[[Event], None]) -> None:
    """Warn once of each text, with how many videos it concerns: the ten most frequent."""
    counts = Counter(texts)
    for text, count in counts.most_common(10):
        on_event(Event("warning", text if count == 1 else f"{text} ({counted(count, 'video')})"))
    if len(counts) > 10:
        on_event(Event("warning", f"and {counted(len(counts) - 10, 'more warning')}"))


def queue_jobs(
    manifest: Manifest, plans: list[tuple[Plan, str]], identity: str, on_event: Callable[[Event], None]
) -> list[Task]:
    """The job of every plan, queued if it is new; equal plans with one seed are one job."""
    wanted = []
    for plan, name in plans:
        settings = {key: value for key, value in plan.settings.items() if key not in NOT_IN_KEY}
        settings |= {"backend": plan.backend, "weights_hash": identity}
        scales = [lora.scale for lora in asked_loras(plan.config.lora, plan.config.lora_scale)]
        if loras := [[file.sha256, x] for file, x in zip(plan.weights.loras, scales, strict=True) if x]:
            settings["loras"] = loras  # a new key only where one changes the video
        wanted.append(Wanted(settings, plan.config.seed, plan.config.slug, name))
    tasks: dict[str, Task] = {}
    for job, (plan, _) in zip(manifest.queue(wanted), plans, strict=True):
        if job.key in tasks:
            text = f"the prompt {plan.config.prompt!r} appears twice with seed {job.seed}; only one video is generated"
            on_event(Event("warning", text))
        else:
            config = dataclasses.replace(plan.config, seed=job.seed)
            tasks[job.key] = Task(job, dataclasses.replace(plan, config=config))
    return list(tasks.values())


def identity_of_weights(weights: Weights, vae: str | None, cache: Path) -> str:
    """A hash of every file whose content changes pixels."""
    source = weights.source
    parts = ("text_encoder", "tokenizer", "scheduler") + (() if vae else ("vae",))
    parts += ("image_encoder", "image_processor") if source.takes_image else ()
    files = component_files(source.folder, parts if source.weights else (*parts, "transformer"))
    for path in (source.weights, weights.sla_path, user_path(vae) if vae else None):
        if path is not None:
            files += [path] if path.is_file() else sorted(path.rglob("*.safetensors"))
    return file_hashes(list(dict.fromkeys(files)), cache)
