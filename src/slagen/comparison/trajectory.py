"""The forward passes of a dense run, and how far other attention is from it on the same inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
    device = next(transformer.parameters()).device
    passes = len(trajectory.inputs) // trajectory.num_steps
    layers = _LayerErrors(len(transformer.blocks))
    difference = scale = 0.0
    with denoising(transformer, trajectory.num_steps, dense, configs) as end_step, watching(transformer, layers):
        for index, (inputs, expected) in enumerate(zip(trajectory.inputs, trajectory.velocities, strict=True), 1):
            found = transformer(**{name: x.to(device) for name, x in inputs.items()}, return_dict=False)[0]
            expected = expected.double()
            difference += float((found.double().cpu() - expected).square().sum())
            scale += float(expected.square().sum())
            if index % passes == 0:
                end_step()
            on_pass()
    return Deviation((difference / scale) ** 0.5, layers.errors)


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
