"""compare(CompareConfig) -> Comparison: the same prompt, seed and noise through every method, on one loaded model."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import secrets
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slagen import machine
from slagen.attention import registry
from slagen.attention.delta.method import exact_share
from slagen.attention.learned import suits
from slagen.comparison.config import DENSE, OTHER_SEED, CompareConfig
from slagen.comparison.quality import lpips, psnr_db, ssim
from slagen.comparison.result import Comparison, Row, Runs
from slagen.comparison.trajectory import Trajectory, measure_deviation
from slagen.errors import UsageError
from slagen.events import Event, counted_parts, nth
from slagen.formats.kinds import TRANSFORMERS
from slagen.formats.peek import peek
from slagen.generation.config import MAX_SEED, GenerateConfig
from slagen.generation.frames import decode_frames
from slagen.generation.generate import check_memory, enough_gpu_memory
from slagen.generation.lora import asked_loras
from slagen.generation.lora_files import describe_loras
from slagen.generation.prompt_cache import PromptCache
from slagen.generation.prompts import apply, check_count, read_prompts
from slagen.generation.report import density_section
from slagen.generation.resolve import Plan, Weights, find_weights, make_plan
from slagen.generation.session import Session
from slagen.generation.side_by_side import side_by_side
from slagen.interrupts import telling_what_is_kept
from slagen.io.files import reserved, write_json
from slagen.io.paths import check_not_taken, is_video, kind_of_output, user_path
from slagen.io.text import counted
from slagen.packages import versions
from slagen.video import check_ffmpeg, write_video
from slagen.wan.observe import take_densities

ATTENTION_SETTINGS = ("attention", "backend", "sparsity", "sla_topk", "allow_untrained", "num_videos", "prompt", "seed")
OF_A_CLIP = (  # what a line of a prompt file may set, beside its seed
    "negative_prompt", "width", "height", "num_frames", "fps", "steps", "guidance_scale", "flow_shift",
)  # fmt: skip
OnEvent = Callable[[Event], None]


@dataclass(frozen=True)
class Entry:
    """A row before it has run: its config and weights, and what it found so far."""

    config: GenerateConfig
    weights: Weights
    row: Row

    def plan(self, clip: GenerateConfig) -> Plan:
        """The row's plan of a clip."""
        own = {name: getattr(clip, name) for name in OF_A_CLIP}
        seed = (clip.seed or 0) + (self.row.method == OTHER_SEED)
        return make_plan(dataclasses.replace(self.config, **own, prompt=clip.prompt, seed=seed), self.weights)


def compare(config: CompareConfig, on_event: OnEvent = lambda event: None) -> Comparison:
    """Run every method on every prompt, write the clips side by side and what was measured as JSON.

    Raises: SlagenError of some kind; clips that were written before stay.
    """
    check_ffmpeg(kind_of_output(config.base.output))
    clips = _clips(config)
    weights: dict[GenerateConfig, Weights] = {}
    entries = [_entry(row.attention, row, weights, on_event) for row in config.rows]
    given = next((entry for entry in entries if entry.row.method == DENSE), None)
    reference = given or _entry(DENSE, config.dense, weights, on_event)
    everyone = [*entries, *([] if given else [reference])]
    controls = [_entry(name, row, weights, on_event) for name, row in config.control_rows.items()]
    everyone += controls
    _announce(everyone, controls, clips[0], on_event)
    plan = reference.plan(clips[0])
    prompts = PromptCache([reference.plan(clip) for clip in clips], on_event)
    if (doubt := check_memory(plan, text_encoder=not prompts.known)) is not None:
        on_event(Event("warning", doubt))
    with _places(config, clips, plan) as (videos, path):
        written: list[Path] = []
        with enough_gpu_memory(plan.config), telling_what_is_kept(lambda: _kept_so_far(written, clips)):
            on_event(Event("stage", "load"))
            session = Session(plan, not prompts.known, on_event=on_event, several=True)
            for index, (clip, video) in enumerate(zip(clips, videos, strict=True)):
                begin = _announcer(index, clips, everyone, config, on_event)
                frames = _compare_clip(session, prompts, clip, reference, everyone, config, begin, on_event)
                shown = [index for index, entry in enumerate(everyone) if entry is given or entry is not reference]
                labels = [_label(everyone[index].row, reference.row) for index in shown]
                on_event(Event("stage", "write"))
                fps = reference.plan(clip).config.fps or 1
                write_video(
                    side_by_side([frames[index] for index in shown], labels),
                    video,
                    fps,
                    f"slagen compare: {', '.join(labels)}",
                )
                written.append(video)
        result = Comparison(
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            prompts=[(clip.prompt, clip.seed or 0) for clip in clips],
            settings={name: value for name, value in plan.recorded.items() if name not in ATTENTION_SETTINGS},
            reference=reference.row, rows=[entry.row for entry in entries],
            controls=[entry.row for entry in controls], videos=videos, path=path, versions=versions(),
            device=machine.describe_device(plan.weights.device),
        )  # fmt: skip
        write_json(path, result.to_dict())
    return result


def _kept_so_far(written: list[Path], clips: list[GenerateConfig]) -> str:
    """What an interrupted comparison says."""
    if not written:
        return "Nothing was written. Run the same command again."
    return (
        f"The clips of {len(written)} of {counted(len(clips), 'prompt')} are kept in {written[0].parent}, but no "
        "measurement. Run the same command again with --overwrite."
    )


def _clips(config: CompareConfig) -> list[GenerateConfig]:
    """The clips, each with its seed. Raises UsageError for a line that sets an attention."""
    base = config.dense
    if config.prompts is None:
        found = [base]
    else:
        requests = read_prompts(config.prompts)
        check_count(requests, 1)
        found = []
        for request in requests:
            for name in request.fields.keys() - {*OF_A_CLIP, "seed"}:
                raise UsageError(
                    f"{request.where}: a prompt file for slagen compare cannot set {name.replace('_', ' ')}. Remove it "
                    "from this line."
                )
            found.append(apply(base, request))
    seeded = [
        clip if clip.seed is not None else dataclasses.replace(clip, seed=secrets.randbelow(2**31)) for clip in found
    ]
    for clip in seeded:
        if clip.seed == MAX_SEED:
            raise UsageError(
                f"seed is {clip.seed}, but the control other-seed needs the next higher seed. Give a lower --seed."
            )
    return seeded


def _entry(name: str, config: GenerateConfig, weights: dict[GenerateConfig, Weights], on_event: OnEvent) -> Entry:
    """A row, with the weights that it runs with: those that are given where they suit its method."""
    plain = dataclasses.replace(config, attention_options=(), sparsity=None, block_m=None, block_n=None)
    if plain not in weights:
        weights[plain] = find_weights(with_suiting_weights(plain), lambda text: on_event(Event("note", text)))
    found = weights[plain]
    method = make_plan(config, found).method
    trained = found.sla_path is not None if method.needs.weights else None
    return Entry(config, found, Row(name, None, {}, trained, None))


def with_suiting_weights(config: GenerateConfig) -> GenerateConfig:
    """A row's config without weights of another method than its own; a whole transformer is for all rows."""
    if config.weights is None:
        return config
    found = peek(user_path(config.weights))
    if found.kind in TRANSFORMERS or suits(registry.get(config.attention), found.method):
        return config
    return dataclasses.replace(config, weights=None)


def _announce(entries: list[Entry], controls: list[Entry], clip: GenerateConfig, on_event: OnEvent) -> None:
    """Fill in what a row's plan says of it, and hand out the plans' notes and warnings, each once; no warnings of
    controls, which differ on purpose."""
    said = set()
    for entry in entries:
        plan, row = entry.plan(clip), entry.row
        base = plan.weights.trained_with or plan.method.config()
        asked = registry.get(entry.config.attention)
        if asked.family == "dense":
            row.sparsity = 0.0
        elif "sparsity" in asked.option_names and asked.name != "linear":
            row.sparsity = plan.schedule.mean_sparsity if hasattr(plan.attention, "sparsity") else entry.config.sparsity
        own = {name: value for name, value in entry.config.attention_options if value != getattr(base, name, None)}
        policy = {
            name: getattr(plan.config, name) for name in ("sparsity_schedule", "dense_steps", "dense_layers", "delta")
        }
        row.options.update(own | {name: value for name, value in policy.items() if value is not None})
        row.backend = plan.backend
        texts = [("warning", text) for text in plan.warnings if not any(entry is other for other in controls)]
        loras = describe_loras(plan.weights.loras, asked_loras(plan.config.lora, plan.config.lora_scale))
        texts += [("note", text) for text in loras[0]]
        if row.trained is False:
            texts.append(("note", f"{row.label} runs untrained, because this model has no {plan.method.name} weights"))
        for kind, text in texts:
            if text not in said:
                said.add(text)
                on_event(Event(kind, text))


def _compare_clip(
    session: Session, prompts: PromptCache, clip: GenerateConfig, reference: Entry, everyone: list[Entry],
    config: CompareConfig, begin: Callable[[str, str], None], on_event: OnEvent,
) -> list[np.ndarray]:  # fmt: skip
    """Run all rows on one clip, and add what they gave to the rows. Returns the frames of each."""
    plans, dense = [entry.plan(clip) for entry in everyone], reference.plan(clip)
    session.use(dense)
    embeds = prompts.embeds(session, dense)
    for text in session.cuts(dense):
        on_event(Event("warning", text))
    begin("dense attention, as the reference", "")
    trajectory = Trajectory(dense.config.steps or 1)
    with trajectory.recording(session.pipe.transformer):
        expected, _ = _denoise(session, dense, embeds, on_event)
    expected_frames = _decode(session, expected, on_event)

    runs = [Runs() for _ in everyone]
    for entry, plan, own in zip(everyone, plans, runs, strict=True):
        begin(
            f"{entry.row.label}, measuring its error on the latents of the dense run", f"the error of {entry.row.label}"
        )
        session.use(plan)
        on_event(Event("stage", "measure", num_steps=len(trajectory.inputs)))
        take_densities(session.pipe.transformer)
        if entry.row.method != OTHER_SEED:
            schedule = plan.schedule
            deviation = measure_deviation(
                session.pipe.transformer, trajectory, schedule.dense, schedule.by_step,
                on_pass=counted_parts(on_event, len(trajectory.inputs)),
            )  # fmt: skip
            own.velocity_error, own.layer_errors = deviation.velocity, deviation.layers
        own.density = _density(plan, take_densities(session.pipe.transformer))

    frames: list[np.ndarray] = []
    repeats = _num_repeats(config)
    for repeat in range(repeats):  # in turn, so that each meets every state of the machine
        for entry, plan, own in zip(everyone, plans, runs, strict=True):
            begin(f"{entry.row.label}, run {repeat + 1} of {repeats}", "")
            session.use(plan)
            latents, steps = _denoise(session, plan, embeds, on_event)
            own.denoise_s.append(sum(step.latency_ms or 0.0 for step in steps) / 1e3)
            own.attention_ms.append(sum(sum(step.attention_ms) for step in steps))
            if repeat == 0:
                own.latent_error = _relative(latents, expected)
                clip_frames = _decode(session, latents, on_event)
                own.psnr_db, own.ssim = psnr_db(clip_frames, expected_frames), ssim(clip_frames, expected_frames)
                own.lpips = lpips(clip_frames, expected_frames)
                frames.append(clip_frames)
    for entry, own in zip(everyone, runs, strict=True):
        entry.row.runs.append(own)
    return frames


def _num_repeats(config: CompareConfig) -> int:
    return config.repeats or (3 if config.prompts is None else 1)


def _announcer(
    index: int, clips: list[GenerateConfig], everyone: list[Entry], config: CompareConfig, on_event: OnEvent
) -> Callable[[str, str], None]:
    """What to call as each run on a clip begins, with a sentence and what a live display says it is about."""
    each = 1 + len(everyone) * (1 + _num_repeats(config))
    done = itertools.count(index * each)
    name = nth("clip", index + 1, len(clips), clips[index].prompt)

    def begin(text: str, about: str) -> None:
        total = each * len(clips)
        on_event(Event("run", text, num_steps=total, done=next(done), about=f"{about or text}, {name}"))

    return begin


@torch.inference_mode()
def _denoise(session: Session, plan: Plan, embeds: Any, on_event: OnEvent) -> tuple[Tensor, list[Any]]:
    latents, recorder = session.denoise(plan, embeds, on_event)
    return latents.float().cpu(), recorder.steps


@torch.inference_mode()
def _decode(session: Session, latents: Tensor, on_event: OnEvent) -> np.ndarray:
    return decode_frames(session.pipe.vae, latents.to(session.pipe._execution_device), on_event)


def _relative(found: Tensor, expected: Tensor) -> float:
    found, expected = found.double(), expected.double()
    return float((found - expected).norm() / expected.norm())


def _density(plan: Plan, counted_densities: list[float | None]) -> float:
    """The fraction of all query-key pairs that is attended exactly: as counted, where the method counts it."""
    layers = plan.weights.source.shape.num_layers
    known = counted_densities
    if not any(density is not None for density in known):
        bare = registry.get(plan.config.attention)  # without exact rows
        known = [plan.schedule.mean(lambda config: bare.density(config, plan.grid))] * layers
    exact = exact_share(plan.num_tokens, plan.config.delta)
    density: float = density_section(known, plan.dense, exact)["density"]
    return density


def _label(row: Row, reference: Row) -> str:
    seconds = statistics.median(row.runs[-1].denoise_s)
    faster = statistics.median(reference.runs[-1].denoise_s) / seconds
    return f"{row.label}\n{seconds:.2f} s" + ("" if row.sparsity == 0 else f", {faster:.2f}x")


@contextmanager
def _places(config: CompareConfig, clips: list[GenerateConfig], plan: Plan) -> Iterator[tuple[list[Path], Path]]:
    """The final paths of the videos and of the JSON, which no other run writes meanwhile.

    Raises: UsageError where one exists and is not to be replaced, SlagenError where another run writes it.
    """
    output, single = user_path(config.base.output), config.prompts is None
    settings = {**plan.settings, "methods": [repr(row) for row in config.rows], "seeds": [clip.seed for clip in clips]}
    settings = {name: value for name, value in settings.items() if name not in ("output", "overwrite")}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:8]
    if is_video(config.base.output):
        if not single:
            raise UsageError(
                f"{output} is a single file, but --prompts needs one for each prompt. Give a folder with --output."
            )
        videos = [output]
    else:
        videos = [
            output / f"compare-{index:04d}-{clip.slug}-s{clip.seed}-{digest}.mp4" for index, clip in enumerate(clips, 1)
        ]
    path = videos[0].with_suffix(".json") if single else output / f"compare-{digest}.json"
    with reserved(path, videos[0]):
        for file in (*videos, path):
            check_not_taken(file, config.base.overwrite, "--output or --seed")
        yield videos, path
