"""Videos of the dense model and the student side by side, for the same prompts and seeds."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slagen.events import Event, nth
from slagen.generation.frames import decode_frames
from slagen.generation.resolve import make_plan
from slagen.generation.session import Session
from slagen.generation.side_by_side import side_by_side
from slagen.training.data.dataset import Clip, Dataset
from slagen.training.log import CLIPS
from slagen.training.run import Run
from slagen.video import read_mp4, write_video
from slagen.wan.loading import load_pipeline
from slagen.wan.placement import place

SHOWN_PROMPTS = 2  # prompts with side-by-side clips


class Stopped(Exception):
    """A video was given up because the run is stopping."""


def write_clips(run: Run, step: int) -> list[str]:
    """Write a side-by-side video of each shown prompt after a step; returns their file names, in the first process.

    Raises: Stopped where the run is stopped meanwhile.
    """
    setup, data = run.setup, run.data
    files = []
    pipe = load_pipeline(setup.weights.source, setup.recipe.dtype, text_encoder=False, transformer=False)
    place(pipe, setup.team.device, "none")
    shown = shown_clips(data)
    for number, clip in enumerate(shown):
        kept = setup.folder / CLIPS / f"dense-{number}.mp4"
        file = setup.folder / CLIPS / f"step-{step:06d}-{number}.mp4"
        kept.parent.mkdir(exist_ok=True)
        there = not setup.team.agree(run.is_first and not kept.is_file())
        about = nth("clip", number + 1, len(shown), clip.caption)
        setup.emit(Event("run", about=f"with dense attention, {about}"))
        dense = None if there else sample(run, pipe, run.trainer.teacher, clip, number)
        setup.emit(Event("run", about=f"after step {step}, {about}"))
        student = sample(run, pipe, run.trainer.student, clip, number)
        if run.is_first:
            if dense is not None:
                write_video(dense, kept, data.fps)
            labels = ["dense", f"{setup.config.attention}, step {step}"]
            write_video(side_by_side([read_mp4(kept), student], labels), file, data.fps, clip.caption)
            files.append(file.name)
    return files


def shown_clips(data: Dataset) -> list[Clip]:
    """The first held-out clips of different prompts."""
    first: dict[str, Clip] = {}
    for clip in data.held_out:
        first.setdefault(clip.caption, clip)
    return list(first.values())[:SHOWN_PROMPTS]


def sample(run: Run, pipe: Any, transformer: Any, clip: Clip, seed: int) -> np.ndarray:
    """Frames of a clip's prompt, (F, H, W, 3) uint8, as the model's own sampler makes them."""
    setup, source = run.setup, run.setup.weights.source
    frames, height, width = clip.shape[1:]
    grid = source.spatial_factor
    config = dataclasses.replace(
        setup.base, prompt=clip.caption, seed=seed, width=width * grid, height=height * grid,
        num_frames=(frames - 1) * source.temporal_factor + 1, timing="off",
    )  # fmt: skip
    # what is installed stays as it is, so the plan is of no sparsities of the layers
    plan = make_plan(config, dataclasses.replace(setup.weights, layer_sparsities=None))
    plan = dataclasses.replace(plan, attention=None)
    texts: list[Tensor] = [run.data.example(clip).text, run.data.negative_text()]
    names = ("prompt_embeds", "negative_prompt_embeds")
    embeds: dict[str, Tensor | None] = {
        name: text[None].to(setup.team.device) for name, text in zip(names, texts, strict=True)
    }

    def stop_or_emit(event: Event) -> None:
        if run.stopping():
            raise Stopped
        setup.emit(event)

    pipe.register_modules(transformer=transformer)
    training = transformer.training
    transformer.eval()
    try:
        with run.trainer.autocast():
            latents, _ = Session(plan, pipe=pipe).denoise(plan, embeds, stop_or_emit)
        with torch.no_grad():
            return decode_frames(pipe.vae, latents, setup.emit)
    finally:
        transformer.train(training)
