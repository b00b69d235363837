"""Errors to the dense teacher: of the velocity, and of each layer's self-attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

LEVELS = 4  # noise levels at which an error is measured


@dataclass(frozen=True)
class Example:
    """A clip that a transformer is evaluated on.

    Args:
        latents: (C, T, h, w) float32, normalised. text: (S, E), its caption as the text encoder gives it.
    """

    latents: Tensor
    text: Tensor


@dataclass(frozen=True)
class TeacherErrors:
    """Relative L2 errors to the dense teacher: of the velocity, and of what self-attention gives in each layer."""

    error: float
    layers: list[float]

    def to_dict(self) -> dict[str, Any]:
        """As a checkpoint keeps it."""
        return {"error": self.error, "layers": self.layers}


def noise_levels(count: int, mean: float, std: float) -> list[float]:
    """The middles of `count` equally likely parts of t = sigma / (1 + sigma), log sigma ~ N(mean, std)."""
    normal = NormalDist(mean, std)
    sigmas = [np.exp(normal.inv_cdf((i + 0.5) / count)) for i in range(count)]
    return [float(sigma / (1 + sigma)) for sigma in sigmas]


def mix(latents: Tensor, noise: Tensor, level: Tensor) -> Tensor:
    """Latents with noise, x_t = (1 - t) x_0 + t noise; the three broadcast."""
    return (1 - level) * latents + level * noise


def velocity(transformer: nn.Module, noisy: Tensor, level: Tensor, text: Tensor) -> Tensor:
    """The velocity noise - x_0 that a Wan transformer predicts for noisy latents (B, C, T, h, w) at t = level (B,)."""
    return transformer(hidden_states=noisy, timestep=1000 * level, encoder_hidden_states=text, return_dict=False)[0]


@torch.no_grad()
def velocity_error(
    student: nn.Module,
    teacher: nn.Module,
    examples: Sequence[Example],
    levels: Sequence[float],
    *,
    device: torch.device | None = None,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    after_each: Callable[[], None] = lambda: None,
) -> float:
    """Relative L2 error of a student's velocity to its teacher's, over all examples and noise levels together.

    Args:
        levels: t of each, in (0, 1). The noise is the same in every call.
        after_each: called after each example at each level.
    Returns: ||student - teacher|| / ||teacher||.
    """
    device = device or next(teacher.parameters()).device
    difference = torch.zeros((), dtype=torch.float64)
    scale = torch.zeros((), dtype=torch.float64)
    for noisy, level, text in noisy_inputs(examples, levels, device):
        with autocast():
            expected = velocity(teacher, noisy, level, text).double().cpu()
            found = velocity(student, noisy, level, text).double().cpu()
        difference += (found - expected).square().sum()
        scale += expected.square().sum()
        after_each()
    return float((difference / scale).sqrt())


@torch.no_grad()
def layer_errors(
    student: nn.Module,
    teacher: nn.Module,
    examples: Sequence[Example],
    levels: Sequence[float],
    *,
    device: torch.device | None = None,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    total: Callable[[Tensor], Tensor] = lambda sums: sums,
    after_each: Callable[[], None] = lambda: None,
) -> list[float]:
    """The same for the output of self-attention in each layer; it includes the errors of earlier layers.

    Args:
        total: sums over the processes that share the tokens of a clip.
    """
    device = device or next(teacher.parameters()).device
    layers = len(teacher.blocks)  # type: ignore[arg-type]
    difference, scale = torch.zeros(layers, dtype=torch.float64), torch.zeros(layers, dtype=torch.float64)
    for noisy, level, text in noisy_inputs(examples, levels, device):
        with autocast(), AttentionOutputs(teacher) as expected, AttentionOutputs(student) as found:
            velocity(teacher, noisy, level, text)
            velocity(student, noisy, level, text)
        for i, (e, f) in enumerate(zip(expected.tensors, found.tensors, strict=True)):
            difference[i] += (f.double() - e.double()).square().sum().cpu()
            scale[i] += e.double().square().sum().cpu()
        after_each()
    difference, scale = total(difference.float().to(device)), total(scale.float().to(device))
    return (difference / scale).sqrt().tolist()


class AttentionOutputs:
    """Within the block, `tensors` collects each layer's self-attention output in a forward pass, (B, L, width)."""

    def __init__(self, transformer: nn.Module) -> None:
        self.transformer = transformer
        self.tensors: list[Tensor] = []
        self._handles: list[Any] = []

    def __enter__(self) -> AttentionOutputs:
        layers: Any = self.transformer.blocks
        count = len(layers)

        def keep(module: nn.Module, args: Any, output: Tensor) -> None:
            if len(self.tensors) < count:  # gradient checkpointing calls again in the backward pass
                self.tensors.append(output)

        self._handles = [block.attn1.register_forward_hook(keep) for block in layers]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()


def noisy_inputs(examples: Sequence[Example], levels: Sequence[float], device: torch.device) -> Any:
    """What a transformer gets for every example and level: noisy latents, level and text, alike in every call."""
    for i, example in enumerate(examples):
        for j, level in enumerate(levels):
            generator = torch.Generator().manual_seed(i * 1009 + j)
            noise = torch.randn(example.latents.shape, generator=generator)
            noisy = mix(example.latents, noise, torch.tensor(level))
            yield noisy[None].to(device), torch.tensor([level], device=device), example.text[None].to(device)
