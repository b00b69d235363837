"""One clock for CPU and CUDA: spans are marked while a step runs and read once when it has ended."""

from __future__ import annotations

import time
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from slagen.config import Timing


class SpanClock:
    """Measures spans on one device without waiting for it inside a step.

    On a CPU a mark is the time; on CUDA it is a recorded event, and `read` waits once for the last of them.

    Args:
        device_type: "cuda", or anything else for the host's clock.
    """

    def __init__(self, device_type: str) -> None:
        self.on_cuda = device_type == "cuda"
        self._spans: list[tuple[Any, Any, Any]] = []
        self._spare_events: list[Any] = []

    def mark(self) -> Any:
        """A point in time on the device."""
        if not self.on_cuda:
            return time.perf_counter()
        import torch

        event = self._spare_events.pop() if self._spare_events else torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def add(self, key: Hashable, start: Any, end: Any) -> None:
        """Remember the span between two marks under a key; keys may repeat. A mark may bound one span only."""
        self._spans.append((key, start, end))

    @contextmanager
    def span(self, key: Hashable) -> Iterator[None]:
        """Remember the length of the block under a key."""
        start = self.mark()
        yield
        self.add(key, start, self.mark())

    def read(self) -> list[tuple[Any, float]]:
        """All spans since the last call, as (key, milliseconds). On CUDA this waits for the device, once."""
        spans, self._spans = self._spans, []
        if not self.on_cuda:
            return [(key, (end - start) * 1e3) for key, start, end in spans]
        if spans:
            spans[-1][2].synchronize()
        read = [(key, start.elapsed_time(end)) for key, start, end in spans]
        for _, start, end in spans:
            self._spare_events += [start, end]
        return read

    def cost_ms(self) -> float:
        """What marking and reading one span costs on the host, in milliseconds, measured now."""
        repeats, probe = 2000, SpanClock("cuda" if self.on_cuda else "cpu")
        began = time.perf_counter()
        for _ in range(repeats):
            with probe.span("probe"):
                pass
        probe.read()
        return (time.perf_counter() - began) * 1e3 / repeats


@dataclass
class StepTimes:
    """Where one denoising step's time went, in milliseconds. `attention_ms` lists the forward passes in order."""

    index: int
    timestep: float
    latency_ms: float | None = None
    attention_ms: list[float] = field(default_factory=list)
    layers_ms: list[float] = field(default_factory=list)
    num_spans: int = 0

    @property
    def attention_share(self) -> float | None:
        """Fraction of the step spent in self-attention, None where it was not timed."""
        if not self.latency_ms or not self.num_spans:
            return None
        return sum(self.attention_ms) / self.latency_ms


class StepRecorder:
    """Collects the attention spans of each denoising step.

    The transformer's forward passes call `begin_pass`, the attention processors wrap their work in `attention`, and the
    sampling loop calls `begin_step` and `end_step`. With timing "off" none of them costs anything.
    """

    def __init__(self, device_type: str, level: Timing) -> None:
        self.level = level
        self.clock = SpanClock(device_type)
        self.steps: list[StepTimes] = []
        self._pass = -1
        self._start: Any = None

    @property
    def enabled(self) -> bool:
        return self.level != "off"

    def begin_step(self) -> None:
        """Start a step's clock. The first step starts here; every other where the one before it ended."""
        self._pass = -1
        if self.enabled:
            self._start = self.clock.mark()

    def begin_pass(self) -> None:
        """A forward pass of the transformer begins: conditional first, unconditional second."""
        self._pass += 1

    @contextmanager
    def attention(self, layer: int) -> Iterator[None]:
        """Time one layer's self-attention."""
        if not self.enabled:
            yield
            return
        with self.clock.span((self._pass, layer)):
            yield

    def end_step(self, timestep: float) -> StepTimes:
        """Close the step, read its spans, and begin the next one."""
        step = StepTimes(len(self.steps), timestep)
        if self.enabled:
            self.clock.add("step", self._start, self.clock.mark())
            for key, duration in self.clock.read():
                if key == "step":
                    step.latency_ms = duration
                    continue
                number, layer = key
                step.attention_ms += [0.0] * (number + 1 - len(step.attention_ms))
                step.attention_ms[number] += duration
                if self.level == "layer":
                    step.layers_ms += [0.0] * (layer + 1 - len(step.layers_ms))
                    step.layers_ms[layer] += duration
                step.num_spans += 1
        self.steps.append(step)
        self.begin_step()
        return step
