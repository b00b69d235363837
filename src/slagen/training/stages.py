"""How the router of an attention method is trained: every layer by itself, against dense attention."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from slagen.wan.processor import follow


def layer_distillation(student: nn.Module, teacher: nn.Module, run: Callable[[], Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Each layer's attention, by degrees, of the dense teacher's q, k and v, against what the teacher makes of them.

    Args:
        student: a transformer, its attention with `soft`. teacher: the same, with dense attention.
        run: a forward pass of the teacher.
    Returns: the mean over the layers of ||difference||^2 / ||output||^2, for each clip, (B,) float32; and the sums of
        both squares, float64.
    """
    layers: list[tuple[Tensor, Tensor]] = []

    def compare(layer: Any, arguments: Any, expected: Tensor) -> None:
        layer.soft = True
        try:
            with torch.enable_grad():
                q, k, v, inputs = arguments
                inputs = dataclasses.replace(inputs, layer=layer.place, context=layer.context)
                found = nn.Module.__call__(layer, q, k, v, inputs).float()
                wrong = (found - expected.float()).square().sum((1, 2, 3))
        finally:
            layer.soft = False
        layers.append((wrong, expected.float().square().sum((1, 2, 3))))

    def hook(layer: Any) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda _, arguments, output: compare(layer, arguments, output)

    pairs: Any = zip(student.blocks, teacher.blocks, strict=True)  # type: ignore[arg-type]
    handles = [own.attn1.processor.register_forward_hook(hook(each.attn1.processor)) for each, own in pairs]
    handles.append(follow(student, teacher))
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    wrong, right = (torch.stack(x) for x in zip(*layers, strict=True))
    loss = (wrong / right.clamp_min(1e-12)).mean(0)
    return loss, wrong.detach().double().sum(), right.double().sum()
