"""Draw inputs, time single attention calls, and measure the peak of this machine."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from slagen.attention.protocol import Attend
from slagen.timing import TURNS, SpanClock, Timer, Times, quartiles


def draw_inputs(sizes: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> list[tuple[Tensor, ...]]:
    """Sets of q, k, v and do: as many as it takes for their q, k and v to exceed twice the second-level cache."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    return draw(max(1, math.ceil(2 * cache / (3 * math.prod(sizes) * dtype.itemsize))), sizes, device, dtype)


def draw(count: int, sizes: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> list[tuple[Tensor, ...]]:
    generator = torch.Generator(device).manual_seed(0)
    drawn = torch.randn(count, 4, *sizes, generator=generator, device=device, dtype=dtype)
    return [one.unbind() for one in drawn.unbind()]


def forward_timer(attend: Attend, inputs: list[tuple[Tensor, ...]], device: torch.device, seconds: float) -> Timer:
    """Times the forward pass under the key "forward", as inference runs it."""

    def call(clock: SpanClock, tensors: tuple[Tensor, ...]) -> None:
        with torch.inference_mode(), clock.span("forward"):
            attend(*tensors[:3])

    return Timer(call, inputs, device.type, seconds)


def both_passes(attend: Attend) -> Callable[[SpanClock, Any], None]:
    """Times a forward pass that saves what the backward pass needs, and that: "forward" and "backward"."""

    def call(clock: SpanClock, tensors: tuple[Tensor, ...]) -> None:
        leaves = [x.detach().requires_grad_() for x in tensors[:3]]
        with clock.span("forward"):
            o = attend(*leaves)
        with clock.span("backward"):
            torch.autograd.grad(o, leaves, tensors[3])

    return call


def median_ms(attend: Attend, inputs: list[tuple[Tensor, ...]], device: torch.device, seconds: float) -> float:
    """The median of a forward pass that is compared with nothing, in milliseconds."""
    timer = forward_timer(attend, inputs, device, seconds)
    timer.warm_up()
    for _ in range(TURNS):
        timer.turn()
    return timer.times("forward").median


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """The peak of this machine: a matrix product in TFLOP/s, a copy in GB/s (read and written)."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    product = median_ms(lambda q, k, v: q @ k, [(a, b, a)], device, 1.0)
    source = torch.randn(2**28 if device.type == "cuda" else 2**26, device=device)
    target = torch.empty_like(source)
    copy = median_ms(lambda q, k, v: q.copy_(k), [(target, source, source)], device, 1.0)
    return 2 * n**3 / product / 1e9, 2 * source.nbytes / copy / 1e6


def spread(times: list[float]) -> Times:
    q1, median, q3 = quartiles(times)
    return Times(median, q1, q3, len(times))
