"""Time the denoising loop of a model with dense attention and with SLA."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from slagen import machine
from slagen.attention.sla.functional import choose_backend
from slagen.benchmark.clock import spread
from slagen.benchmark.compare import compare_times
from slagen.benchmark.config import BenchConfig
from slagen.timing import StepRecorder
from slagen.wan.defaults import ModelDefaults


def bench_model(
    config: BenchConfig, device: torch.device, dtype: torch.dtype, on_note: Callable[[str], None]
) -> list[dict[str, Any]]:
    """The denoising loop, dense with each dense backend of PyTorch and with SLA at each sparsity, as config says."""
    from slagen.wan.loading import load_pipeline, random_pipeline
    from slagen.wan.models import resolve_model
    from slagen.wan.processor import install, remove

    name: str
    if config.random_init is not None:
        on_note(f"initializing {config.random_init} with random weights")
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
                    times = time_loop(pipe, config, defaults, compiled)
            finally:
                remove(pipe.transformer)
            rows.append({"attention": "dense", "backend": label, "sparsity": None, **times})
    for sparsity in config.sparsities or (0.95,):
        label = choose_backend(probe, config.backend)
        for compiled in loops:
            on_note(f"{name}, SLA, sparsity {sparsity:g}" + ", compiled" * compiled)
            install(pipe.transformer, config.sla(sparsity), backend=config.backend)
            try:
                times = time_loop(pipe, config, defaults, compiled)
            finally:
                remove(pipe.transformer)
            rows.append({"attention": "sla", "backend": label, "sparsity": sparsity, **times})
    fastest = min((row["step_ms"] for row in rows if row["attention"] == "dense"), key=lambda times: times["median"])
    return [
        {"model": name, **row, "speedup": fastest["median"] / row["step_ms"]["median"],
         "against_dense": compare_times(row["step_ms"], fastest)}
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


def time_loop(pipe: Any, config: BenchConfig, defaults: ModelDefaults, compiled: bool) -> dict[str, Any]:
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
        "step_ms": spread(latency), "attention_ms": None if compiled else spread(attention),
        "attention_share": None if compiled else sum(attention) / sum(latency),
        "peak_memory_gib": machine.peak_memory_gib(device),
    }  # fmt: skip
