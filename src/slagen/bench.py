"""bench(BenchConfig) -> BenchResult: SLA against dense attention, and against other sparse attention, on this machine.

Every method is first held against the float64 reference on a short sequence; what is wrong there is not timed. Times
are medians over repeats on rotating inputs that together exceed the second-level cache, after an exact-shape warm-up
that holds the compilation. SLA's time counts everything: block map, state, both branches, projection.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from slagen import machine, report
from slagen.attention.block_map import block_scores, critical_indices
from slagen.attention.functional import choose_backend, sparse_linear_attention
from slagen.config import BenchConfig, ModelDefaults, parse_shape
from slagen.errors import EnvironmentProblem, SlagenError, UsageError
from slagen.methods import METHODS, Attend, Method, NotHere, Setting
from slagen.timing import SpanClock, StepRecorder

SPARSITIES = (0.8, 0.9, 0.95, 0.97)
SHORT_LENGTH, SHORT_HEADS = 333, 2  # of the check against the reference
MIN_REPEATS, MAX_REPEATS = 3, 100


@dataclass
class BenchResult:
    """What was measured. `content` is what --json prints; `files` were written."""

    content: dict[str, Any]
    files: list[Path] = field(default_factory=list)

    @property
    def tables(self) -> list[tuple[tuple[str, ...], list[list[str]]]]:
        """Column names and rows, as text: of attention calls, and of models."""
        return [
            (COLUMNS, [cells(row) for row in self.content["rows"] if row["forward_ms"] or row["correct"] is False]),
            (MODEL_COLUMNS, [model_cells(row) for row in self.content["models"]]),
        ]

    @property
    def verdicts(self) -> list[str]:
        """One line for each method that did not run, and for each shape: from what length on SLA pays."""
        missing = {row["method"]: row["reason"] for row in self.content["rows"] if row["correct"] is None}
        return [f"{method}: {reason}" for method, reason in missing.items()] + [
            f"{shape}: " + (f"SLA is not slower than dense attention from {tokens:,} tokens on" if tokens else NEVER)
            for shape, tokens in self.content["break_even_tokens"].items()
        ]


# Kernel level


def bench(config: BenchConfig, on_note: Callable[[str], None] = lambda text: None) -> BenchResult:
    """Measure what the configuration asks for.

    Args:
        on_note: called with one line for each thing that begins or is left out.
    Returns: the rows, and the files written.
    Raises: UsageError for an unknown method, EnvironmentProblem for a device that is not there or a named method that
        does not run here.
    """
    device = machine.pick_device(config.device)
    dtype = machine.pick_dtype(config.dtype, device)
    known = {method.name: method for method in METHODS}
    for name in config.methods:
        if name not in known:
            raise UsageError(f"method is {name!r}, but must be one of {', '.join(known)}.")
    folder = Path(config.output or "").expanduser()
    if config.output is not None:
        folder.mkdir(parents=True, exist_ok=True)  # what cannot be written is told before the measurement
    content: dict[str, Any] = {
        "machine": {
            **machine.describe_device(device), "versions": report.versions(), **_ceilings(device, dtype),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        },
        "rows": [],
        "models": [],
        "break_even_tokens": {},
    }  # fmt: skip
    try:
        choose_backend(torch.empty(1, 1, 1, 64, dtype=dtype, device=device), config.backend)
    except ValueError as error:
        raise EnvironmentProblem(str(error)) from error
    if config.model or config.random_init:
        content["models"] = _models(config, device, dtype, on_note)
    else:
        methods = [known[name] for name in config.methods] or list(METHODS)
        for shape in config.shapes:
            _bench_shape(config, shape, methods, device, dtype, content, on_note)
    result = BenchResult(content)
    if config.output is not None:
        result.files = _write(folder, content)
    return result


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
    plans = [(length, sparsity) for sparsity in sparsities] + [(other, swept) for other in lengths if other != length]
    done: dict[tuple[str, int], dict[str, Any]] = {}  # dense rows do not depend on the sparsity
    for tokens, sparsity in plans:
        rows = []
        for method in methods:
            row = done.get((method.name, tokens)) if method.kind == "dense" else None
            if row is None:
                on_note(f"{method.name}, {tokens} tokens" + (f", sparsity {sparsity:g}" * (method.kind != "dense")))
                sizes = (batch, num_heads, tokens, head_dim)
                row = _row(config, method, sizes, sparsity, device, dtype)
                if method.kind == "dense":
                    done[method.name, tokens] = row
                content["rows"].append(row)
            rows.append(row)
            if row["reason"] and method.name in config.methods:
                raise EnvironmentProblem(f"{method.name} does not run here: {row['reason']}. Leave it out of --method.")
        _compare(rows)
    content["break_even_tokens"][shape] = _break_even(content["rows"], swept)


def _row(
    config: BenchConfig, method: Method, sizes: tuple[int, int, int, int], sparsity: float, device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Any]:  # fmt: skip
    """Check a method, then time it. A method that can not run here has a reason, and no times."""
    batch, num_heads, length, head_dim = sizes
    sla = config.sla(sparsity)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(head_dim, head_dim, generator=generator).mul_(head_dim**-0.5).to(device)
    bias = torch.randn(head_dim, generator=generator).to(device)
    setting = Setting(sla, weight, bias, config.backend, device, dtype)
    backward = config.backward if config.backward is not None else device.type == "cuda"
    row: dict[str, Any] = {
        "method": method.name, "kind": method.kind, "backend": _backend_name(method, setting, head_dim),
        "shape": "x".join(map(str, sizes)), "dtype": str(dtype).removeprefix("torch."),
        "sparsity": None if method.kind == "dense" else sparsity, "correct": None, "error": None, "reason": None,
        "compile_s": None, "forward_ms": None, "backward_ms": None, "parts_ms": None, "tflops_dense_equivalent": None,
        "share_of_matmul_ceiling": None, "speedup": None, "speedup_forward_backward": None,
    }  # fmt: skip
    try:
        attend = method.make(setting)
        row["error"] = _error(method, setting, attend, head_dim)
        limit = method.error_limit or 32 * torch.finfo(dtype).eps
        row["correct"] = row["error"] <= limit
        if not row["correct"]:
            row["reason"] = f"wrong: its error to the reference is {row['error']:.2g}, the limit {limit:.2g}"
            return row
        inputs = _inputs(sizes, device, dtype)
        row["compile_s"], row["forward_ms"], row["backward_ms"] = _time(
            attend, inputs, device, config.seconds, backward and method.backward
        )
        if method.name == "sla":
            row["parts_ms"] = _parts(setting, inputs[0], row["forward_ms"]["median"], config.seconds)
    except NotHere as reason:
        row["reason"] = str(reason)
    except torch.OutOfMemoryError:
        row["reason"] = "does not fit into this device's memory"
    except SlagenError:
        raise
    except Exception as error:  # another library's failure is a result here, and is shown
        if method.name in ("sla", "sparse"):
            raise
        row["reason"] = f"not supported here ({type(error).__name__}: {str(error).strip().splitlines()[0][:120]})"
    if row["forward_ms"]:
        flops = 4 * batch * num_heads * length**2 * head_dim
        row["tflops_dense_equivalent"] = flops / row["forward_ms"]["median"] / 1e9
    return row


def _backend_name(method: Method, setting: Setting, head_dim: int) -> str:
    if method.name not in ("sla", "sparse"):
        return method.name
    probe = torch.empty(1, 1, 1, head_dim, dtype=setting.dtype, device=setting.device)
    return choose_backend(probe, setting.backend)


def _inputs(sizes: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> list[tuple[Tensor, ...]]:
    """q, k, v and do, as many sets as it takes to exceed twice the second-level cache, at most 8."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    size = 3 * math.prod(sizes) * torch.finfo(dtype).bits // 8
    generator = torch.Generator(device).manual_seed(0)
    return [
        tuple(torch.randn(sizes, generator=generator, device=device, dtype=dtype) for _ in range(4))
        for _ in range(min(8, max(1, math.ceil(2 * cache / size))))
    ]


def _error(method: Method, setting: Setting, attend: Attend, head_dim: int) -> float:
    """The largest error to the float64 reference on a short sequence, in units of the largest output."""
    sizes = (1, SHORT_HEADS, SHORT_LENGTH, head_dim)
    q, k, v, _ = _inputs(sizes, setting.device, setting.dtype)[0]
    with torch.inference_mode():
        actual = attend(q, k, v).double()
        wide = q.double(), k.double(), v.double()
        if method.kind == "dense":
            exact = F.scaled_dot_product_attention(*wide)
        elif method.kind == "sparse":
            exact = sparse_linear_attention(*wide, setting.config, backend="reference", branches="sparse")
        else:
            weight, bias = setting.weight.double(), setting.bias.double()
            exact = sparse_linear_attention(*wide, setting.config, weight, bias, backend="reference")
        return ((actual - exact).abs().max() / exact.abs().max()).item()


def _time(
    attend: Attend, inputs: list[tuple[Tensor, ...]], device: torch.device, seconds: float, backward: bool
) -> tuple[float, dict[str, Any], dict[str, Any] | None]:
    """First call in seconds, then forward and backward as medians with quartiles, in milliseconds."""
    clock = SpanClock(device.type)

    def once(i: int) -> None:
        q, k, v, do = inputs[i % len(inputs)]
        if not backward:
            with torch.inference_mode(), clock.span("forward"):
                attend(q, k, v)
            return
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        with clock.span("forward"):
            o = attend(*leaves)
        with clock.span("backward"):
            torch.autograd.grad(o, leaves, do)

    began = time.perf_counter()
    once(0)
    clock.read()  # waits for the device
    compile_s = time.perf_counter() - began
    began = time.perf_counter()
    once(1)
    clock.read()
    took = time.perf_counter() - began
    repeats = max(MIN_REPEATS, min(MAX_REPEATS, int(seconds / max(took, 1e-6))))
    for i in range(repeats):
        once(i)
    spans: dict[Any, list[float]] = {}
    for key, span in clock.read():
        spans.setdefault(key, []).append(span)
    return compile_s, _quartiles(spans["forward"]), _quartiles(spans["backward"]) if backward else None


def _quartiles(times: list[float]) -> dict[str, Any]:
    q1, median, q3 = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
    return {"median": median, "q1": q1, "q3": q3, "repeats": len(times)}


def _parts(setting: Setting, inputs: tuple[Tensor, ...], total: float, seconds: float) -> dict[str, float]:
    """Where SLA's forward time goes: block map, state, projection, each timed alone, and the fused rest."""
    stages = _triton_stages if choose_backend(inputs[0], setting.backend) == "triton" else _torch_stages
    parts = {
        name: _time(stage, [inputs], setting.device, seconds / 4, backward=False)[1]["median"]
        for name, stage in stages(setting, inputs).items()
    }
    return {**parts, "fused": total - sum(parts.values())}


def _triton_stages(setting: Setting, inputs: tuple[Tensor, ...]) -> dict[str, Attend]:
    """What precedes the kernel that attends. `state` holds the pooling of the keys, which shares its pass over them."""
    from slagen.kernels.selection import pool, select
    from slagen.kernels.states import fold, key_states, marginal_states

    config, (q, k, v, _) = setting.config, inputs
    marginal = config.linear_domain == "marginal"
    num_columns = config.num_blocks(q.shape[2])[1]
    topk, num_negligible = config.num_critical(num_columns), config.num_negligible(num_columns)
    weight = setting.weight.to(q.dtype)

    def sums(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return key_states(k, v, config.block_n, config.feature_map, marginal, weight if marginal else None, pool=True)

    def block_map(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return select(torch.bmm(pool(q, config.block_m), means.mT), topk, num_negligible, classes=marginal)

    def state(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        _, states, zs = sums(k, v)
        return marginal_states(states, zs, classes, topk + num_negligible) if marginal else (states.sum(1), zs.sum(1))

    means, states, zs = sums(k, v)
    classes = block_map(q, k, v)[1]
    if marginal:  # multiplied into the states of the blocks, where they are made
        return {"block_map": block_map, "state": state}
    total, z = states.sum(1), zs.sum(1)
    return {"block_map": block_map, "state": state, "projection": lambda q, k, v: fold(total, z, weight, q.dtype)}


def _torch_stages(setting: Setting, inputs: tuple[Tensor, ...]) -> dict[str, Attend]:
    """As `_triton_stages`; in the domain "marginal" every row is projected, after it has attended."""
    from slagen.attention.blockwise import head_groups, key_states, to_blocks

    config, q = setting.config, inputs[0]

    def block_map(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return critical_indices(block_scores(q, k, config), config)

    def state(q: Tensor, k: Tensor, v: Tensor) -> None:
        for heads in head_groups(q):
            key_states(to_blocks(k[heads], config.block_n), to_blocks(v[heads], config.block_n), config, q.shape[2])

    rows = q.shape[2] if config.linear_domain == "marginal" else q.shape[3]
    projected = torch.randn(*q.shape[:2], rows, q.shape[3], device=q.device)
    return {"block_map": block_map, "state": state, "projection": lambda q, k, v: projected @ setting.weight.mT}


def _compare(rows: list[dict[str, Any]]) -> None:
    """Set each row's speed-up over the fastest dense method of the same shape."""
    dense = [row for row in rows if row["kind"] == "dense" and row["forward_ms"]]
    if not dense:
        return
    forward = min(row["forward_ms"]["median"] for row in dense)
    both = min((_both(row) for row in dense if row["backward_ms"]), default=None)
    for row in rows:
        if row["forward_ms"]:
            row["speedup"] = forward / row["forward_ms"]["median"]
            if both is not None and row["backward_ms"]:
                row["speedup_forward_backward"] = both / _both(row)


def _both(row: dict[str, Any]) -> float:
    return row["forward_ms"]["median"] + row["backward_ms"]["median"]


def _break_even(rows: list[dict[str, Any]], sparsity: float) -> int | None:
    """The shortest length measured from which on SLA is never slower than the fastest dense method; None if never."""
    ratios = {
        int(row["shape"].split("x")[2]): row["speedup"]
        for row in rows
        if row["method"] == "sla" and row["sparsity"] == sparsity and row["speedup"] is not None
    }
    found = None
    for length in sorted(ratios, reverse=True):
        if ratios[length] < 1:
            break
        found = length
    return found


def _ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """What this machine reaches at best: a matrix product in TFLOP/s, a copy in GB/s (read and written)."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    source = torch.empty(2**28 if device.type == "cuda" else 2**26, dtype=torch.float32, device=device).zero_()
    target = torch.empty_like(source)
    product = _time(lambda q, k, v: q @ k, [(a, b, a, a)], device, 1.0, backward=False)[1]["median"]
    copy = _time(lambda q, k, v: q.copy_(k), [(target, source, source, source)], device, 1.0, backward=False)[1]
    return {"matmul_tflops": 2 * n**3 / product / 1e9, "copy_gb_s": 2 * source.nbytes / copy["median"] / 1e6}


# Model level


def _models(
    config: BenchConfig, device: torch.device, dtype: torch.dtype, on_note: Callable[[str], None]
) -> list[dict[str, Any]]:
    """The denoising loop, dense with each dense backend of PyTorch and with SLA at each sparsity, as config says."""
    from slagen.wan.loading import load_pipeline, random_pipeline, resolve_model
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
    fastest = min(row["step_ms"]["median"] for row in rows if row["attention"] == "dense")
    return [{"model": name, **row, "speedup": fastest / row["step_ms"]["median"]} for row in rows]


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
        "step_ms": _quartiles(latency), "attention_ms": None if compiled else _quartiles(attention),
        "attention_share": None if compiled else sum(attention) / sum(latency),
        "peak_memory_gib": machine.peak_memory_gib(device),
    }  # fmt: skip


# Files


def _write(folder: Path, content: dict[str, Any]) -> list[Path]:
    """bench.json, bench.md, and where shapes were timed bench.png and bench.svg, each whole or not at all."""
    files = [folder / "bench.json", folder / "bench.md"]
    report.write_json(files[0], content)
    report.write_text(files[1], markdown(BenchResult(content)))
    if any(row["forward_ms"] for row in content["rows"]):
        from slagen.plot import draw_bench

        files += draw_bench(content, folder)
    return files


def markdown(result: BenchResult) -> str:
    """The rows as tables, under the machine they were measured on."""
    about = result.content["machine"]
    lines = [f"# slagen bench: {about['name']}", "", f"{about['date']}; " + ", ".join(
        f"{package} {number}" for package, number in about["versions"].items()
    ) + f"; matmul {about['matmul_tflops']:.3g} TFLOP/s, copy {about['copy_gb_s']:.3g} GB/s.", ""]  # fmt: skip
    for columns, rows in result.tables:
        if rows:
            lines += ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
            lines += ["| " + " | ".join(row) + " |" for row in rows] + [""]
    lines += [f"- {verdict}" for verdict in result.verdicts]
    return "\n".join(lines) + "\n"


COLUMNS = (
    "shape", "method", "backend", "sparsity", "forward ms (quartiles, repeats)", "backward ms", "dense TFLOP/s",
    "speed-up",
)  # fmt: skip
MODEL_COLUMNS = ("model", "attention", "backend", "sparsity", "step ms (quartiles)", "attention share", "speed-up")
NEVER = "SLA is slower than dense attention at the longest sequence measured"


def cells(row: dict[str, Any]) -> list[str]:
    """One row of the table, as text; a method that was not timed says why."""
    shown = [row["shape"], row["method"], row["backend"], _number(row["sparsity"])]
    if not row["forward_ms"]:
        return [*shown, row["reason"] or "", "", "", ""]
    forward, backward = row["forward_ms"], row["backward_ms"]
    timed = f"{forward['median']:.4g} ({forward['q1']:.4g}-{forward['q3']:.4g}, {forward['repeats']})"
    speedup = row["speedup"]
    said = (
        "" if speedup is None else f"{speedup:.2f}x" + (" (slower)" if speedup < 1 and row["kind"] != "dense" else "")
    )
    return [
        *shown,
        timed,
        f"{backward['median']:.4g}" if backward else "",
        f"{row['tflops_dense_equivalent']:.4g}",
        said,
    ]


def model_cells(row: dict[str, Any]) -> list[str]:
    """One row of the table of models, as text."""
    step = row["step_ms"]
    return [
        f"{row['model']} {row['size']}, {row['num_frames']} frames",
        row["attention"],
        row["backend"] + ", compiled" * row["compiled"],
        _number(row["sparsity"]),
        f"{step['median']:.4g} ({step['q1']:.4g}-{step['q3']:.4g})",
        "" if row["compiled"] else f"{row['attention_share']:.0%}",
        f"{row['speedup']:.2f}x" + (" (slower)" if row["speedup"] < 1 and row["attention"] == "sla" else ""),
    ]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:g}"
