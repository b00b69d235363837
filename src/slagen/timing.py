"""One clock for CPU and CUDA: spans are marked while a step runs and read once when it has ended."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal

Timing = Literal["off", "step", "layer", "part"]
_timed: ContextVar[tuple[SpanClock, tuple[int, int]] | None] = ContextVar("timed", default=None)
_NOT_TIMED = nullcontext()


COMMUNICATION = "communication"
MIN_REPEATS, MAX_REPEATS, TURNS = 3, 100, 5  # of one measurement


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

    def read(self, origin: Any = None) -> list[tuple[Any, float, float]]:
        """All spans since the last call: key, milliseconds, where it began. On CUDA this waits for the device, once.

        Args:
            origin: a mark, from which the begin is counted in milliseconds; None leaves it 0.
        """
        spans, self._spans = self._spans, []
        if not self.on_cuda:
            return [
                (key, (end - start) * 1e3, 0.0 if origin is None else (start - origin) * 1e3)
                for key, start, end in spans
            ]
        if spans:
            spans[-1][2].synchronize()
        read = [
            (key, start.elapsed_time(end), 0.0 if origin is None else origin.elapsed_time(start))
            for key, start, end in spans
        ]
        for _, start, end in spans:
            self._spare_events += [start, end]
        return read

    def origin(self) -> tuple[Any, float]:
        """A mark that the device has reached, and when that was by `time.perf_counter`."""
        mark = self.mark()
        if self.on_cuda:
            mark.synchronize()
        return mark, time.perf_counter()

    def cost_ms(self) -> float:
        """What marking and reading one span costs on the host, in milliseconds, measured now."""
        repeats, probe = 2000, SpanClock("cuda" if self.on_cuda else "cpu")
        began = time.perf_counter()
        for _ in range(repeats):
            with probe.span("probe"):
                pass
        probe.read()
        return (time.perf_counter() - began) * 1e3 / repeats


@dataclass(frozen=True)
class Times:
    """Durations of one thing, in milliseconds: median, first and third quartile, and how many there are."""

    median: float
    q1: float
    q3: float
    repeats: int


@dataclass(frozen=True)
class TurnTimes(Times):
    """As Times, and the median of each turn."""

    turn_medians: list[float]


class Timer:
    """Times one call, in turns between which other calls can have theirs.

    Clocks and temperature drift, so calls that are compared take turns: each then meets every state of the machine.
    The first call of a turn of several is not counted, since what ran before it left the device idle, or busy.

    Args:
        call: takes a clock and one of the inputs, does its work once and marks its spans on the clock.
        inputs: given one after the other. Together they should exceed the device's second-level cache.
        device_type: as SpanClock takes it.
        seconds: for all turns together, with at least MIN_REPEATS and at most MAX_REPEATS calls.
    """

    def __init__(
        self, call: Callable[[SpanClock, Any], None], inputs: Sequence[Any], device_type: str, seconds: float
    ) -> None:
        self._call, self._inputs, self._seconds = call, inputs, seconds
        self._clock = SpanClock(device_type)
        self._calls = 0
        self._repeats = self._per_turn = 0
        self._turns: dict[Any, list[list[float]]] = {}

    def _run(self, calls: int) -> list[tuple[Any, float, float]]:
        for _ in range(calls):
            self._call(self._clock, self._inputs[self._calls % len(self._inputs)])
            self._calls += 1
        return self._clock.read()

    def warm_up(self) -> float:
        """Call once, then for a tenth of the time, so that clocks are up: the seconds of the first, which compiles."""
        began = time.perf_counter()
        self._run(1)
        first_s = time.perf_counter() - began
        began, spent, calls = time.perf_counter(), 0.0, 0
        while calls == 0 or (spent < self._seconds / 10 and calls < MAX_REPEATS):
            more = max(1, calls)
            self._run(more)
            spent, calls = time.perf_counter() - began, calls + more
        self._repeats = max(MIN_REPEATS, min(MAX_REPEATS, int(self._seconds * calls / max(spent, 1e-9))))
        self._per_turn = math.ceil(self._repeats / TURNS)
        return first_s

    def turn(self) -> None:
        """Take one of TURNS turns; nothing once there are enough calls."""
        if self._repeats <= 0:
            return
        self._repeats -= self._per_turn
        uncounted = int(self._per_turn > 1)
        spans: dict[Any, list[float]] = {}
        for key, duration, _ in self._run(uncounted + self._per_turn):
            spans.setdefault(key, []).append(duration)
        for key, durations in spans.items():
            self._turns.setdefault(key, []).append(durations[uncounted:])

    def times(self, key: Hashable) -> TurnTimes:
        """The spans of a key."""
        turns = self._turns[key]
        times = [duration for turn in turns for duration in turn]
        q1, median, q3 = quartiles(times)
        turn_medians = [statistics.median(turn) for turn in turns]
        return TurnTimes(median, q1, q3, len(times), turn_medians)


def quartiles(times: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median and third quartile of one value or more."""
    if len(times) == 1:
        return times[0], times[0], times[0]
    q1, median, q3 = statistics.quantiles(times, n=4, method="inclusive")
    return q1, median, q3


@dataclass(frozen=True)
class PlacedSpan:
    """A span of a step, in milliseconds, with where it began since the first step did. key: as the recorder's clock has
    it."""

    step: int
    key: Any
    start_ms: float
    ms: float


@dataclass
class DenseTimes:
    """Times of a step whose forward passes ran with dense attention too, in milliseconds.

    Args:
        own_ms: its own passes. dense_ms, dense_attention_ms: those with dense attention, and the attention in them.
        extra_ms: all that was run for this measurement alone: these, and a first one that is not counted.
    """

    own_ms: float = 0.0
    dense_ms: float = 0.0
    dense_attention_ms: float = 0.0
    extra_ms: float = 0.0


@dataclass
class StepTimes:
    """Where one denoising step's time went, in milliseconds. `attention_ms` lists the forward passes in order,
    `parts_ms` has what `part` timed of all of them; what was run with dense attention beside them is in `dense` only,
    and what torch.compile took in `compile_ms`.
    `communication_ms`: what was exchanged with other processes, and waiting for them; None where there are none.
    `blocks_ran`: the passes of each block that a cache did not skip.
    """

    index: int
    timestep: float
    latency_ms: float | None = None
    attention_ms: list[float] = field(default_factory=list)
    layers_ms: list[float] = field(default_factory=list)
    parts_ms: dict[str, float] = field(default_factory=dict)
    num_spans: int = 0
    dense: DenseTimes | None = None
    compile_ms: float = 0.0
    communication_ms: float | None = None
    blocks_ran: list[int] | None = None

    @property
    def attention_share(self) -> float | None:
        """Fraction of the step spent in self-attention, None where it was not timed."""
        if not self.latency_ms or not self.attention_ms:
            return None
        return sum(self.attention_ms) / self.latency_ms


class StepRecorder:
    """Collects the attention spans of each denoising step.

    The transformer's forward passes call `begin_pass`, the attention processors wrap their work in `attention`, and the
    sampling loop calls `begin_step` and `end_step`. With timing "off" none of them costs anything.

    Args:
        keep: all spans, with where they began, for a trace.
        num_layers: that the report lists, also where one is skipped; otherwise up to the last one that ran.
    """

    def __init__(self, device_type: str, level: Timing, keep: bool = False, num_layers: int = 0) -> None:
        self.level = level
        self.clock = SpanClock(device_type)
        self.steps: list[StepTimes] = []
        self.spans: list[PlacedSpan] = []
        self.cache_ratios: list[float] | None = None  # that a cache has measured, by step
        self.origin_s = 0.0  # when the first step began, by `time.perf_counter`
        self._keep = keep
        self._origin: Any = None
        self._pass = -1
        self._dense: bool | None = None  # within a dense pass: whether it counts
        self._compile_ms = 0.0
        self.num_layers = num_layers
        self._start: Any = None

    @property
    def enabled(self) -> bool:
        return self.level != "off"

    def begin_step(self) -> None:
        """Start a step's clock. The first step starts here; every other where the one before it ended."""
        self._pass = -1
        if self._keep and self.enabled and self._origin is None:
            self._origin, self.origin_s = self.clock.origin()
        if self.enabled:
            self._start = self.clock.mark()

    def begin_pass(self) -> None:
        """A forward pass of the transformer begins: conditional first, unconditional second."""
        self._pass += 1

    @contextmanager
    def attention(self, layer: int) -> Iterator[None]:
        """Time one layer's self-attention."""
        if not self.enabled or self._dense is False:
            yield
            return
        own = self._pass, layer
        token = _timed.set((self.clock, own) if self.level == "part" and not self._dense else None)
        try:
            with self.clock.span(("dense", "attention") if self._dense else own):
                yield
        finally:
            _timed.reset(token)

    @contextmanager
    def dense_pass(self, counted: bool = True) -> Iterator[None]:
        """Time a forward pass with dense attention that is run beside the step's own."""
        self._dense = counted
        try:
            with self.clock.span(("dense", "pass" if counted else "extra")):
                yield
        finally:
            self._dense = None

    def compiled(self, ms: float) -> None:
        """So many milliseconds of this step were spent in torch.compile."""
        self._compile_ms += ms

    def end_step(self, timestep: float) -> StepTimes:
        """Close the step, read its spans, and begin the next one."""
        step = StepTimes(len(self.steps), timestep, compile_ms=self._compile_ms)
        self._compile_ms = 0.0
        if self.enabled:  # blocks that were skipped took none
            step.attention_ms = [0.0] * (self._pass + 1)
            step.layers_ms = [0.0] * (self.num_layers if self.level in ("layer", "part") else 0)
        if self.enabled:
            self.clock.add("step", self._start, self.clock.mark())
            for key, duration, start_ms in self.clock.read(self._origin):
                if self._keep:
                    self.spans.append(PlacedSpan(step.index, key, start_ms, duration))
                if isinstance(key, str) or key[0] == "dense":
                    _add(step, key, duration)
                    continue
                step.num_spans += 1
                if len(key) == 3:
                    step.parts_ms[key[2]] = step.parts_ms.get(key[2], 0.0) + duration
                    continue
                number, layer = key
                step.attention_ms += [0.0] * (number + 1 - len(step.attention_ms))
                step.attention_ms[number] += duration
                if self.level in ("layer", "part"):
                    step.layers_ms += [0.0] * (layer + 1 - len(step.layers_ms))
                    step.layers_ms[layer] += duration
        if step.dense is not None and step.latency_ms is not None:
            step.latency_ms -= step.dense.extra_ms
        if step.latency_ms is not None:  # on CUDA a little ran meanwhile
            step.latency_ms = max(0.0, step.latency_ms - step.compile_ms)
        self.steps.append(step)
        self.begin_step()
        return step


def part(name: str) -> AbstractContextManager[None]:
    """Time a block as a part of the attention that runs, of all layers together, where a recorder asks for parts.

    Only inside operators that compiled code does not look into.
    """
    timed = _timed.get()
    return _NOT_TIMED if timed is None else timed[0].span((*timed[1], name))


def communicating(recorder: StepRecorder | None) -> AbstractContextManager[None]:
    """Time a block that exchanges tensors with other processes, where a recorder is given."""
    return _NOT_TIMED if recorder is None or not recorder.enabled else recorder.clock.span(COMMUNICATION)


def _add(step: StepTimes, key: Any, duration: float) -> None:
    """Note a span that is not one of the step's own attention."""
    if key == "step":
        step.latency_ms = duration
        return
    if key == COMMUNICATION:
        step.communication_ms = (step.communication_ms or 0.0) + duration
        return
    dense = step.dense = step.dense or DenseTimes()
    if key == "pass":
        dense.own_ms += duration
    elif key == ("dense", "attention"):
        dense.dense_attention_ms += duration
    else:
        dense.extra_ms += duration
        dense.dense_ms += duration if key == ("dense", "pass") else 0.0
