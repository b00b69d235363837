"""bench(BenchConfig) -> BenchResult: SLA against dense attention, and against other sparse attention, on this machine.

Every method is first held against the float64 reference on a short sequence; what is wrong there is not timed. Times
are medians over repeats on rotating inputs that together exceed the second-level cache, after an exact-shape warm-up
that holds the compilation. All methods of one length take turns, so that their ratios come from one state of the
machine. The forward pass is timed as inference runs it; a backward pass has a forward pass of its own, which saves what
it needs. SLA's time counts everything: block map, state, both branches, projection.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from slagen import machine, packages
from slagen.attention.sla.backends import check_kernels, pick_backend
from slagen.attention.sla.config import SLAConfig
from slagen.attention.sla.functional import choose_backend
from slagen.benchmark.config import BenchConfig, parse_shape
from slagen.benchmark.methods import Attend, Method, NotHere, Setting, all_methods, build_module
from slagen.benchmark.tables import EVEN, FASTER, BenchResult, beside, markdown
from slagen.errors import EnvironmentProblem, SlagenError, UsageError
from slagen.generation import report
from slagen.io.files import check_writable, reserved, write_json, write_text
from slagen.io.paths import user_path
from slagen.io.stages import staging
from slagen.io.text import counted, quote
from slagen.timing import TURNS, SpanClock, StepRecorder, Timer, quartiles
from slagen.wan.defaults import ModelDefaults

SPARSITIES = (0.8, 0.9, 0.95, 0.97)
JSON_FILE = "bench.json"
SHORT_LENGTH, SHORT_HEADS = 333, 2  # of the check against the reference


# Kernel level


def bench(config: BenchConfig, on_note: Callable[[str], None] = lambda text: None) -> BenchResult:
    """Measure what the configuration asks for.

    Args:
        on_note: called with one line for each thing that begins or is left out.
    Returns: the rows, and the files written.
    Raises: UsageError for an unknown method, EnvironmentProblem for a device that is not there or a named method that
        does not run here, ImportError where a model is asked for and a package it takes is not here.
    """
    device = machine.pick_device(config.device)
    dtype = machine.pick_dtype(config.dtype, device)
    known = {method.name: method for method in all_methods()}
    for name in config.methods:
        if name not in known:
            raise UsageError(f"method is {quote(name)}, but must be one of {', '.join(known)}.")
    methods = [known[name] for name in config.methods] or [method for method in known.values() if method.unasked]
    _check_present(config, methods)
    folder = user_path(config.output or "")
    if config.output is None:
        return _rows(config, device, dtype, methods, on_note)
    with reserved(folder / JSON_FILE):
        check_writable(folder)  # before the measurement
        result = _rows(config, device, dtype, methods, on_note)
        result.files = _write(folder, result.content, on_note)
    return result


def _rows(
    config: BenchConfig, device: torch.device, dtype: torch.dtype, methods: list[Method],
    on_note: Callable[[str], None],
) -> BenchResult:  # fmt: skip
    if config.model or config.random_init:
        importlib.import_module("slagen.wan.loading")  # what is not installed is told before the measurement
    for head_dim in {parse_shape(shape)[3] for shape in config.shapes}:
        backend = pick_backend(config.backend, head_dim, device, dtype)
        if any(_has_kernels(method) for method in methods) and not (config.model or config.random_init):
            check_kernels(backend, head_dim, device, dtype, config.sla(SPARSITIES[0]))
    content: dict[str, Any] = {
        "machine": {
            **machine.describe_device(device), "versions": report.versions(), **_ceilings(device, dtype),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        },
        "rows": [],
        "models": [],
        "break_even_tokens": {},
    }  # fmt: skip
    if config.model or config.random_init:
        content["models"] = _models(config, device, dtype, on_note)
    else:
        for shape in config.shapes:
            _bench_shape(config, shape, methods, device, dtype, content, on_note)
    return BenchResult(content)


def _check_present(config: BenchConfig, methods: list[Method]) -> None:
    """Raise EnvironmentProblem where a method that was named is not installed; of others the result says it."""
    names = [method.name for method in methods if method.absent]
    if names and config.methods:
        raise _not_here(names[0], "is not installed")


def _not_here(name: str, reason: str) -> EnvironmentProblem:
    return EnvironmentProblem(f"{name} does not run here: {reason.removesuffix('.')}. Leave it out of --method.")


@dataclass
class Entry:
    """A row on its way: the method it is about, and the timers of its passes once they are warm."""

    row: dict[str, Any]
    method: Method
    setting: Setting
    sizes: tuple[int, int, int, int]
    timers: dict[str, Timer] = field(default_factory=dict)


def _bench_shape(
    config: BenchConfig, shape: str, methods: list[Method], device: torch.device, dtype: torch.dtype,
    content: dict[str, Any], on_note: Callable[[str], None],
) -> None:  # fmt: skip
    """All rows of one shape: the sparsities at full length, then the lengths at one sparsity."""
    batch, num_heads, length, head_dim = parse_shape(shape)
    sparsities = config.sparsities or SPARSITIES
    lengths = config.lengths
    if lengths is None:
        lengths = tuple(2**n for n in range(10, 20) if 2**n < length)
    swept = 0.95 if 0.95 in sparsities else sparsities[0]
    sparsities, groups = _merge(config, shape, sparsities, swept)
    content.setdefault("same_top_k", []).extend(groups)
    plans = [(length, sparsity) for sparsity in sparsities] + [(other, swept) for other in lengths if other != length]
    entries: dict[tuple[Any, ...], Entry] = {}
    compared = []
    for tokens, sparsity in plans:
        keys = [(method.name, tokens, sparsity if method.takes_sparsity else None) for method in methods]
        for key, method in zip(keys, methods, strict=True):
            if key not in entries:  # dense rows do not depend on the sparsity
                sizes = (batch, num_heads, tokens, head_dim)
                entries[key] = _entry(config, method, sizes, sparsity, device, dtype)
        compared.append([entries[key].row for key in keys])
    content["rows"] += [entry.row for entry in entries.values()]
    for tokens in dict.fromkeys(tokens for tokens, _ in plans):
        _measure(config, [entry for entry in entries.values() if entry.sizes[2] == tokens], on_note)
    for rows in compared:
        _compare(rows)
    own = [entry.row for entry in entries.values()]
    if any(row["method"] == "sla" and row["speedup"] is not None for row in own):
        content["break_even_tokens"][shape] = _break_even(own, swept)
        content.setdefault("even_tokens", {})[shape] = _even(own, swept)


def _merge(
    config: BenchConfig, shape: str, sparsities: tuple[float, ...], swept: float
) -> tuple[tuple[float, ...], list[dict[str, Any]]]:
    """Those that keep different numbers of key blocks, and what stands for what; where `swept` can, it stands."""
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
            groups.append({"shape": shape, "sparsity": first, "also": also, "kept": kept, "blocks": blocks})
    return tuple(shown), groups


def _entry(
    config: BenchConfig, method: Method, sizes: tuple[int, int, int, int], sparsity: float, device: torch.device,
    dtype: torch.dtype,
) -> Entry:  # fmt: skip
    """A row without results, and the setting it will be measured in."""
    head_dim = sizes[3]
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(head_dim, head_dim, generator=generator).mul_(head_dim**-0.5).to(device)
    bias = torch.randn(head_dim, generator=generator).to(device)
    own = dict(config.attention_options)
    setting = Setting(config.sla(sparsity), weight, bias, config.backend, device, dtype, sizes[1], own)
    row: dict[str, Any] = {
        "method": method.name, "kind": method.kind, "backend": _backend_name(method, setting, head_dim),
        "shape": "x".join(map(str, sizes)), "dtype": str(dtype).removeprefix("torch."),
        "sparsity": sparsity if method.takes_sparsity else None, "correct": None, "error": None, "reason": None,
        "compile_s": None, "forward_ms": None, "training_forward_ms": None, "backward_ms": None, "parts_ms": None,
        "tflops_dense_equivalent": None, "speedup": None, "against_dense": None, "speedup_forward_backward": None,
    }  # fmt: skip
    return Entry(row, method, setting, sizes)


def _measure(config: BenchConfig, entries: list[Entry], on_note: Callable[[str], None]) -> None:
    """Check every method at one length and warm it up, then let all of them take turns, and fill in their rows."""
    setting = entries[0].setting
    backward = config.backward if config.backward is not None else setting.device.type == "cuda"
    if any(entry.method.name == "flex" for entry in entries):
        torch.compiler.reset()  # lengths must not add up to the limit of recompilations
    inputs = _inputs(entries[0].sizes, setting.device, setting.dtype)
    for entry in entries:
        with _reasons(entry):
            _prepare(entry, inputs, config.seconds, backward, on_note)
        if entry.row["reason"] and not entry.timers and entry.method.name in config.methods:
            raise _not_here(entry.method.name, entry.row["reason"])
    for _ in range(TURNS):
        for entry in entries:
            for name in list(entry.timers):
                with _reasons(entry, name):
                    entry.timers[name].turn()
    for entry in entries:
        _fill_in(entry)
        if entry.method.record is not None and entry.method.record.parts is not None and entry.row["forward_ms"]:
            entry.row["parts_ms"] = _parts(entry, inputs, config.seconds)


def _prepare(
    entry: Entry, inputs: list[tuple[Tensor, ...]], seconds: float, backward: bool, on_note: Callable[[str], None]
) -> None:
    """Make a method, check it, and warm up its passes."""
    row, setting = entry.row, entry.setting
    attend = entry.method.make(setting)
    label = "" if row["sparsity"] is None else f", sparsity {row['sparsity']:g}"
    on_note(f"{entry.method.name}, {counted(entry.sizes[2], 'token')}{label}")
    error = _error(entry.method, setting, attend, entry.sizes[3])
    limit = entry.method.error_limit or 32 * torch.finfo(setting.dtype).eps
    row["correct"] = error <= limit
    if not math.isfinite(error):
        row["reason"] = "wrong: it gives values that are not finite"
        return
    row["error"] = error
    if not row["correct"]:
        row["reason"] = f"wrong: its error to the reference is {error:.2g}, the limit {limit:.2g}"
        return
    timer = _forward_timer(attend, inputs, setting.device, seconds)
    row["compile_s"] = timer.warm_up()
    entry.timers["forward"] = timer
    if backward and entry.method.backward:
        with _reasons(entry, "backward"):
            entry.timers["backward"] = Timer(_both_passes(attend), inputs, setting.device.type, seconds)
            entry.timers["backward"].warm_up()


@contextlib.contextmanager
def _reasons(entry: Entry, timer: str | None = None) -> Iterator[None]:
    """What keeps a method, or one of its passes, from running becomes its row's reason, and its timer goes."""
    try:
        yield
        return
    except NotHere as error:
        reason = str(error)
    except torch.OutOfMemoryError:
        reason = "does not fit into this device's memory"
    except SlagenError:
        raise
    except Exception as error:  # another library's failure is a result here, and is shown
        if entry.method.record is not None:
            raise
        lines = str(error).strip().splitlines() or [""]
        reason = f"not supported here ({type(error).__name__}: {lines[0][:120]})"
    if timer is not None:
        entry.timers.pop(timer, None)
    entry.row["reason"] = f"its backward pass: {reason}" if timer == "backward" else reason


def _fill_in(entry: Entry) -> None:
    """Move the times of a method that has run into its row."""
    row = entry.row
    if "forward" in entry.timers:
        batch, num_heads, length, head_dim = entry.sizes
        row["forward_ms"] = entry.timers["forward"].times("forward")
        row["tflops_dense_equivalent"] = (
            4 * batch * num_heads * length**2 * head_dim / row["forward_ms"]["median"] / 1e9
        )
    if "backward" in entry.timers:
        row["training_forward_ms"] = entry.timers["backward"].times("forward")
        row["backward_ms"] = entry.timers["backward"].times("backward")
    entry.timers.clear()


def _backend_name(method: Method, setting: Setting, head_dim: int) -> str:
    record = method.record
    if record is None or setting.backend not in [backend.name for backend in record.backends]:
        return method.name
    return record.pick_backend(setting.backend, head_dim, setting.device, setting.dtype)


def _has_kernels(method: Method) -> bool:
    return method.record is not None and method.record.config is SLAConfig


def _inputs(sizes: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> list[tuple[Tensor, ...]]:
    """Sets of q, k, v and do: as many as it takes for their q, k and v to exceed twice the second-level cache."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    return _draw(max(1, math.ceil(2 * cache / (3 * math.prod(sizes) * dtype.itemsize))), sizes, device, dtype)


def _draw(count: int, sizes: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> list[tuple[Tensor, ...]]:
    generator = torch.Generator(device).manual_seed(0)
    drawn = torch.randn(count, 4, *sizes, generator=generator, device=device, dtype=dtype)
    return [one.unbind() for one in drawn.unbind()]


def _error(method: Method, setting: Setting, attend: Attend, head_dim: int) -> float:
    """The largest error to the float64 reference on a short sequence, in units of the largest output."""
    sizes = (1, SHORT_HEADS, SHORT_LENGTH, head_dim)
    q, k, v, _ = _draw(1, sizes, setting.device, setting.dtype)[0]
    if method.record is not None:  # what a module learned for each head is of so many heads
        setting = dataclasses.replace(setting, num_heads=SHORT_HEADS)
        attend = method.make(setting)
    with torch.inference_mode():
        actual = attend(q, k, v).double()
        wide = q.double(), k.double(), v.double()
        exact = method.exact(setting, *wide)
        return ((actual - exact).abs().max() / exact.abs().max()).item()


def _forward_timer(attend: Attend, inputs: list[tuple[Tensor, ...]], device: torch.device, seconds: float) -> Timer:
    """Times the forward pass under the key "forward", as inference runs it."""

    def call(clock: SpanClock, tensors: tuple[Tensor, ...]) -> None:
        with torch.inference_mode(), clock.span("forward"):
            attend(*tensors[:3])

    return Timer(call, inputs, device.type, seconds)


def _both_passes(attend: Attend) -> Callable[[SpanClock, Any], None]:
    """Times a forward pass that saves what the backward pass needs, and that: "forward" and "backward"."""

    def call(clock: SpanClock, tensors: tuple[Tensor, ...]) -> None:
        leaves = [x.detach().requires_grad_() for x in tensors[:3]]
        with clock.span("forward"):
            o = attend(*leaves)
        with clock.span("backward"):
            torch.autograd.grad(o, leaves, tensors[3])

    return call


def _alone(attend: Attend, inputs: list[tuple[Tensor, ...]], device: torch.device, seconds: float) -> float:
    """The median of a forward pass that is compared with nothing, in milliseconds."""
    timer = _forward_timer(attend, inputs, device, seconds)
    timer.warm_up()
    for _ in range(TURNS):
        timer.turn()
    return timer.times("forward")["median"]


def _parts(entry: Entry, inputs: list[tuple[Tensor, ...]], seconds: float) -> dict[str, float]:
    """Where a method's forward time goes, each part timed alone, so that they need not add up to the whole: a part
    finds its inputs where the part before it left them long ago."""
    record = entry.method.record
    assert record is not None and record.parts is not None
    with torch.inference_mode():
        module, _ = build_module(record, entry.setting, entry.sizes[2])
        made = record.parts(module, *inputs[0][:3])
    return {name: _alone(part, inputs, entry.setting.device, seconds / 4) for name, part in made.items()}


def _compare(rows: list[dict[str, Any]]) -> None:
    """Set each row's speed-up over the fastest dense method of the same shape, and whether it is more than noise."""
    dense = [row for row in rows if row["kind"] == "dense" and row["forward_ms"]]
    if not dense:
        return
    forward = min((row["forward_ms"] for row in dense), key=lambda times: times["median"])
    both = min((_both(row) for row in dense if row["backward_ms"]), default=None)
    for row in rows:
        if row["forward_ms"]:
            row["speedup"] = forward["median"] / row["forward_ms"]["median"]
            row["against_dense"] = beside(row["forward_ms"], forward)
            if both is not None and row["backward_ms"]:
                row["speedup_forward_backward"] = both / _both(row)


def _both(row: dict[str, Any]) -> float:
    return row["training_forward_ms"]["median"] + row["backward_ms"]["median"]


def _verdicts(rows: list[dict[str, Any]], sparsity: float) -> list[tuple[int, str]]:
    """Lengths at which SLA was measured, the longest first, and what it is there beside dense attention."""
    found = {
        int(row["shape"].split("x")[2]): row["against_dense"]
        for row in rows
        if row["method"] == "sla" and row["sparsity"] == sparsity and row["speedup"] is not None
    }
    return sorted(found.items(), reverse=True)


def _break_even(rows: list[dict[str, Any]], sparsity: float) -> int | None:
    """The shortest length measured from which on SLA is always faster than the fastest dense method, by more than the
    noise; None if never."""
    faster = itertools.takewhile(lambda found: found[1] == FASTER, _verdicts(rows, sparsity))
    return min((length for length, _ in faster), default=None)


def _even(rows: list[dict[str, Any]], sparsity: float) -> int | None:
    """The longest length measured, where SLA differs from the fastest dense method by no more than noise there."""
    verdicts = _verdicts(rows, sparsity)
    return verdicts[0][0] if verdicts and verdicts[0][1] == EVEN else None


def _ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """What this machine reaches at best: a matrix product in TFLOP/s, a copy in GB/s (read and written)."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    product = _alone(lambda q, k, v: q @ k, [(a, b, a)], device, 1.0)
    source = torch.randn(2**28 if device.type == "cuda" else 2**26, device=device)
    target = torch.empty_like(source)
    copy = _alone(lambda q, k, v: q.copy_(k), [(target, source, source)], device, 1.0)
    return {"matmul_tflops": 2 * n**3 / product / 1e9, "copy_gb_s": 2 * source.nbytes / copy / 1e6}


# Model level


def _models(
    config: BenchConfig, device: torch.device, dtype: torch.dtype, on_note: Callable[[str], None]
) -> list[dict[str, Any]]:
    """The denoising loop, dense with each dense backend of PyTorch and with SLA at each sparsity, as config says."""
    from slagen.wan.loading import load_pipeline, random_pipeline
    from slagen.wan.models import resolve_model
    from slagen.wan.processor import install, remove

    name: str
    if config.random_init is not None:
        on_note(f"making a random {config.random_init}")
        name, defaults = config.random_init, ModelDefaults()
        pipe = random_pipeline(name, device, dtype)
    else:
        source = resolve_model(config.model, device.type, on_note=on_note)
        on_note(f"loading {source.name}")
        pipe, name, defaults = load_pipeline(source, device, dtype), source.name, source.defaults
    heads = pipe.transformer.config
    probe = torch.empty(1, 1, 1, heads.attention_head_dim, dtype=dtype, device=device)
    dense = [None] if device.type != "cuda" else [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION]
    loops = (False, True) if config.compile else (False,)
    rows = []
    for backend in dense:
        label = "sdpa" if backend is None else f"sdpa-{backend.name.removesuffix('_ATTENTION').lower()}"
        for compiled in loops:
            on_note(f"{name}, dense attention, {label}" + ", compiled" * compiled)
            install(pipe.transformer, None)
            try:
                with contextlib.nullcontext() if backend is None else sdpa_kernel([backend, SDPBackend.MATH]):
                    times = _loop(pipe, config, defaults, compiled)
            finally:
                remove(pipe.transformer)
            rows.append({"attention": "dense", "backend": label, "sparsity": None, **times})
    for sparsity in config.sparsities or (0.95,):
        label = choose_backend(probe, config.backend)
        for compiled in loops:
            on_note(f"{name}, SLA, sparsity {sparsity:g}" + ", compiled" * compiled)
            install(pipe.transformer, config.sla(sparsity), backend=config.backend)
            try:
                times = _loop(pipe, config, defaults, compiled)
            finally:
                remove(pipe.transformer)
            rows.append({"attention": "sla", "backend": label, "sparsity": sparsity, **times})
    fastest = min((row["step_ms"] for row in rows if row["attention"] == "dense"), key=lambda times: times["median"])
    return [
        {"model": name, **row, "speedup": fastest["median"] / row["step_ms"]["median"],
         "against_dense": beside(row["step_ms"], fastest)}
        for row in rows
    ]  # fmt: skip


@contextlib.contextmanager
def _compiled_blocks(transformer: Any) -> Iterator[None]:
    """Compile every block for the length of the `with` block."""
    torch._dynamo.reset()  # one attention after the other in the same blocks must not add up to the limit of recompiles
    transformer.compile_repeated_blocks(dynamic=False)
    try:
        yield
    finally:
        for block in transformer.blocks:
            block._compiled_call_impl = None


def _loop(pipe: Any, config: BenchConfig, defaults: ModelDefaults, compiled: bool) -> dict[str, Any]:
    """Run the denoising loop, first one step to warm up, and split its steps; a compiled block can not be split."""
    from slagen.wan.processor import attach_recorder

    transformer = pipe.transformer
    device = next(transformer.parameters()).device
    generator = torch.Generator().manual_seed(0)
    shape = (1, defaults.max_sequence_length, transformer.config.text_dim)
    text = [torch.randn(shape, generator=generator).to(device, transformer.dtype) for _ in range(2)]
    recorder = StepRecorder(device.type, "layer")
    width, height = config.width or defaults.width, config.height or defaults.height
    num_frames = config.num_frames or defaults.num_frames

    def run(steps: int) -> None:
        def after_step(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            recorder.end_step(float(timestep))
            return {}

        recorder.begin_step()
        pipe(
            prompt_embeds=text[0], negative_prompt_embeds=text[1], width=width, height=height, num_frames=num_frames,
            num_inference_steps=steps, guidance_scale=defaults.guidance_scale, output_type="latent",
            generator=torch.Generator().manual_seed(0), callback_on_step_end=after_step,
            max_sequence_length=defaults.max_sequence_length,
        )  # fmt: skip

    with torch.inference_mode(), contextlib.ExitStack() as stack:
        if compiled:
            stack.enter_context(_compiled_blocks(transformer))
        else:
            stack.callback(attach_recorder(transformer, recorder))
        run(1)
        recorder.steps.clear()
        run(config.steps)
    latency = [step.latency_ms or 0.0 for step in recorder.steps]
    attention = [sum(step.attention_ms) for step in recorder.steps]
    return {
        "size": f"{width}x{height}", "num_frames": num_frames, "steps": config.steps, "compiled": compiled,
        "step_ms": _spread(latency), "attention_ms": None if compiled else _spread(attention),
        "attention_share": None if compiled else sum(attention) / sum(latency),
        "peak_memory_gib": machine.peak_memory_gib(device),
    }  # fmt: skip


def _spread(times: list[float]) -> dict[str, Any]:
    q1, median, q3 = quartiles(times)
    return {"median": median, "q1": q1, "q3": q3, "repeats": len(times)}


# Files


def _write(folder: Path, content: dict[str, Any], on_note: Callable[[str], None]) -> list[Path]:
    """bench.json, bench.md, and where shapes were timed bench.png and bench.svg: all of them, or none."""
    with staging(folder) as stage:
        files = [stage.folder / JSON_FILE, stage.folder / "bench.md"]
        write_json(files[0], content)
        write_text(files[1], markdown(BenchResult(content)))
        if any(row["forward_ms"] for row in content["rows"]):
            from slagen.plot import draw_bench

            try:
                files += draw_bench(content, stage.folder)
            except ImportError as error:
                if (lack := packages.explain(error)) is None:
                    raise
                on_note(f"there is no plot: {lack}")
        stage.publish()
    return [folder / file.name for file in files]
