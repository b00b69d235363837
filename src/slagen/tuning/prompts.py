"""What schedules are measured on: a file of prompts, or a few that suit the model, each with its seed."""

from __future__ import annotations

import dataclasses

from slagen.errors import UsageError
from slagen.generation.config import MAX_SEED, GenerateConfig
from slagen.generation.prompts import apply, read_prompts
from slagen.wan.defaults import ModelDefaults

SHAPES = (  # for models of the bundled one's vocabulary
    "a red circle moving right", "a blue square growing on a gray background", "a yellow star moving down",
    "a green triangle moving left", "a purple circle shrinking on a navy background", "an orange square moving up",
)  # fmt: skip
SCENES = (
    "a red fox walking through fresh snow, morning light", "waves breaking on a rocky shore at sunset, aerial view",
    "a cook slicing vegetables in a busy kitchen, close-up", "a cat jumping from a sofa onto a carpet, slow motion",
    "rain falling on a neon-lit street at night, people with umbrellas", "a steam train crossing a stone bridge in fog",
)  # fmt: skip
OF_A_LINE = ("negative_prompt", "seed")
HELD_OUT_SEED = 1000  # above the seeds that are tuned on


def clips_of(
    base: GenerateConfig, defaults: ModelDefaults, source: str | None, *, held_out: bool
) -> list[GenerateConfig]:
    """The config of each clip.

    Args:
        base: with the first seed; None is 0. source: a file of prompts; None takes the first or the second half of
            those for the model.
    Raises: UsageError for a faulty file, and for a line that sets what must be the same in all.
    """
    first = (base.seed or 0) + (HELD_OUT_SEED if held_out else 0)
    if first > MAX_SEED - HELD_OUT_SEED:
        raise UsageError(f"seed is {base.seed}, but slagen tune uses higher seeds too. Give a lower --seed.")
    if source is None:
        every = _prompts_for(defaults)
        half = len(every) // 2
        chosen = every[half:] if held_out else every[:half]
        return [dataclasses.replace(base, prompt=text, seed=first + number) for number, text in enumerate(chosen)]
    found = []
    for number, request in enumerate(read_prompts(source)):
        for name in request.fields.keys() - set(OF_A_LINE):
            raise UsageError(
                f"{request.where}: a prompt file for slagen tune cannot set {name.replace('_', ' ')}. Remove it from "
                "this line."
            )
        clip = apply(base, request)
        found.append(clip if "seed" in request.fields else dataclasses.replace(clip, seed=first + number))
    return found


def _prompts_for(defaults: ModelDefaults) -> tuple[str, ...]:
    """Prompts of words that a model knows."""
    if defaults.vocabulary is None:
        return SCENES
    return (defaults.example_prompt,) * len(SHAPES) if any(map(defaults.unknown_words, SHAPES)) else SHAPES


def check_apart(tuned_on: list[GenerateConfig], held_out: list[GenerateConfig]) -> None:
    """Raise UsageError where a prompt is in both, with one seed."""
    known = {(clip.prompt, clip.seed) for clip in tuned_on}
    for clip in held_out:
        if (clip.prompt, clip.seed) in known:
            raise UsageError(
                f"the prompt {clip.prompt[:60]!r} with seed {clip.seed} is used for tuning, so it cannot be held out. "
                "Give other prompts or seeds with --held-out."
            )
