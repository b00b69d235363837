"""Schedule: what an attention method does in each denoising step of a clip, and what that costs. No torch here."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from slagen.attention import learned
from slagen.attention.choices import named_steps
from slagen.attention.cost import ModelShape, dense_attention_flops
from slagen.attention.delta.method import exact_share
from slagen.attention.policy import AttentionPolicy, DensePart
from slagen.attention.protocol import Grid, Method
from slagen.io.text import counted

MAX_NOTES = 4  # lines on what the steps run with


@dataclass(frozen=True)
class Schedule:
    """The config of an attention method in each denoising step of a clip.

    Args:
        method: that runs, with its correction. grid: of the clip's tokens.
        configs: one for each step; the same one wherever as many blocks are kept, so that compiled code, which is
            specialised for the numbers in it, is compiled once for each density.
        policy: what uses dense attention in any case, whatever the config of the step. num_layers: of the model.
        sparsities: as asked for in each step, where a --sparsity-schedule sets them; otherwise None.
    """

    method: Method
    grid: Grid
    configs: tuple[Any, ...]
    policy: AttentionPolicy
    num_layers: int
    sparsities: tuple[float, ...] | None = None

    @classmethod
    def of(
        cls, method: Method, config: Any, grid: Grid, policy: AttentionPolicy, num_steps: int, num_layers: int
    ) -> Schedule:
        """Args: config: of the steps that no pair names. Raises: UsageError for a pair's step that there is not."""
        if policy.sparsity_schedule is None:
            return cls(method, grid, (config,) * num_steps, policy, num_layers)
        asked = [config.sparsity if each is None else each for each in policy.sparsities(num_steps)]
        alike, configs = {method.density(config, grid): config}, []
        for sparsity in asked:
            own = method.configure(config, {"sparsity": sparsity}, grid)
            density = method.density(own, grid)
            configs.append(alike.setdefault(density, own) if 0 < density < 1 else own)  # otherwise it says too little
        return cls(method, grid, tuple(configs), policy, num_layers, tuple(asked))

    @functools.cached_property
    def dense(self) -> DensePart:
        """What uses dense attention: all, where there is nothing to leave out. Raises UsageError for a step or layer
        that there is not."""
        part = self.policy.resolve(len(self.configs), self.num_layers, self.grid.num_tokens)
        return part if self.applies else part.everywhere()

    @property
    def by_step(self) -> tuple[Any, ...] | None:
        """The config of each step; None where no --sparsity-schedule sets it."""
        return None if self.sparsities is None else self.configs

    @property
    def applies(self) -> bool:
        """Whether there is anything to leave out, in any step."""
        return any(config is None or self.method.applies(config, self.grid) for config in self._distinct)

    @property
    def _distinct(self) -> list[Any]:
        return list(self.configs[:1] if self.sparsities is None else dict.fromkeys(self.configs))

    def _sparse_steps(self) -> list[int]:
        """The steps that are not dense."""
        return [step for step in range(len(self.configs)) if step not in self.dense.steps]

    def mean(self, value: Callable[[Any], float]) -> float:
        """The mean of a value of the config over the steps that are not dense; over all steps, where all are."""
        if len(self._distinct) == 1:
            return value(self.configs[0])
        own = [self.configs[step] for step in self._sparse_steps()] or self.configs
        return sum(map(value, own)) / len(own)

    def _flops_with(self, config: Any, shape: ModelShape) -> int:
        """FLOPs of a pass with a config, as if no layer were dense."""
        if self.sparsities is None or self.method.applies(config, self.grid):
            return self.method.cost(config, shape, self.grid)
        return dense_attention_flops(shape, self.grid.num_tokens)

    def mean_flops(self, shape: ModelShape) -> int:
        """FLOPs of self-attention in a forward pass, as if no layer or step were dense; the mean over the steps that
        are not."""
        return round(self.mean(lambda config: self._flops_with(config, shape)))

    def flops(self, shape: ModelShape) -> list[int]:
        """FLOPs of self-attention in a forward pass of each step."""
        full = dense_attention_flops(shape, self.grid.num_tokens)
        own = [self._flops_with(config, shape) for config in self.configs]
        return [round(flops + self.dense.share_of(step) * (full - flops)) for step, flops in enumerate(own)]

    def densities(self, counts: Sequence[Sequence[float | None]] = ()) -> list[float]:
        """The fraction of all query-key pairs that is attended exactly in each step, dense layers included.

        Args: counts: what the layers counted in each step, in passes in which they were not dense, where they do.
        """
        exact, found = exact_share(self.grid.num_tokens, self.method.delta), []
        for step, config in enumerate(self.configs):
            known = [x for x in counts[step] if x is not None] if step < len(counts) else []
            own = exact + (1 - exact) * sum(known) / len(known) if known else self.method.density(config, self.grid)
            found.append(own + self.dense.share_of(step) * (1 - own))
        return found

    @property
    def mean_density(self) -> float:
        """The fraction of all query-key pairs attended exactly, as if no layer or step were dense; the mean over the
        steps that are not."""
        return self.mean(lambda config: self.method.density(config, self.grid))

    def planned(self, shape: ModelShape) -> dict[str, Any]:
        """What an estimate says of the steps, by field; nothing without a --sparsity-schedule."""
        if self.sparsities is None:
            return {}
        return {"step_densities": self.densities(), "step_attention_flops": self.flops(shape)}

    def notes(self, options: Mapping[str, Any]) -> list[str]:
        """What a clip will run with: the method's own line, or with a --sparsity-schedule one for each sparsity.

        Args: options: of the method, as asked for.
        """
        if self.sparsities is None:
            note = self.method.note(self.configs[0], options, self.grid)
            return [] if note is None else [note]
        groups = dict[float, list[int]]()
        for step in self._sparse_steps():
            groups.setdefault(self.sparsities[step], []).append(step)
        lines = []
        for sparsity, steps in list(groups.items())[: MAX_NOTES if len(groups) == MAX_NOTES else MAX_NOTES - 1]:
            config = self.method.configure(self.configs[steps[0]], {"sparsity": sparsity}, self.grid)
            note = self.method.note(config, {}, self.grid) or f"sparsity {sparsity:g}"
            lines.append(f"{named_steps(steps)}: {note}")
        if rest := list(groups)[len(lines) :]:
            lines.append(f"{counted(sum(len(groups[each]) for each in rest), 'more step')}: {_span(rest)}")
        return lines

    def differences(self, trained: Any) -> list[str]:
        """What to say of weights that were trained with other settings; of the sparsity, in how many steps."""
        if self.sparsities is None:
            return learned.differences(self.configs[0], trained)
        same = dataclasses.replace(self.configs[0], sparsity=trained.sparsity)
        used = [self.sparsities[step] for step in self._sparse_steps()]
        others = [each for each in used if not math.isclose(each, trained.sparsity, abs_tol=1e-9)]
        told = (
            f"the weights were trained at sparsity {trained.sparsity:g}, but {len(others)} of "
            f"{counted(len(self.configs), 'step')} run with {_span(others)}"
        ) if others else ""  # fmt: skip
        return [told] * bool(others) + learned.differences(same, trained)


def _span(sparsities: Sequence[float]) -> str:
    least, most = min(sparsities), max(sparsities)
    return f"sparsity {least:g}" if least == most else f"sparsities from {least:g} to {most:g}"
