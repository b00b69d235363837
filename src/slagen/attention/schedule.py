"""Schedule: what an attention method does in each step and layer of a clip, and what that costs. No torch here."""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from slagen.attention import learned
from slagen.attention.choices import Sparsity, for_all_steps, in_all_steps, named_steps
from slagen.attention.cost import ModelShape, dense_attention_flops
from slagen.attention.delta.method import exact_share
from slagen.attention.policy import AttentionPolicy, DensePart
from slagen.attention.protocol import Grid, Method
from slagen.errors import UsageError
from slagen.io.text import counted

MAX_NOTES = 4  # lines on what the steps run with


@dataclass(frozen=True)
class Schedule:
    """The config of an attention method in each denoising step of a clip.

    Args:
        method: that runs, with its correction. grid: of the clip's tokens.
        configs: one for each step, or a tuple with one for each layer; the same one wherever as many blocks are kept,
            so that compiled code, which is specialised for the numbers in it, is compiled once for each density.
        policy: what uses dense attention in any case, whatever the config of the step. num_layers: of the model.
        sparsities: as asked for in each step, or in each of its layers, where a --sparsity-schedule sets them;
            otherwise None.
    """

    method: Method
    grid: Grid
    configs: tuple[Any, ...]
    policy: AttentionPolicy
    num_layers: int
    sparsities: tuple[Sparsity, ...] | None = None

    @classmethod
    def of(
        cls, method: Method, config: Any, grid: Grid, policy: AttentionPolicy, num_steps: int, num_layers: int
    ) -> Schedule:
        """Args: config: of the steps that no pair names. Raises: UsageError for a pair's step that there is not, and
        for sparsities of another number of layers."""
        if policy.sparsity_schedule is None:
            return cls(method, grid, (config,) * num_steps, policy, num_layers)
        asked = [config.sparsity if each is None else each for each in policy.sparsities(num_steps)]
        alike = {method.density(config, grid): config}

        def of_one(sparsity: float) -> Any:
            own = method.configure(config, {"sparsity": sparsity}, grid)
            density = method.density(own, grid)
            return alike.setdefault(density, own) if 0 < density < 1 else own  # otherwise it says too little

        for each in asked:
            check_num_layers(each, num_layers)
        configs = [tuple(map(of_one, each)) if isinstance(each, tuple) else of_one(each) for each in asked]
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
        every = [config for own in self.configs for config in (own if isinstance(own, tuple) else [own])]
        return list(self.configs[:1] if self.sparsities is None else dict.fromkeys(every))

    def _in_layers(self, step: int, of: Sequence[Any]) -> list[Any]:
        """Of configs or sparsities by step, those of a step's layers that are not dense, or the one of all layers."""
        own = of[step]
        if not isinstance(own, tuple):
            return [own]
        return [each for layer, each in enumerate(own) if layer not in self.dense.layers] or list(own)

    def _sparse_steps(self) -> list[int]:
        """The steps that are not dense."""
        return [step for step in range(len(self.configs)) if step not in self.dense.steps]

    def mean(self, value: Callable[[Any], float]) -> float:
        """The mean of a value of the config over the steps and layers that are not dense; over all steps, where all
        are."""
        if len(self._distinct) == 1:
            return value(self._distinct[0])
        own = [self._mean_of(step, value) for step in self._sparse_steps() or range(len(self.configs))]
        return sum(own) / len(own)

    @property
    def mean_sparsity(self) -> float | None:
        """The sparsity asked for, the mean over the steps and layers that are not dense; None of a method without."""
        if self.sparsities is None:
            return getattr(self.configs[0], "sparsity", None)
        steps = self._sparse_steps() or range(len(self.configs))
        own = [self._in_layers(step, self.sparsities) for step in steps]
        return round(sum(sum(each) / len(each) for each in own) / len(own), 12)

    def _mean_of(self, step: int, value: Callable[[Any], float]) -> float:
        """The mean of a value of the config over the layers of a step that are not dense."""
        own = self._in_layers(step, self.configs)
        return value(own[0]) if len(set(own)) == 1 else sum(map(value, own)) / len(own)

    def _flops_with(self, config: Any, shape: ModelShape) -> int:
        """FLOPs of a pass with a config, as if no layer were dense."""
        if self.sparsities is None or self.method.applies(config, self.grid):
            return self.method.cost(config, shape, self.grid)
        return dense_attention_flops(shape, self.grid.num_tokens)

    def mean_flops(self, shape: ModelShape) -> int:
        """FLOPs of self-attention in a forward pass, as if no layer or step were dense; the mean over the steps that
        are not."""
        return round(self.mean(lambda config: self._flops_with(config, shape)))

    def flops_by_layer(self, step: int, shape: ModelShape) -> list[float]:
        """FLOPs of self-attention in a forward pass of a step if all layers had the config of one, as if none were
        dense; for each layer."""
        own = self.configs[step]
        configs = own if isinstance(own, tuple) else (own,) * self.num_layers
        known = {config: self._flops_with(config, shape) for config in configs}
        return [known[config] for config in configs]

    def flops(self, shape: ModelShape) -> list[int]:
        """FLOPs of self-attention in a forward pass of each step."""
        full = dense_attention_flops(shape, self.grid.num_tokens)
        own = [self._mean_of(step, lambda config: self._flops_with(config, shape)) for step in range(len(self.configs))]
        return [round(flops + self.dense.share_of(step) * (full - flops)) for step, flops in enumerate(own)]

    def densities(self, counts: Sequence[Sequence[float | None]] = ()) -> list[float]:
        """The fraction of all query-key pairs that is attended exactly in each step, dense layers included.

        Args: counts: what the layers counted in each step, in passes in which they were not dense, where they do.
        """
        exact, found = exact_share(self.grid.num_tokens, self.method.delta), []
        for step in range(len(self.configs)):
            known = [x for x in counts[step] if x is not None] if step < len(counts) else []
            planned = self._mean_of(step, lambda config: self.method.density(config, self.grid))
            own = exact + (1 - exact) * sum(known) / len(known) if known else planned
            found.append(own + self.dense.share_of(step) * (1 - own))
        return found

    @property
    def mean_density(self) -> float:
        """The fraction of all query-key pairs attended exactly, as if no layer or step were dense; the mean over the
        steps that are not."""
        return self.mean(lambda config: self.method.density(config, self.grid))

    def describe(self) -> dict[str, Any]:
        """What a report says of the settings that run.

        What differs between steps or layers is the mean over those that are not dense; "averaged" names it.
        """
        steps = self._sparse_steps() or range(len(self.configs))
        used = dict.fromkeys(config for step in steps for config in self._in_layers(step, self.configs))
        abouts = {config: self.method.describe(config, self.grid) for config in used}
        first, *others = abouts.values()
        averaged = [name for name, value in first.items() if any(each[name] != value for each in others)]

        def mean(*path: str) -> float:
            def number(config: Any) -> Any:
                return functools.reduce(operator.getitem, path, abouts[config])

            return round(self.mean(number), 12)

        means: dict[str, Any] = {
            name: {key: mean(name, key) for key in first[name]} if isinstance(first[name], dict) else mean(name)
            for name in averaged
        }
        if self.sparsities is not None:
            means["sparsity"] = self.mean_sparsity  # as asked for, which blocks of whole tokens only come near to
        return {**first, **means, **({"averaged": averaged} if averaged else {})}

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
        groups = dict[Sparsity, list[int]]()
        for step in self._sparse_steps():
            groups.setdefault(self.sparsities[step], []).append(step)
        lines = []
        for sparsity, steps in list(groups.items())[: MAX_NOTES if len(groups) == MAX_NOTES else MAX_NOTES - 1]:
            lines.append(f"{named_steps(steps)}: {self._note_of(sparsity, steps[0])}")
        if rest := list(groups)[len(lines) :]:
            steps = [step for each in rest for step in groups[each]]
            lines.append(f"{counted(len(steps), 'more step')}: {span(self._asked_in(steps))}")
        return lines

    def _note_of(self, sparsity: Sparsity, step: int) -> str:
        """What a step runs with."""
        if isinstance(sparsity, tuple):
            density = self._mean_of(step, lambda config: self.method.density(config, self.grid))
            return f"{span(self._asked_in([step]))} by layer -> {density:.1%} of all query-key pairs"
        config = self.method.configure(self._in_layers(step, self.configs)[0], {"sparsity": sparsity}, self.grid)
        return self.method.note(config, {}, self.grid) or f"sparsity {sparsity:g}"

    def _asked_in(self, steps: Sequence[int]) -> list[float]:
        """The sparsities asked for in some steps, in the layers that are not dense."""
        return [each for step in steps for each in self._in_layers(step, self.sparsities or ())]

    def differences(self, trained: Any, layers: tuple[float, ...] | None = None) -> list[str]:
        """What to say of weights that were trained with other settings; of the sparsity, in how many steps.

        Args: layers: the sparsity of each layer in training, where it was not one for all.
        """
        if layers is not None:
            same = dataclasses.replace(self._distinct[0], sparsity=trained.sparsity)
            told = f"the weights were trained with {span(layers)} by layer, but this run uses other ones"
            alike = set(self.sparsities or ()) == {in_all_steps(for_all_steps(layers))}
            return [told] * (not alike) + learned.differences(same, trained)
        if self.sparsities is None:
            return learned.differences(self.configs[0], trained)
        same = dataclasses.replace(self._distinct[0], sparsity=trained.sparsity)

        def others_in(steps: Sequence[int]) -> list[float]:
            return [each for each in self._asked_in(steps) if not math.isclose(each, trained.sparsity, abs_tol=1e-9)]

        changed = [step for step in self._sparse_steps() if others_in([step])]
        others = others_in(changed)
        told = (
            f"the weights were trained at sparsity {trained.sparsity:g}, but {len(changed)} of "
            f"{counted(len(self.configs), 'step')} run with {span(others)}"
        ) if others else ""  # fmt: skip
        return [told] * bool(others) + learned.differences(same, trained)


def check_num_layers(sparsity: Sparsity | None, num_layers: int) -> None:
    """Raise UsageError for sparsities of another number of layers."""
    if isinstance(sparsity, tuple) and len(sparsity) != num_layers:
        raise UsageError(
            f"sparsity_schedule has sparsities for {counted(len(sparsity), 'layer')}, but this model has "
            f"{num_layers}. Give one sparsity, or make a schedule for this model with slagen tune."
        )


def span(sparsities: Sequence[float]) -> str:
    """Sparsities in words, from the least to the highest."""
    least, most = min(sparsities), max(sparsities)
    return f"sparsity {least:g}" if least == most else f"sparsities from {least:g} to {most:g}"
