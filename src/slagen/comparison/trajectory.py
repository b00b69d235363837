"""The forward passes of a dense run, and how far other attention is from it on the same inputs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from slagen.attention.policy import DensePart
from slagen.attention.protocol import Inputs
from slagen.wan.observe import watching
from slagen.wan.processor import denoising

KEPT = ("hidden_states", "timestep", "encoder_hidden_states")


@dataclass
class Trajectory:
    """What the transformer was given in each forward pass of a run, and the velocity that it predicted; on the CPU.

    Args:
        num_steps: of the run, each of as many passes.
        inputs: of each pass, by argument. velocities: (1, C, T, h, w) of each.
    """

    num_steps: int
    inputs: list[dict[str, Tensor]] = field(default_factory=list)
    velocities: list[Tensor] = field(default_factory=list)

    @contextmanager
    def recording(self, transformer: Any) -> Iterator[None]:
        """Record every forward pass within the block."""

        def keep(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: tuple[Tensor, ...]) -> None:
            self.inputs.append({name: kwargs[name].cpu().clone() for name in KEPT})
            self.velocities.append(output[0].cpu().clone())

        handle = transformer.register_forward_hook(keep, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()


@dataclass(frozen=True)
class Deviation:
    """Relative L2 errors to dense attention along a trajectory.

    Args:
        velocity: of the velocities of all passes together, from the same latents.
        layers: of each layer's attention, to dense attention of the layer's own q, k and v.
    """

    velocity: float
    layers: list[float]


@torch.inference_mode()
def measure_deviation(
    transformer: Any,
    trajectory: Trajectory,
    dense: DensePart | None,
    configs: Sequence[Any] | None = None,
    on_pass: Callable[[], None] = lambda: None,
) -> Deviation:
    """Run the attention that is installed on every input of a trajectory.

    Args:
        dense: the steps and layers that use dense attention in any case. configs: as for `denoising`.
        on_pass: called after each forward pass.
    """
    layers = _LayerErrors(len(transformer.blocks))
    with watching(transformer, layers):
        squares = velocity_squares(transformer, trajectory, dense, configs, on_pass=on_pass)
    difference, scale = (sum(each) for each in zip(*squares.values(), strict=True))
    return Deviation((difference / scale) ** 0.5, layers.errors)


@torch.inference_mode()
def velocity_squares(
    transformer: Any, trajectory: Trajectory, dense: DensePart | None, configs: Sequence[Any] | None = None, *,
    steps: Collection[int] | None = None, on_pass: Callable[[], None] = lambda: None,
) -> dict[int, tuple[float, float]]:  # fmt: skip
    """Run the attention that is installed on the inputs of some steps of a trajectory.

    Args: as for `measure_deviation`. steps: from 0, others are left out; None runs all.
    Returns: by step, the sum of the squares of the velocity's difference to that of the trajectory, and of the latter.
    """
    device = next(transformer.parameters()).device
    passes = len(trajectory.inputs) // trajectory.num_steps
    found = dict[int, tuple[float, float]]()
    with denoising(transformer, trajectory.num_steps, dense, configs) as end_step:
        for index, (inputs, expected) in enumerate(zip(trajectory.inputs, trajectory.velocities, strict=True)):
            step = index // passes
            if steps is None or step in steps:
                velocity = transformer(**{name: x.to(device) for name, x in inputs.items()}, return_dict=False)[0]
                expected = expected.double()
                difference, scale = found.get(step, (0.0, 0.0))
                difference += float((velocity.double().cpu() - expected).square().sum())
                found[step] = difference, scale + float(expected.square().sum())
                on_pass()
            if (index + 1) % passes == 0:
                end_step()
    return found


class _LayerErrors:
    """Sums up, layer by layer, how far an output is from dense attention."""

    def __init__(self, num_layers: int) -> None:
        self._sums: list[list[Any]] = [[0.0, 0.0] for _ in range(num_layers)]

    def __call__(self, layer: Any, q: Tensor, k: Tensor, v: Tensor, o: Tensor, inputs: Inputs) -> None:
        exact = F.scaled_dot_product_attention(q, k, v).float()
        sums = self._sums[layer.place.index]
        sums[0] += (o.float() - exact).square().sum(dtype=torch.float64)
        sums[1] += exact.square().sum(dtype=torch.float64)

    @property
    def errors(self) -> list[float]:
        return [float(difference / scale) ** 0.5 if scale else 0.0 for difference, scale in self._sums]
