"""Check every attention method against the float64 reference, then time all of them in turns: a row for each."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from slagen.attention.protocol import Attend, Grid, Unavailable
from slagen.benchmark.clock import both_passes, draw, draw_inputs, forward_timer, median_ms
from slagen.benchmark.compare import break_even, even_tokens, with_speedups
from slagen.benchmark.config import BenchConfig, grid_of, parse_shape
from slagen.benchmark.methods import Contender, Setting, begin_pass, build_module, method_config, unavailable
from slagen.benchmark.rows import BenchRow, SameTopK
from slagen.benchmark.tables import BenchResult
from slagen.errors import SlagenError
from slagen.events import Event
from slagen.io.text import counted
from slagen.timing import TURNS, Timer

SPARSITIES = (0.8, 0.9, 0.95, 0.97)
SHORT_GRID, SHORT_HEADS = Grid(3, 3, 37), 2  # of the check against the reference


@dataclass
class Entry:
    """A row that is being measured: its method, and the timers of its passes once they are warm."""

    row: BenchRow
    method: Contender
    setting: Setting
    sizes: tuple[int, int, int, int]
    timers: dict[str, Timer] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The method with its sparsity."""
        sparsity = self.row.sparsity
        return self.method.name + ("" if sparsity is None else f", sparsity {sparsity:g}")

    def update_row(self, **found: Any) -> None:
        """Set fields of the row."""
        self.row = dataclasses.replace(self.row, **found)


def bench_shape(
    config: BenchConfig, shape: str, methods: list[Contender], device: torch.device, dtype: torch.dtype,
    result: BenchResult, on_event: Callable[[Event], None],
) -> None:  # fmt: skip
    """Add all rows of one shape to a result: the sparsities at full length, then the lengths at one sparsity."""
    batch, num_heads, length, head_dim = parse_shape(shape)
    sparsities = config.sparsities or SPARSITIES
    lengths = config.lengths
    if lengths is None:
        lengths = tuple(2**n for n in range(10, 20) if 2**n < length)
    swept = 0.95 if 0.95 in sparsities else sparsities[0]
    sparsities, groups = _distinct_sparsities(config, shape, sparsities, swept)
    if not any(method.takes_sparsity for method in methods):
        groups = []
    result.same_top_k = [*(result.same_top_k or []), *groups]
    plans = [(length, sparsity) for sparsity in sparsities] + [(other, swept) for other in lengths if other != length]
    entries: dict[tuple[Any, ...], Entry] = {}
    compared = []
    for tokens, sparsity in plans:
        keys = [(method.name, tokens, sparsity if method.takes_sparsity else None) for method in methods]
        for key, method in zip(keys, methods, strict=True):
            if key not in entries:  # dense rows do not depend on the sparsity
                sizes = (batch, num_heads, tokens, head_dim)
                entries[key] = _entry(config, method, sizes, grid_of(shape, tokens), sparsity, device, dtype)
        compared.append([entries[key] for key in keys])
    for tokens in dict.fromkeys(tokens for tokens, _ in plans):
        _measure(config, [entry for entry in entries.values() if entry.sizes[2] == tokens], on_event)
    for group in compared:
        for entry, row in zip(group, with_speedups([entry.row for entry in group]), strict=True):
            entry.row = row
    own = [entry.row for entry in entries.values()]
    result.rows += own
    if any(row.method == "sla" and row.speedup is not None for row in own):
        result.break_even_tokens[shape] = break_even(own, swept)
        result.even_tokens = {**(result.even_tokens or {}), shape: even_tokens(own, swept)}


def _distinct_sparsities(
    config: BenchConfig, shape: str, sparsities: tuple[float, ...], swept: float
) -> tuple[tuple[float, ...], list[SameTopK]]:
    """The sparsities that keep different numbers of key blocks, and groups of equals; `swept` stands for its own."""
    blocks = config.sla(swept).num_blocks(parse_shape(shape)[2])[1]
    alike: dict[tuple[int, int], list[float]] = {}
    for sparsity in dict.fromkeys(sparsities):
        sla = config.sla(sparsity)
        alike.setdefault((sla.num_critical(blocks), sla.num_negligible(blocks)), []).append(sparsity)
    shown, groups = [], []
    for (kept, _), same in alike.items():
        first = swept if swept in same else same[0]
        shown.append(first)
        also = [sparsity for sparsity in same if sparsity != first]
        if also:
            groups.append(SameTopK(shape, first, also, kept, blocks))
    return tuple(shown), groups


def _entry(
    config: BenchConfig, method: Contender, sizes: tuple[int, int, int, int], grid: Grid, sparsity: float,
    device: torch.device, dtype: torch.dtype,
) -> Entry:  # fmt: skip
    """A row without results, and the setting it will be measured in."""
    head_dim = sizes[3]
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(head_dim, head_dim, generator=generator).mul_(head_dim**-0.5).to(device)
    bias = torch.randn(head_dim, generator=generator).to(device)
    own = dict(config.attention_options)
    setting = Setting(config.sla(sparsity), weight, bias, config.backend, device, dtype, sizes[1], own, grid)
    row = BenchRow(
        method.name, method.kind, _backend_name(method, setting, head_dim), "x".join(map(str, sizes)),
        str(dtype).removeprefix("torch."), sparsity if method.takes_sparsity else None,
        delta=None if method.record is None else method.record.delta,
    )  # fmt: skip
    return Entry(row, method, setting, sizes)


def _measure(config: BenchConfig, entries: list[Entry], on_event: Callable[[Event], None]) -> None:
    """Check every method at one length and warm it up, then let all of them take turns, and fill in their rows."""
    setting = entries[0].setting
    backward = config.backward if config.backward is not None else setting.device.type == "cuda"
    if any(entry.method.name == "flex" for entry in entries):
        torch.compiler.reset()  # lengths must not add up to the limit of recompilations
    inputs = draw_inputs(entries[0].sizes, setting.device, setting.dtype)
    total = len(entries) * (1 + TURNS)
    at = counted(entries[0].sizes[2], "token")
    on_event(Event("stage", "time", num_steps=total, about=f"{len(entries)} settings at {at}"))

    def begin(entry: Entry, verb: str, done: int) -> None:
        on_event(Event("part", f"{verb} {entry.label} at {at}", num_steps=total, done=done))

    for number, entry in enumerate(entries):
        begin(entry, "checking", number)
        with _reasons(entry):
            _prepare(entry, inputs, config.seconds, backward, on_event)
        if entry.row.reason and not entry.timers and entry.method.name in config.methods:
            raise unavailable(entry.method.name, entry.row.reason)
    for turn in range(TURNS):
        for number, entry in enumerate(entries):
            begin(entry, "timing", (turn + 1) * len(entries) + number)
            for name in list(entry.timers):
                with _reasons(entry, name):
                    entry.timers[name].turn()
    for entry in entries:
        _fill_in(entry)
        if entry.method.record is not None and entry.method.record.parts is not None and entry.row.forward_ms:
            entry.update_row(parts_ms=_time_parts(entry, inputs, config.seconds))


def _prepare(
    entry: Entry, inputs: list[tuple[Tensor, ...]], seconds: float, backward: bool, on_event: Callable[[Event], None]
) -> None:
    """Build a method, validate it, and warm up its passes."""
    setting = entry.setting
    attend = entry.method.make(setting)
    sparsity = entry.label.removeprefix(entry.method.name)
    on_event(Event("job", f"{entry.method.name}, {counted(entry.sizes[2], 'token')}{sparsity}"))
    error = _error(entry.method, setting, attend, entry.sizes[3])
    limit = entry.method.limit(setting)
    if not math.isfinite(error):
        entry.update_row(correct=False, reason="wrong: it produced NaN or Inf")
        return
    if error > limit:
        reason = f"wrong: its error relative to the float64 reference is {error:.2g}, over the limit of {limit:.2g}"
        entry.update_row(correct=False, error=error, reason=reason)
        return
    entry.update_row(correct=True, error=error)
    timer = forward_timer(attend, inputs, setting.device, seconds)
    entry.update_row(compile_s=timer.warm_up())
    entry.timers["forward"] = timer
    if backward and entry.method.backward:
        with _reasons(entry, "backward"):
            entry.timers["backward"] = Timer(both_passes(attend), inputs, setting.device.type, seconds)
            entry.timers["backward"].warm_up()


@contextlib.contextmanager
def _reasons(entry: Entry, timer: str | None = None) -> Iterator[None]:
    """An error of a method, or of one of its passes, becomes its row's reason, and its timer is dropped."""
    try:
        yield
        return
    except Unavailable as error:
        reason = str(error)
    except torch.OutOfMemoryError:
        reason = "out of memory on this device"
    except SlagenError:
        raise
    except Exception as error:  # another library's failure is a result here, and is shown
        if entry.method.record is not None:
            raise
        lines = str(error).strip().splitlines() or [""]
        reason = f"not supported here ({type(error).__name__}: {lines[0][:120]})"
    if timer is not None:
        entry.timers.pop(timer, None)
    entry.update_row(reason=f"backward pass: {reason}" if timer == "backward" else reason)


def _fill_in(entry: Entry) -> None:
    """Move the times of a method that has run into its row."""
    if "forward" in entry.timers:
        batch, num_heads, length, head_dim = entry.sizes
        times = entry.timers["forward"].times("forward")
        flops = 4 * batch * num_heads * length**2 * head_dim
        entry.update_row(forward_ms=times, tflops_dense_equivalent=flops / times.median / 1e9)
    if "backward" in entry.timers:
        both = entry.timers["backward"]
        entry.update_row(training_forward_ms=both.times("forward"), backward_ms=both.times("backward"))
    entry.timers.clear()


def _backend_name(method: Contender, setting: Setting, head_dim: int) -> str:
    record = method.record
    if record is None or setting.backend not in [backend.name for backend in record.backends]:
        return method.name
    config = method_config(record, setting)
    return record.pick_backend(setting.backend, head_dim, setting.device, setting.dtype, config)


def _error(method: Contender, setting: Setting, attend: Attend, head_dim: int) -> float:
    """The largest error to the float64 reference on a short sequence, in units of the largest output."""
    sizes = (1, SHORT_HEADS, SHORT_GRID.num_tokens, head_dim)
    q, k, v, _ = draw(1, sizes, setting.device, setting.dtype)[0]
    if method.record is not None:  # what a module learned for each head is of so many heads
        setting = dataclasses.replace(setting, num_heads=SHORT_HEADS, grid=SHORT_GRID)
        attend = method.make(setting)
    with torch.inference_mode():
        actual = attend(q, k, v).double()
        wide = q.double(), k.double(), v.double()
        exact = method.exact(setting, *wide)
        return ((actual - exact).abs().max() / exact.abs().max()).item()


def _time_parts(entry: Entry, inputs: list[tuple[Tensor, ...]], seconds: float) -> dict[str, float]:
    """Where a method's forward time goes. Each part is timed alone with its inputs out of cache, so that the parts need
    not add up to the whole."""
    record = entry.method.record
    assert record is not None and record.parts is not None
    with torch.inference_mode():
        q, k, v = inputs[0][:3]
        module, call_inputs = build_module(record, entry.setting, q)
        begin_pass(module, call_inputs)
        made = record.parts(module, q, k, v, call_inputs)
    return {name: median_ms(part, inputs, entry.setting.device, seconds / 4) for name, part in made.items()}
