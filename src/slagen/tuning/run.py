"""tune(TuneConfig) -> Tuned: find the cheapest schedule within an error bound, and write it as a file."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from slagen import machine
from slagen.attention import registry
from slagen.attention.cost import dense_attention_flops
from slagen.attention.schedule_file import SUFFIX
from slagen.comparison.run import with_suiting_weights
from slagen.errors import GateError, UsageError
from slagen.events import Event
from slagen.generation.config import GenerateConfig
from slagen.generation.generate import check_memory, enough_gpu_memory
from slagen.generation.prompt_cache import PromptCache
from slagen.generation.resolve import Plan, Weights, find_weights, make_plan
from slagen.generation.session import Session
from slagen.io.files import reserved, write_json
from slagen.io.paths import user_path
from slagen.io.reading import digest, file_hash
from slagen.io.text import counted
from slagen.packages import versions
from slagen.tuning.config import TuneConfig
from slagen.tuning.measure import Clip, Meter, Store
from slagen.tuning.prompts import check_apart, clips_of
from slagen.tuning.result import CurvePoint, Priced, Tuned
from slagen.tuning.search import Choices, best_choices, cheapest_within
from slagen.tuning.space import Space

NOT_MEASURED = ("output", "overwrite", "prompt", "seed", "num_videos", "timing", "save_latents")
OnEvent = Callable[[Event], None]


@dataclass
class _Job:
    """One call while it runs."""

    config: TuneConfig
    space: Space
    meter: Meter
    clips: list[Clip]
    held_out: list[Clip]
    known_flops: dict[Choices, int] = field(default_factory=dict)

    def priced(self, choices: Choices, clips: list[Clip], label: str) -> Priced:
        """A schedule with its cost, and its error in all steps."""
        text = self.space.schedule(choices, self.rest).text
        sparsity = self.space.candidates[choices[0]] if len(set(choices)) == 1 else None
        return Priced(text, sparsity, self.flops(choices), self.meter.error(text, clips, label))

    def flops(self, choices: Choices) -> int:
        """FLOPs of self-attention in all steps, of one pass each."""
        if choices not in self.known_flops:
            schedule = self.meter.schedule(self.space.schedule(choices, self.rest).text)
            self.known_flops[choices] = sum(schedule.flops(self.space.plan.weights.source.shape))
        return self.known_flops[choices]

    @property
    def rest(self) -> int:
        """The candidate of layers that are dense in any case: the one nearest to the attention as it is."""
        own = self.space.plan.attention.sparsity
        return min(range(len(self.space.candidates)), key=lambda index: abs(self.space.candidates[index] - own))


def tune(config: TuneConfig, on_event: OnEvent = lambda event: None) -> Tuned:
    """Measure what each layer's sparsity does to the error, choose, verify by running it, and write the file.

    Raises: GateError where no schedule of the candidates is within the bound; other SlagenErrors as `generate`. What
        was measured is kept beside the output until the file is written, and the same call goes on from there.
    """
    note = lambda text: on_event(Event("note", text))  # noqa: E731
    dense_config = dataclasses.replace(config.base.with_dense_attention(), cache_dir=config.cache_dir)
    weights, dense_weights = find_weights(config.base, note), find_weights(with_suiting_weights(dense_config))
    clips, held_out = _clips(config, weights)
    plan = make_plan(_like(config.base, clips[0]), weights)
    if plan.method.family == "dense":
        nothing = registry.get(config.base.attention).nothing_to_skip(plan.num_tokens)
        raise UsageError(f"{nothing}. Give a larger --size or more frames.")
    for kind, texts in (("note", plan.notes), ("warning", plan.warnings)):
        for text in texts:
            on_event(Event(kind, text))
    space = Space.of(plan, config.candidates, config.step_parts)
    runs = [[Clip(make_plan(_like(dense_config, clip), dense_weights)) for clip in own] for own in (clips, held_out)]
    dense = runs[0][0].plan
    prompts = PromptCache([clip.plan for own in runs for clip in own], on_event)
    if (doubt := check_memory(dense, text_encoder=not prompts.known)) is not None:
        on_event(Event("warning", doubt))
    with _place(config, space, clips, held_out) as path, enough_gpu_memory(plan.config):
        on_event(Event("stage", "load"))
        session = Session(dense, not prompts.known, several=True)
        about: list[Any] = [_settings(plan), session.about.model_hash, _hash_of(weights), versions(),
                 machine.describe_device(weights.device).to_dict()]  # fmt: skip
        about += [[lora.sha256 for lora in weights.loras]] if weights.loras else []
        store = Store(user_path(config.cache_dir) / "tuning" / f"{digest(about)[:16]}.jsonl", about)
        store.read()
        try:
            result = _tune(_Job(config, space, Meter(session, prompts, plan, store, on_event), runs[0], runs[1]), path)
        except KeyboardInterrupt:
            if store.known:
                note(f"{counted(len(store.known), 'measurement')} are kept. Run the same command again to resume")
            raise
        write_json(path, result.to_dict())
    return result


def _clips(config: TuneConfig, weights: Weights) -> tuple[list[GenerateConfig], list[GenerateConfig]]:
    """The clips to tune on, and those that are held out. Raises UsageError for faulty files of prompts."""
    base, defaults = config.base, weights.source.defaults
    clips = clips_of(base, defaults, config.prompts, held_out=False)
    held_out = clips_of(base, defaults, config.held_out, held_out=True) if config.curve else []
    check_apart(clips, held_out)
    return clips, held_out


def _like(base: GenerateConfig, clip: GenerateConfig) -> GenerateConfig:
    return dataclasses.replace(base, prompt=clip.prompt, seed=clip.seed, negative_prompt=clip.negative_prompt)


def _tune(job: _Job, path: Path) -> Tuned:
    space, meter, plan = job.space, job.meter, job.space.plan
    steps, count = plan.config.steps or 1, len(space.candidates)
    for_curve = (3 * count - 1) * steps * len(job.held_out)
    checks = (len(space.items) * count).bit_length() + 2
    single = (count + len(space.layers) * (count - 1)) * len(space.measured_steps)
    meter.ahead = (single + checks * steps) * len(job.clips) + for_curve
    uniform, base, changes = _measure(job)
    costs, errors = _costs(job), [[own[part] for own in changes[layer]] for part, layer in space.items]
    best = best_choices(costs, errors)
    bound = job.config.max_error
    if bound is None:
        bound = meter.error(f"0-:{plan.attention.sparsity:.12g}", job.clips, f"sparsity {plan.attention.sparsity:g}")
    chosen = _chosen(job, best, bound)
    meter.ahead = for_curve
    shape = plan.weights.source.shape
    return Tuned(
        schedule=space.schedule(chosen[0], job.rest), max_error=bound, chosen=chosen[1], uniform=uniform,
        prompts=_told(job.clips), held_out=_told(job.held_out), measured_steps=space.measured_steps,
        candidates=list(space.candidates),
        changes=[
            {"part": part, "layer": layer, "from": space.candidates[base], "squared_errors": own}
            for (part, layer), own in zip(space.items, errors, strict=True)
        ],
        curve=_curve(job, best) if job.held_out else [], settings=_settings(plan),
        dense_flops=dense_attention_flops(shape, plan.num_tokens) * (plan.config.steps or 1),
        created=datetime.now(UTC).isoformat(timespec="seconds"), versions=versions(),
        device=machine.describe_device(plan.weights.device), path=path,
    )  # fmt: skip


def _told(clips: list[Clip]) -> list[tuple[str, int]]:
    return [(clip.plan.config.prompt, clip.plan.config.seed or 0) for clip in clips]


def _measure(job: _Job) -> tuple[list[Priced], int, dict[int, list[list[float]]]]:
    """One sparsity in all layers for each candidate, and then every layer's own change from the best of these.

    Returns: those; the number of the best; by layer and candidate, what the change adds to the relative squared error
        in each part of the steps.
    """
    space, meter, steps = job.space, job.meter, job.space.measured_steps
    count = len(space.candidates)
    everywhere, uniform = [], []
    for number, sparsity in enumerate(space.candidates):
        text, label = space.schedule(space.uniform(number), job.rest).text, f"sparsity {sparsity:g} in all layers"
        everywhere.append(space.weighted(meter.squares(text, job.clips, steps, label)))
        uniform.append(Priced(text, sparsity, job.flops(space.uniform(number)), sum(everywhere[-1]) ** 0.5))
    base = min(range(count), key=lambda number: (uniform[number].error, uniform[number].flops))
    changes = dict[int, list[list[float]]]()
    for layer in space.layers:
        changes[layer] = []
        for number, sparsity in enumerate(space.candidates):
            choices = tuple(number if own == layer else base for _, own in space.items)
            label, text = f"layer {layer} alone at sparsity {sparsity:g}", space.schedule(choices, job.rest).text
            found = everywhere[base]
            if number != base:
                found = space.weighted(meter.squares(text, job.clips, steps, label))
            changes[layer].append([a - b for a, b in zip(found, everywhere[base], strict=True)])
    return uniform, base, changes


def _costs(job: _Job) -> list[list[float]]:
    """FLOPs of each layer in each part of the steps, with each candidate."""
    space = job.space
    shape = space.plan.weights.source.shape
    by_step = [
        job.meter.schedule(space.schedule(space.uniform(number), job.rest).text).flops(shape)
        for number in range(len(space.candidates))
    ]
    return [
        [sum(own[step] for step in space.parts[part]) / len(space.layers) for own in by_step] for part, _ in space.items
    ]


def _chosen(job: _Job, best: list[Choices], bound: float) -> tuple[Choices, Priced]:
    """The cheapest schedule whose measured error is within the bound, one sparsity everywhere among them.

    Raises: GateError where there is none.
    """
    space, known = job.space, dict[Choices, Priced]()

    def priced(choices: Choices) -> Priced:
        if choices not in known:
            share = job.flops(choices) / job.flops(space.uniform(0))
            known[choices] = job.priced(choices, job.clips, f"a schedule of {share:.0%} of the FLOPs")
        return known[choices]

    number = cheapest_within(len(best), lambda index: priced(best[index]).error, bound)
    uniform = sorted(map(space.uniform, range(len(space.candidates))), key=job.flops)
    for choices in uniform:  # the errors add up only nearly
        dearer = number is not None and job.flops(choices) >= priced(best[number]).flops
        if not dearer and priced(choices).error <= bound:
            return choices, priced(choices)
    if number is None:
        least = min(known.values(), key=lambda each: each.error)
        raise GateError(
            f"no schedule of these candidates has a velocity error of at most {bound:.4g}; the lowest found is "
            f"{least.error:.4g}. Give a higher --max-error, or lower --candidates."
        )
    return best[number], priced(best[number])


def _curve(job: _Job, best: list[Choices]) -> list[CurvePoint]:
    """The best schedule for the cost of each sparsity everywhere and for those half-way between, on other prompts."""
    space = job.space
    uniform = sorted(map(space.uniform, range(len(space.candidates))), key=job.flops)
    budgets = list[tuple[int, Choices | None]]()
    for choices in uniform:
        if budgets:
            budgets.append(((budgets[-1][0] + job.flops(choices)) // 2, None))
        budgets.append((job.flops(choices), choices))
    found = []
    for number, (budget, same) in enumerate(budgets, 1):
        label = f"point {number} of {len(budgets)} of the curve"
        tuned = max((each for each in best if job.flops(each) <= budget), key=job.flops)
        own = None if same is None else job.priced(same, job.held_out, label)
        found.append(CurvePoint(budget, own, job.priced(tuned, job.held_out, label)))
    return found


def _settings(plan: Plan) -> dict[str, Any]:
    """What all clips have in common."""
    return {name: value for name, value in plan.recorded.items() if name not in NOT_MEASURED}


def _hash_of(weights: Weights) -> str | None:
    """Of the attention's own weights, where they are a file."""
    path = weights.sla_path
    return file_hash(path) if path is not None and path.is_file() else None


@contextmanager
def _place(
    config: TuneConfig, space: Space, clips: list[GenerateConfig], held_out: list[GenerateConfig]
) -> Iterator[Path]:
    """The file's final path, which no other run writes meanwhile.

    Raises: UsageError where the file exists and is not to be replaced, SlagenError where another run writes it.
    """
    path = user_path(config.output)
    if path.suffix.lower() != SUFFIX:
        asked = [config.max_error, space.candidates, config.step_parts]
        seeds = [[clip.prompt, clip.seed] for clip in (*clips, *held_out)]
        name = digest([_settings(space.plan), asked, seeds])[:8]
        path = path / f"schedule-{config.base.attention}-{name}{SUFFIX}"
    with reserved(path):
        if path.exists() and not config.base.overwrite:
            raise UsageError(f"{path} exists. Choose another --output, or replace it with --overwrite.")
        yield path
