"""What every attention method has in common: where a clip is dense, its sparsity by step, its correction. No torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from slagen.attention.choices import Sparsity, chosen, parse, parse_schedule, scheduled
from slagen.attention.cost import ModelShape
from slagen.attention.delta.method import check_delta
from slagen.attention.protocol import Grid, Method
from slagen.errors import UsageError
from slagen.io.forms import shown
from slagen.io.text import counted


@dataclass(frozen=True)
class AttentionPolicy:
    """What every method has in common: where dense attention takes its place, its sparsity by step, its correction.

    Args:
        dense_steps: denoising steps, such as "0-9,-1": from 0, negative ones from the end, "10-" to the last; or "20%",
            the first ones.
        dense_layers: transformer blocks, in the same form.
        min_tokens: clips of fewer tokens use dense attention in all layers.
        delta: query rows of which one is attended exactly and corrects the others; see `delta/method.py`.
        sparsity_schedule: the sparsity of some steps, such as "0-9:0.8,10-:0.95", or of each layer in them, such as
            "0-:0.8/0.95" of a model with two; of methods that have one.
    Raises: UsageError for what is none of these.
    """

    dense_steps: str | None = None
    dense_layers: str | None = None
    min_tokens: int | None = None
    delta: int | None = None
    sparsity_schedule: str | None = None

    def __post_init__(self) -> None:
        check_delta(self.delta)
        if self.sparsity_schedule is not None:
            parse_schedule(self.sparsity_schedule)
        for name in ("dense_steps", "dense_layers"):
            if getattr(self, name) is not None:
                parse(name, getattr(self, name))
        if self.min_tokens is not None and (type(self.min_tokens) is not int or self.min_tokens < 0):
            raise UsageError(
                f"min_tokens is {shown(self.min_tokens)}, but must be a whole number of at least 0. Try "
                "--min-tokens 4096."
            )

    def resolve(self, num_steps: int, num_layers: int, num_tokens: int) -> DensePart:
        """The steps and layers of a clip that use dense attention. Raises UsageError for an unknown one."""
        steps = chosen("dense_steps", self.dense_steps, num_steps)
        part = DensePart(steps, chosen("dense_layers", self.dense_layers, num_layers), num_steps, num_layers)
        return part.everywhere() if self.min_tokens is not None and num_tokens < self.min_tokens else part

    def sparsities(self, num_steps: int) -> tuple[Sparsity | None, ...]:
        """The sparsity of each step, or of each layer in it; None where the schedule does not say it.

        Raises: UsageError for an unknown step.
        """
        return scheduled(self.sparsity_schedule, num_steps)

    def check_steps(self, num_steps: int) -> None:
        """Raise UsageError for a denoising step that there is not."""
        chosen("dense_steps", self.dense_steps, num_steps)
        self.sparsities(num_steps)

    def note(self, num_tokens: int, part: DensePart) -> str | None:
        """One line on the dense steps and layers of a clip of so many tokens; None if there are none."""
        if self.min_tokens is not None and num_tokens < self.min_tokens:
            return (
                f"this clip has {counted(num_tokens, 'token')}, fewer than --min-tokens {self.min_tokens}, so it uses "
                "dense attention"
            )
        if part.share == 0:
            return self._rounded_off(part)
        steps, layers = counted(part.num_steps, "step"), counted(part.num_layers, "layer")
        return f"{len(part.steps)} of {steps} and {len(part.layers)} of {layers} use dense attention"

    def _rounded_off(self, part: DensePart) -> str | None:
        """One line on percentages that are less than half a step or layer; None if there are none."""
        asked = (
            ("dense_steps", self.dense_steps, part.num_steps),
            ("dense_layers", self.dense_layers, part.num_layers),
        )
        found = []
        for name, text, count in asked:
            share = None if text is None else parse(name, text)
            if isinstance(share, float) and share > 0:
                found.append(f"{name} {text} of {counted(count, name[6:-1])} rounds to none")
        return ", and ".join(found) or None


@dataclass(frozen=True)
class DensePart:
    """The steps and layers of a clip that use dense attention, in order, and how many there are."""

    steps: tuple[int, ...]
    layers: tuple[int, ...]
    num_steps: int
    num_layers: int

    @property
    def share(self) -> float:
        """The fraction of all attention calls that are dense."""
        return 1 - (1 - len(self.steps) / self.num_steps) * (1 - len(self.layers) / self.num_layers)

    def share_of(self, step: int) -> float:
        """The fraction of a step's attention calls that are dense."""
        return 1.0 if step in self.steps else len(self.layers) / self.num_layers

    def everywhere(self) -> DensePart:
        """The same with dense attention in all layers."""
        return dataclasses.replace(self, layers=tuple(range(self.num_layers)))

    def mean(self, own: int, dense: int) -> int:
        """A cost of one forward pass, all layers, as the mean over the steps: the method's own, and dense."""
        return own if self.share == 0 else round(own + self.share * (dense - own))

    def to_dict(self) -> dict[str, list[int]]:
        """What a report says of it; empty if nothing is dense."""
        found = {"dense_steps": list(self.steps), "dense_layers": list(self.layers)}
        return {name: indices for name, indices in found.items() if indices}


@dataclass(frozen=True)
class Remembered:
    """What a method's layers remember from step to step of a clip: bytes of `passes` kinds of pass in `layers`."""

    num_bytes: int
    layers: int
    passes: int

    @classmethod
    def of(
        cls, method: Method, config: Any, shape: ModelShape, grid: Grid, item_bytes: int, guidance: float,
        part: DensePart,
    ) -> Remembered:  # fmt: skip
        """Args: item_bytes: of a number of q. guidance: above 1 there are two kinds. part: what runs dense."""
        layers = part.num_layers - len(part.layers) if len(part.steps) < part.num_steps else 0
        passes = 2 if guidance > 1 else 1
        if method.memory is None or layers == 0:
            return cls(0, 0, passes)
        return cls(method.memory(config, shape, grid, item_bytes) * passes * layers // part.num_layers, layers, passes)

    def notes(self, name: str) -> list[str]:
        """One line on it, or none. Args: name: of the method."""
        if self.num_bytes == 0:
            return []
        size = f"{self.num_bytes / 2**30:.1f} GiB" if self.num_bytes >= 2**30 else f"{self.num_bytes / 2**20:.1f} MiB"
        where = counted(self.layers, "layer") + ", for both guidance passes" * (self.passes == 2)
        return [
            f"{name} attention keeps {size} in memory between steps ({where}); dense layers (--dense-layers) "
            "keep nothing"
        ]
