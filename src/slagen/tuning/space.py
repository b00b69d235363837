"""The schedules to choose from: parts of the steps, layers that are not dense, candidates, and what each costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from slagen.attention.schedule_file import LayerSchedule
from slagen.errors import UsageError
from slagen.generation.resolve import Plan
from slagen.io.text import counted
from slagen.tuning.measure import Squares
from slagen.tuning.search import Choices

MEASURED_STEPS = 8  # of all, spread evenly, in which single layers are changed


@dataclass(frozen=True)
class Space:
    """What a schedule may be.

    Args:
        plan: of the attention that is tuned. candidates: sparsities, each of another number of blocks.
        parts: the steps of each part. layers: those that are not dense.
    """

    plan: Plan
    candidates: tuple[float, ...]
    parts: tuple[tuple[int, ...], ...]
    layers: tuple[int, ...]

    @classmethod
    def of(cls, plan: Plan, candidates: Sequence[float], num_parts: int) -> Space:
        """Raises: UsageError where there are too few steps, or nothing to choose."""
        steps, method, grid = plan.config.steps or 1, plan.method, plan.grid
        if num_parts > steps:
            raise UsageError(f"step_parts is {num_parts}, but there {_are(steps)}. Give a lower --step-parts.")
        by_density = dict[float, float]()
        for sparsity in sorted(candidates):
            config = method.configure(plan.attention, {"sparsity": sparsity}, grid)
            by_density.setdefault(method.density(config, grid), sparsity)
        if len(by_density) < 2:
            raise UsageError(
                f"all candidates keep as many blocks of this clip of {counted(plan.num_tokens, 'token')}, so there is "
                "nothing to choose. Give a larger --size, more frames, or other --candidates."
            )
        bounds = [round(number * steps / num_parts) for number in range(num_parts + 1)]
        parts = tuple(tuple(range(first, end)) for first, end in zip(bounds, bounds[1:], strict=False))
        layers = [layer for layer in range(plan.weights.source.shape.num_layers) if layer not in plan.dense.layers]
        if not layers or len(plan.dense.steps) == steps:
            raise UsageError("all steps or layers use dense attention, so there is nothing to tune. Leave some sparse.")
        return cls(plan, tuple(by_density.values()), parts, tuple(layers))

    @property
    def items(self) -> list[tuple[int, int]]:
        """What has a sparsity of its own: part and layer."""
        sparse = [number for number, part in enumerate(self.parts) if self._sparse(part)]
        return [(part, layer) for part in sparse for layer in self.layers]

    @property
    def measured_steps(self) -> list[int]:
        """The steps in which single layers are changed: some of each part, none of the dense ones."""
        found = set[int]()
        for part in self.parts:
            sparse = self._sparse(part)
            count = min(len(sparse), max(1, MEASURED_STEPS // len(self.parts)))
            found |= {sparse[(2 * number + 1) * len(sparse) // (2 * count)] for number in range(count)}
        return sorted(found)

    def _sparse(self, part: Sequence[int]) -> list[int]:
        return [step for step in part if step not in self.plan.dense.steps]

    def schedule(self, choices: Choices, rest: int) -> LayerSchedule:
        """Args: choices: of every item. rest: the candidate of layers and parts that are dense in any case."""
        num_layers = self.plan.weights.source.shape.num_layers
        sparsities = [[self.candidates[rest]] * num_layers for _ in self.parts]
        for (part, layer), choice in zip(self.items, choices, strict=True):
            sparsities[part][layer] = self.candidates[choice]
        parts = tuple((_named(part, self.parts), tuple(own)) for part, own in zip(self.parts, sparsities, strict=True))
        return LayerSchedule(self.plan.config.attention, num_layers, parts)

    def uniform(self, candidate: int) -> Choices:
        """The same candidate everywhere."""
        return (candidate,) * len(self.items)

    def weighted(self, squares: Squares) -> list[float]:
        """Of measured steps, the relative squared error that each part adds in all of its steps."""
        sums = []
        for part in self.parts:
            own = [squares[step] for step in part if step in squares]
            sums.append([len(self._sparse(part)) / max(1, len(own)) * sum(each) for each in zip(*own, strict=True)])
        scale = sum(each[1] for each in sums if each)
        return [each[0] / scale if each else 0.0 for each in sums]


def _are(count: int) -> str:
    return f"{'is' if count == 1 else 'are'} {counted(count, 'denoising step')}"


def _named(part: Sequence[int], parts: Sequence[Sequence[int]]) -> str:
    """Steps as a --sparsity-schedule names them; the last ones without an end."""
    if part == parts[-1]:
        return f"{part[0]}-"
    return str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}"
