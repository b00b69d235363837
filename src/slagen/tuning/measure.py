"""Measure the velocity error of a schedule along dense runs, and keep it in a file for the next call."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from slagen.attention.schedule import Schedule
from slagen.comparison.trajectory import Trajectory, velocity_squares
from slagen.events import Event, counted_parts
from slagen.generation.prompt_cache import PromptCache
from slagen.generation.resolve import Plan
from slagen.generation.session import Session
from slagen.io.documents import parse_json
from slagen.io.files import append
from slagen.io.forms import Fault, sha256
from slagen.io.reading import digest, open_regular
from slagen.io.text import counted, to_json

Squares = dict[int, tuple[float, float]]  # by step: of the difference to the dense velocity, and of that
OnEvent = Callable[[Event], None]
LINE = {"key": sha256(), "squares": [(int, float, float)]}
MAX_LINE = 2**20


@dataclass
class Store:
    """What was measured so far, in a file of lines, so that an interrupted call is resumed.

    Args:
        path: of the file. about: all that changes what is measured; lines of other runs do not count.
        known: by key.
    """

    path: Path
    about: Any
    known: dict[str, Squares] = field(default_factory=dict)

    def read(self) -> None:
        """Take over the file's lines; those that are broken are measured again."""
        try:
            with open_regular(self.path) as handle:
                while line := handle.readline(MAX_LINE):
                    try:
                        found = parse_json(line, LINE)
                    except Fault:
                        continue
                    self.known[found["key"]] = {step: (error, scale) for step, error, scale in found["squares"]}
        except OSError:  # there is none
            return

    def key(self, what: Any) -> str:
        """The key of a measurement."""
        return digest([self.about, what])

    def add(self, key: str, squares: Squares) -> None:
        """Keep a measurement. Raises OSError where the disk does not take it."""
        self.known[key] = squares
        self.path.parent.mkdir(parents=True, exist_ok=True)
        row = {"key": key, "squares": [[step, *pair] for step, pair in squares.items()]}
        append(self.path, (to_json(row) + "\n").encode())


@dataclass
class Clip:
    """A prompt with its seed, its plan with dense attention, and the dense run once it is recorded."""

    plan: Plan
    trajectory: Trajectory | None = None


@dataclass
class Meter:
    """Measures schedules of one attention on some clips.

    Args:
        session: any attention is installed in it. prompts: of all clips.
        plan: of the attention that is measured, for any prompt.
        store: of what is known already.
        seconds, done: of the measurements so far, and the steps of clips in them.
        ahead: about as many steps of clips are still to be measured, this time's included.
    """

    session: Session
    prompts: PromptCache
    plan: Plan
    store: Store
    on_event: OnEvent
    seconds: float = 0.0
    done: int = 0
    ahead: int = 0

    def _record(self, clips: Sequence[Clip]) -> None:
        """Run dense attention on every clip, and then install the plan's."""
        self.session.use(clips[0].plan)
        for number, clip in enumerate(clips, 1):
            text = f"dense attention, prompt {number} of {len(clips)}"
            self.on_event(Event("run", text, about=text))
            embeds = self.prompts.embeds(self.session, clip.plan)
            for text in self.session.cuts(clip.plan):
                self.on_event(Event("warning", text))
            clip.trajectory = Trajectory(clip.plan.config.steps or 1)
            with clip.trajectory.recording(self.session.pipe.transformer), torch.inference_mode():
                self.session.denoise(clip.plan, embeds, self.on_event)
        self.session.use(self.plan)

    def schedule(self, text: str) -> Schedule:
        """What a --sparsity-schedule comes to with the plan's attention."""
        return dataclasses.replace(
            self.plan, config=dataclasses.replace(self.plan.config, sparsity_schedule=text)
        ).schedule

    def squares(self, text: str, clips: Sequence[Clip], steps: Sequence[int], label: str) -> Squares:
        """The squared errors of a schedule in some steps, of all clips together.

        Args: label: what is being measured, for the progress.
        """
        key = self.store.key([text, [[clip.plan.config.prompt, clip.plan.config.seed] for clip in clips], list(steps)])
        if key not in self.store.known:
            self.store.add(key, self._measure(text, clips, steps, label))
        self.ahead -= len(steps) * len(clips)
        return self.store.known[key]

    def _measure(self, asked: str, clips: Sequence[Clip], steps: Sequence[int], label: str) -> Squares:
        if any(clip.trajectory is None for clip in clips):
            self._record(clips)
        each = len(steps) * len(clips)
        seconds = max(each, self.ahead) * self.seconds / self.done if self.done else 0
        total, text = self.done + max(each, self.ahead), label + (f", {in_words(seconds)} left" if seconds else "")
        self.on_event(Event("run", text, num_steps=total, done=self.done, about=label, left_s=seconds or None))
        passes = each * (2 if (self.plan.config.guidance_scale or 0) > 1 else 1)
        self.on_event(Event("stage", "measure", num_steps=passes))
        on_pass = counted_parts(self.on_event, passes)
        schedule, sums = self.schedule(asked), dict.fromkeys(steps, (0.0, 0.0))
        began = time.perf_counter()
        for clip in clips:
            assert clip.trajectory is not None
            found = velocity_squares(
                self.session.pipe.transformer, clip.trajectory, schedule.dense, schedule.by_step, steps=set(steps),
                on_pass=on_pass,
            )  # fmt: skip
            for step, (error, scale) in found.items():
                sums[step] = sums[step][0] + error, sums[step][1] + scale
        self.seconds, self.done = self.seconds + time.perf_counter() - began, self.done + each
        return sums

    def error(self, text: str, clips: Sequence[Clip], label: str) -> float:
        """The velocity error of a schedule in all steps."""
        steps = range(self.plan.config.steps or 1)
        squares = self.squares(text, clips, steps, label).values()
        return relative(squares)


def relative(squares: Any) -> float:
    """The relative error of pairs of squared errors and squares."""
    error, scale = (sum(each) for each in zip(*squares, strict=True))
    return float((error / scale) ** 0.5)


def in_words(seconds: float) -> str:
    """About how long something takes."""
    return "less than a minute" if seconds < 60 else f"about {counted(round(seconds / 60), 'minute')}"
