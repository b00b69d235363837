"""bench(BenchConfig) -> BenchResult: SLA against dense attention, and against other sparse attention, on this machine.

Every method is first validated against the float64 reference on a short sequence; a wrong one is not timed. Times
are medians over repeats on rotating inputs that together exceed the second-level cache, after an exact-shape warm-up
that holds the compilation. All methods of one length take turns, so that their ratios come from one state of the
machine. The forward pass is timed as inference runs it; a backward pass has a forward pass of its own, which saves what
it needs. SLA's time counts everything: block map, state, both branches, projection.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch

from slagen import machine, packages
from slagen.attention.sla.backends import check_kernels, pick_backend
from slagen.attention.sla.config import SLAConfig
from slagen.benchmark.clock import measure_ceilings
from slagen.benchmark.config import BenchConfig, parse_shape
from slagen.benchmark.loop import bench_model
from slagen.benchmark.methods import Contender, unavailable
from slagen.benchmark.operator import SPARSITIES, bench_shape
from slagen.benchmark.registry import all_methods
from slagen.benchmark.rows import BenchMachine
from slagen.benchmark.tables import BenchResult, markdown
from slagen.errors import UsageError
from slagen.events import Event
from slagen.interrupts import telling_what_is_kept
from slagen.io.files import check_writable, reserved, write_json, write_text
from slagen.io.paths import user_path
from slagen.io.stages import staging
from slagen.io.text import quote
from slagen.plot import Timed

JSON_FILE = "bench.json"


def bench(config: BenchConfig, on_event: Callable[[Event], None] = lambda event: None) -> BenchResult:
    """Measure what the configuration asks for.

    Args:
        on_event: called for each measurement that begins, its parts, and with notes on what is left out.
    Returns: the rows, and the files written.
    Raises: UsageError for an unknown method, EnvironmentProblem for a device that is not there or a named method that
        does not run here, ImportError where a model is asked for and a package it takes is not here.
    """
    device = machine.pick_device(config.device)
    dtype = machine.pick_dtype(config.dtype, device)
    known = {method.name: method for method in all_methods(config.delta)}
    for name in config.methods:
        if name not in known:
            raise UsageError(f"method is {quote(name)}, but must be one of {', '.join(known)}.")
    methods = [known[name] for name in config.methods] or [method for method in known.values() if method.by_default]
    _check_present(config, methods)
    kept = "Nothing was written. Run the same command again, for less time with fewer --methods or --no-length-sweep."
    if config.output is None:
        with telling_what_is_kept(lambda: kept):
            return _rows(config, device, dtype, methods, on_event)
    folder = user_path(config.output)
    with telling_what_is_kept(lambda: kept), reserved(folder / JSON_FILE):
        check_writable(folder)  # before the measurement
        result = _rows(config, device, dtype, methods, on_event)
        result.files = _write(folder, result, on_event)
    return result


def _rows(
    config: BenchConfig, device: torch.device, dtype: torch.dtype, methods: list[Contender],
    on_event: Callable[[Event], None],
) -> BenchResult:  # fmt: skip
    if config.model or config.random_init:
        importlib.import_module("slagen.wan.loading")  # a missing package is reported before the measurement
    for head_dim in {parse_shape(shape)[3] for shape in config.shapes}:
        backend = pick_backend(config.backend, head_dim, device, dtype)
        if any(_has_kernels(method) for method in methods) and not (config.model or config.random_init):
            check_kernels(backend, head_dim, device, dtype, config.sla(SPARSITIES[0]))
    about, versions = machine.describe_device(device), packages.versions()
    ceilings = measure_ceilings(device, dtype)
    result = BenchResult(BenchMachine(about, versions, *ceilings, datetime.now(UTC).isoformat(timespec="seconds")))
    if config.model or config.random_init:
        result.models = bench_model(config, device, dtype, on_event)
    else:
        for shape in config.shapes:
            bench_shape(config, shape, methods, device, dtype, result, on_event)
    return result


def _check_present(config: BenchConfig, methods: list[Contender]) -> None:
    """Raise EnvironmentProblem where a method that was named is not installed; of others the result says it."""
    names = [method.name for method in methods if method.absent]
    if names and config.methods:
        raise unavailable(names[0], "not installed")


def _has_kernels(method: Contender) -> bool:
    return method.record is not None and method.record.config is SLAConfig


def _write(folder: Path, result: BenchResult, on_event: Callable[[Event], None]) -> list[Path]:
    """bench.json, bench.md, and where shapes were timed bench.png and bench.svg: all of them, or none."""
    with staging(folder) as stage:
        files = [stage.folder / JSON_FILE, stage.folder / "bench.md"]
        write_json(files[0], result.to_dict())
        write_text(files[1], markdown(result))
        points = [
            Timed(row.method, row.tokens, row.sparsity, row.forward_ms.median, row.speedup)
            for row in result.rows
            if row.forward_ms
        ]
        if points:
            from slagen.plot import draw_bench

            title = f"{result.machine.device.name}, {result.rows[0].dtype}, {result.machine.date[:10]}"
            try:
                files += draw_bench(points, title, stage.folder)
            except ImportError as error:
                if (lack := packages.explain(error)) is None:
                    raise
                on_event(Event("note", f"no plot was drawn: {lack}"))
        stage.publish()
    return [folder / file.name for file in files]
