"""Time the denoising loop of a model with dense attention, with SLA and with other methods."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from slagen import machine
from slagen.attention.cost import ModelShape
from slagen.attention.delta.method import with_delta
from slagen.attention.dense.config import BACKENDS
from slagen.attention.dense.kernels import SDPA, dense_kernel
from slagen.attention.dense.method import DENSE
from slagen.attention.policy import AttentionPolicy
from slagen.attention.protocol import Grid, Method, Unavailable
from slagen.attention.schedule import Schedule
from slagen.benchmark.clock import spread
from slagen.benchmark.compare import compare_times
from slagen.benchmark.config import BenchConfig
from slagen.benchmark.methods import unavailable
from slagen.benchmark.rows import ModelRow
from slagen.events import Event, counted_parts, loaded_parts
from slagen.generation.lora import asked_loras
from slagen.generation.sizes import check_grid
from slagen.timing import StepRecorder, Times
from slagen.wan.defaults import ModelDefaults
from slagen.wan.folder import token_grid
from slagen.wan.presets import recommended_policy


@dataclass(frozen=True)
class Contender:
    """One way to attend that the loop is timed with.

    Args:
        attention, backend, sparsity: what its row says.
        install: puts it into a transformer.
        sdpa: the backend of PyTorch that scaled_dot_product_attention is held to meanwhile; None is PyTorch's choice.
        delta: corrects it, if not None.
        configs: of each step, as for `denoising`, where a schedule sets the sparsity; None keeps the one installed.
        dense_elsewhere: what `generate` runs dense unless told otherwise, and this loop does not; empty for nothing.
    """

    attention: str
    backend: str
    sparsity: float | None
    install: Callable[[Any], None]
    sdpa: SDPBackend | None = None
    delta: int | None = None
    dense_elsewhere: str = ""
    configs: tuple[Any, ...] | None = None

    def held(self) -> AbstractContextManager[None]:
        """Holds PyTorch's attention, cross-attention too, to the backend."""
        return contextlib.nullcontext() if self.sdpa is None else sdpa_kernel([self.sdpa, SDPBackend.MATH])

    def warm_up(self, steps: int) -> int:
        """The steps that run before those that are timed: one, or all where they differ in what they run."""
        return 1 if self.configs is None else steps

    @property
    def label(self) -> str:
        """What a note says of it."""
        if self.configs is not None:
            return f"{self.attention} ({self.backend}), sparsity schedule"
        return f"{self.attention} ({self.backend})" + ("" if self.sparsity is None else f", sparsity {self.sparsity:g}")


@dataclass(frozen=True)
class LoopTimes:
    """Where the time of a loop went; see ModelRow, whose fields these are."""

    step_ms: Times
    attention_ms: Times | None
    attention_share: float | None
    peak_memory_gib: float


def bench_model(
    config: BenchConfig, device: torch.device, dtype: torch.dtype, on_event: Callable[[Event], None]
) -> list[ModelRow]:
    """Time the denoising loop with dense attention, and with SLA and every method named or in no need of weights."""
    from slagen.wan.processor import remove

    pipe, name, defaults = _load(config, device, dtype, on_event)
    head_dim, layers = pipe.transformer.config.attention_head_dim, pipe.transformer.config.num_layers
    width, height, num_frames = _size(config, defaults)
    factors = pipe.vae_scale_factor_spatial, pipe.vae_scale_factor_temporal
    grid = token_grid(width, height, num_frames, pipe.transformer.config.patch_size, *factors)
    loras = _add_loras(pipe, config, name, on_event) if config.lora else None
    rows = []
    for contender in [*_dense(config, device), *_methods(config, grid, head_dim, layers, device, dtype)]:
        for compiled in (False, True) if config.compile else (False,):
            label = f"{name}, {contender.label}" + ", compiled" * compiled
            on_event(Event("job", label))
            steps = config.num_steps + contender.warm_up(config.num_steps)
            on_event(Event("stage", "time", num_steps=steps, about=label))
            if contender.dense_elsewhere:
                text = (
                    f"{contender.attention} is timed in every step and layer, but by default slagen generate uses "
                    f"dense attention in some steps or layers ({contender.dense_elsewhere})"
                )
                on_event(Event("note", text))
            contender.install(pipe.transformer)
            try:
                with contender.held():
                    times = time_loop(pipe, config, defaults, compiled, on_event, contender)
            finally:
                remove(pipe.transformer)
            rows.append(ModelRow(
                name, contender.attention, contender.backend, contender.sparsity, f"{width}x{height}", num_frames,
                config.num_steps, compiled, delta=contender.delta,
                sparsity_schedule=None if contender.configs is None else config.sparsity_schedule, lora=loras,
                **vars(times),
            ))  # fmt: skip
    fastest = min((row.step_ms for row in rows if row.attention == "dense"), key=lambda times: times.median)
    return [
        dataclasses.replace(
            row,
            speedup=fastest.median / row.step_ms.median,
            against_dense=compare_times(row.step_ms, fastest),
        )
        for row in rows
    ]


def _dense(config: BenchConfig, device: torch.device) -> list[Contender]:
    """Dense attention with the backends named, or those that PyTorch has for this device.

    Raises: EnvironmentProblem where one that is named cannot run here.
    """
    from slagen.wan.processor import install_method

    names = [backend.name for backend in BACKENDS if backend.name in config.methods]
    found = []
    for name in names or (["sdpa-flash", "sdpa-cudnn"] if device.type == "cuda" else ["sdpa"]):
        try:
            dense_kernel(name, device)
        except (Unavailable, ImportError) as error:
            raise unavailable(name, str(error)) from error
        backend = "auto" if name in SDPA else name
        put = partial(install_method, method=DENSE, config=DENSE.config(), backend=backend)
        found.append(Contender("dense", name, None, put, SDPA.get(name)))
    return found


def _methods(
    config: BenchConfig, grid: Grid, head_dim: int, num_layers: int, device: torch.device, dtype: torch.dtype
) -> list[Contender]:
    """slagen's other methods, at each sparsity where they have one."""
    from slagen.wan.processor import install_method

    found = []
    for method in config.loop_methods:
        chosen = config.backend if config.backend in [backend.name for backend in method.backends] else "auto"
        sparsities = (config.sparsities or (0.95,)) if "sparsity" in method.option_names else (None,)
        for sparsity in sparsities:
            options = {**dataclasses.asdict(config.sla(sparsity or 0.0)), **dict(config.attention_options)}
            own = method.configure(method.config(), method.own(options), grid)
            label = method.pick_backend(chosen, head_dim, device, dtype, own)
            put = partial(install_method, method=with_delta(method, config.delta), config=own, backend=chosen)
            dense = _dense_elsewhere(config.model, method)
            configs = None
            if sparsity is not None and config.sparsity_schedule is not None:
                policy = AttentionPolicy(delta=config.delta, sparsity_schedule=config.sparsity_schedule)
                corrected = with_delta(method, config.delta)
                configs = Schedule.of(corrected, own, grid, policy, config.num_steps, num_layers).by_step
            shown = sparsity if configs is None else None
            found.append(Contender(method.name, label, shown, put, None, config.delta, dense, configs))
    return found


def _dense_elsewhere(model: str | None, method: Method) -> str:
    """The steps and layers that `generate` runs dense with a method of its own accord, as a message names them."""
    policy = recommended_policy(model, method.name)
    dense = {"dense_steps": policy.dense_steps or method.dense_steps, "dense_layers": policy.dense_layers}
    return " and ".join(f"{name} {text}" for name, text in dense.items() if text is not None)


def _add_loras(pipe: Any, config: BenchConfig, name: str, on_event: Callable[[Event], None]) -> str:
    """Put the LoRAs into the model; returns what its rows say of them."""
    from slagen.generation.lora_files import describe_loras, find_loras
    from slagen.wan.lora import Loras

    c = pipe.transformer.config
    shape = ModelShape(c.num_layers, c.num_attention_heads, c.attention_head_dim, c.ffn_dim, text_tokens=512)
    files, asked = find_loras(config.lora, shape, name), asked_loras(config.lora, None)
    for kind, texts in zip(("note", "warning"), describe_loras(files, asked), strict=True):
        for text in texts:
            on_event(Event(kind, text))
    merge = config.lora_merge is not False
    Loras(pipe, files, merge=merge, keep=False).set_scales([lora.scale for lora in asked])
    return f"{', '.join(map(str, asked))} ({'merged' if merge else 'not merged'})"


def _load(
    config: BenchConfig, device: torch.device, dtype: torch.dtype, on_event: Callable[[Event], None]
) -> tuple[Any, str, ModelDefaults]:
    """The model on its device, its name, and its own settings."""
    from slagen.wan.folder import check_image
    from slagen.wan.loading import load_pipeline, random_pipeline
    from slagen.wan.models import resolve_model

    if config.random_init is not None:
        on_event(Event("job", f"initializing {config.random_init} with random weights"))
        return random_pipeline(config.random_init, device, dtype), config.random_init, ModelDefaults()
    source = resolve_model(config.model, device.type, on_note=lambda text: on_event(Event("note", text)))
    check_image(source.name, source.takes_image, False)
    width, height, num_frames = _size(config, source.defaults)
    check_grid(width, height, source.spatial_grid)
    on_event(Event("job", f"loading {source.name}"))
    pipe = load_pipeline(source, dtype, quantised=True, on_part=loaded_parts(on_event))
    _place(pipe, source, device, dtype, (width, height, num_frames), on_event)
    return pipe, source.name, source.defaults


def _place(
    pipe: Any, source: Any, device: torch.device, dtype: torch.dtype, size: tuple[int, int, int],
    on_event: Callable[[Event], None],
) -> None:  # fmt: skip
    """Move a model to its device, whole parts at a time, for its attention is exchanged there."""
    from slagen.generation.placing import choose_placement, move, sizes_of

    tokens = source.token_grid(*size).num_tokens
    placement = choose_placement(
        device, lambda: sizes_of(pipe, source.shape, tokens, size, dtype.itemsize),
        lambda text: on_event(Event("note", text)), whole=True,
    )  # fmt: skip
    move(pipe, device, placement)


def _size(config: BenchConfig, defaults: ModelDefaults) -> tuple[int, int, int]:
    """Width and height in pixels, and video frames."""
    return (
        config.width or defaults.width,
        config.height or defaults.height,
        config.num_frames or defaults.num_frames,
    )


def time_loop(
    pipe: Any, config: BenchConfig, defaults: ModelDefaults, compiled: bool,
    on_event: Callable[[Event], None] = lambda event: None, contender: Contender | None = None,
) -> LoopTimes:  # fmt: skip
    """Run the denoising loop, first some steps to warm up, and split its steps; a compiled block can not be split.

    Args: contender: what is installed, where it is not the same in all steps.
    """
    from slagen.wan.compiling import compile_blocks
    from slagen.wan.observe import attach_recorder
    from slagen.wan.processor import denoising

    transformer = pipe.transformer
    device = next(transformer.parameters()).device
    generator = torch.Generator().manual_seed(0)
    shape = (1, defaults.max_sequence_length, transformer.config.text_dim)
    text = [torch.randn(shape, generator=generator).to(device, transformer.dtype) for _ in range(2)]
    recorder = StepRecorder(device.type, "layer")
    warm_up, configs = (1, None) if contender is None else (contender.warm_up(config.num_steps), contender.configs)
    advance = counted_parts(on_event, config.num_steps + warm_up)
    width, height, num_frames = _size(config, defaults)

    def run(steps: int) -> None:
        def after_step(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            recorder.end_step(float(timestep))
            end_step()
            advance()
            return {}

        with denoising(transformer, steps, configs=configs) as end_step:
            recorder.begin_step()
            pipe(
                prompt_embeds=text[0], negative_prompt_embeds=text[1], width=width, height=height,
                num_frames=num_frames, num_inference_steps=steps, guidance_scale=defaults.guidance_scale,
                output_type="latent", generator=torch.Generator().manual_seed(0), callback_on_step_end=after_step,
                max_sequence_length=defaults.max_sequence_length,
            )  # fmt: skip

    with torch.inference_mode(), contextlib.ExitStack() as stack:
        if compiled:
            torch._dynamo.reset()  # one attention after another in the same blocks must not add up to a limit
            stack.callback(compile_blocks(transformer, whole=False))
        else:
            stack.callback(attach_recorder(transformer, recorder))
        run(warm_up)
        recorder.steps.clear()
        run(config.num_steps)
    latency = [step.latency_ms or 0.0 for step in recorder.steps]
    attention = [sum(step.attention_ms) for step in recorder.steps]
    return LoopTimes(
        step_ms=spread(latency),
        attention_ms=None if compiled else spread(attention),
        attention_share=None if compiled else sum(attention) / sum(latency),
        peak_memory_gib=machine.peak_memory_gib(device),
    )
