"""An attention method inside `blocks[i].attn1` of a diffusers Wan transformer: install it, remove it again."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_wan import WanAttention, WanTransformer3DModel, _get_qkv_projections
from torch import Tensor, nn

from slagen.attention import registry
from slagen.attention.delta.correction import corrected
from slagen.attention.policy import DensePart
from slagen.attention.protocol import NO_PASS, Grid, Inputs, Layer, Method, StepContext
from slagen.attention.sla.config import Backend, SLAConfig
from slagen.attention.sla.functional import Branches
from slagen.errors import UsageError
from slagen.formats.sla import SLAMetadata
from slagen.timing import StepRecorder, communicating
from slagen.wan.guards import refuse_fused, refuse_offloaded
from slagen.wan.rotary import BlockMeans, Rotary, norm_and_rotate
from slagen.wan.saved import forget_settings
from slagen.wan.sequence_parallel import TokenGroup

Watch = Callable[[Any, Tensor, Tensor, Tensor, Tensor, Inputs], None]  # of a processor, q, k, v, o (B, H, L, D)


def _self_attention(
    attn: WanAttention,
    hidden_states: Tensor,
    rotary_emb: Rotary | None,
    attend: Callable[..., Tensor],
    backend: Backend,
    blocks: tuple[int, int] | None,
) -> Tensor:
    """Everything around the attention itself, as WanAttnProcessor does it; `attend` sees (B, H, L, D) views, and the
    means of their `blocks` where those cost nothing."""
    query, key, value = _get_qkv_projections(attn, hidden_states, None)  # type: ignore[arg-type]
    query, key, means = norm_and_rotate(attn, query, key, rotary_emb, backend, blocks)
    value = value.unflatten(2, (attn.heads, -1))  # (B, L, H, D)
    out = attend(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), means)
    out = out.transpose(1, 2).flatten(2, 3).type_as(query)
    return attn.to_out[1](attn.to_out[0](out))


class _Processor:
    """A diffusers attention processor for one Wan self-attention layer, on top of the class of a method's module."""

    _attention_backend = None  # diffusers sets both on every processor that has them
    _parallel_config = None
    base: Any  # the module's own class
    config: Any  # of the method
    method: Method
    place: Layer
    context: StepContext
    rotary_backend: Backend = "auto"  # of the norm and rotation around the attention
    recorder: StepRecorder | None = None  # `attach_recorder` gives one
    watch: Watch | None = None  # `watching` gives one
    token_group: TokenGroup | None = None  # the processes that share a clip's tokens
    kept: dict[str, Any] | None = None  # the layer's memory in this pass
    runs_dense: bool = False  # in this step, whatever the method

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _bare_processor, (self.base,), self.__dict__

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: Rotary | None = None,
    ) -> Tensor:
        _refuse_other_attention(encoder_hidden_states, attention_mask, self._parallel_config)

        def attend(q: Tensor, k: Tensor, v: Tensor, means: BlockMeans | None) -> Tensor:
            if self.token_group is not None:
                with communicating(self.recorder):
                    q, k, v = (self.token_group.to_heads(x) for x in (q, k, v))
                o = self._timed(q, k, v, Inputs(self.place, self.context, kept=self.kept))
                with communicating(self.recorder):
                    return self.token_group.to_tokens(o)
            return self._timed(q, k, v, Inputs(self.place, self.context, hidden_states, means, self.kept))

        # Of a process's own tokens no blocks can be formed: they are those of the whole clip.
        blocks = None if self.token_group is not None else self._blocks(self._grid(hidden_states.shape[1]))
        return _self_attention(attn, hidden_states, rotary_emb, attend, self.rotary_backend, blocks)

    def _grid(self, num_tokens: int) -> Grid:
        """The arrangement of the tokens, as the hooks have noted it; flat where the method does not need it."""
        if not self.method.needs.context:
            return Grid.flat(num_tokens)
        if self.context.grid is None:
            raise RuntimeError(NO_PASS)
        return self.context.grid

    def _blocks(self, grid: Grid) -> tuple[int, int] | None:
        """The sizes of blocks whose means the method takes."""
        block_sizes = getattr(self, "block_sizes", None)
        if block_sizes is None or self.runs_dense or not self.method.applies(self.config, grid):
            return None
        return block_sizes(grid)  # type: ignore[no-any-return]

    def _timed(self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs) -> Tensor:
        if self.watch is not None:
            o = self._operator(q, k, v, inputs)
            self.watch(self, q, k, v, o, inputs)
            return o
        if self.recorder is None:
            return self._operator(q, k, v, inputs)
        with self.recorder.attention(self.place.index):
            return self._operator(q, k, v, inputs)

    def _operator(self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs) -> Tensor:
        """Attention of q, k, v, each (B, H, L, D). What has nothing to choose from is attended densely."""
        if self.runs_dense or not self.method.applies(self.config, self._grid(q.shape[2])):
            return F.scaled_dot_product_attention(q, k, v)
        # Called as a module, so that hooks on it run; `__call__` itself is what diffusers calls a processor by.
        o = nn.Module.__call__(self, q, k, v, inputs)  # type: ignore[arg-type]
        return corrected(o, q, k, v, self.method.delta)


@functools.cache
def processor_class(base: Any) -> Any:
    """The class of a processor that is a module of class `base` besides, and keeps the names of its parameters."""
    return type(f"{base.__name__}Processor", (_Processor, base), {"__module__": __name__, "base": base})


def _bare_processor(base: type[nn.Module]) -> Any:
    kind = processor_class(base)  # type: ignore[arg-type]
    return kind.__new__(kind)


def make_processor(
    method: Method,
    config: Any,
    layer: Layer,
    *,
    backend: str = "auto",
    context: StepContext | None = None,
    device: torch.device | str | None = None,
) -> Any:
    """The processor of one layer: the module that a method builds, which diffusers can call.

    Raises: Unavailable where the method or its backend cannot run here.
    """
    module: Any = method.build(config, layer, backend, device)
    module.__class__ = processor_class(type(module))  # type: ignore[arg-type]
    module.method, module.place, module.context = method, layer, context or StepContext()
    module.rotary_backend = backend if backend in get_args(Backend) else "auto"
    return module


def _refuse_other_attention(encoder_hidden_states: Any, attention_mask: Any, parallel_config: Any) -> None:
    if encoder_hidden_states is not None or attention_mask is not None:
        raise ValueError("this processor is for unmasked self-attention (attn1) only. Leave attn2 as it is.")
    if parallel_config is not None:
        raise ValueError(
            "context parallelism splits the tokens, and slagen's attention needs all of them. "
            "Call remove_sla() before enable_parallelism()."
        )


@dataclass
class Installation:
    """What `install` put aside, so that `remove` can put it back."""

    processors: list[Any]
    replaced: dict[str, Tensor] = field(default_factory=dict)  # base tensors that SLA weights overwrote, on the CPU
    context: StepContext = field(default_factory=StepContext)
    hooks: list[Any] = field(default_factory=list)
    metadata: SLAMetadata | None = None  # of the file that is loaded
    versions: dict[str, int] = field(default_factory=dict)  # of the base's tensors, as PyTorch counts their changes


def version_of(tensor: Tensor) -> int:
    """How often a tensor was changed in place, as PyTorch counts it; 0 for one of inference mode, which trains not."""
    return 0 if tensor.is_inference() else tensor._version


def installation(transformer: WanTransformer3DModel) -> Installation | None:
    """The record of what is installed in a transformer, None for an untouched one."""
    return getattr(transformer, "_slagen_installation", None)


def install(
    transformer: WanTransformer3DModel,
    config: SLAConfig | None,
    *,
    backend: Backend = "auto",
    branches: Branches = "both",
) -> None:
    """Put SLA with a fresh (zero) `proj_l`, or dense attention, into every `blocks[i].attn1`.

    Args:
        config: for SLA; None for dense attention.
        backend: of SLA, and of the norm and rotation around either attention.
        branches: as in `sparse_linear_attention`.
    Raises: as `install_method`.
    """
    if config is not None:
        return install_method(transformer, registry.of_branches(branches), config, backend=backend)
    dense = registry.get("dense")
    install_method(transformer, dense, dense.config())
    for processor in processors(transformer):
        processor.rotary_backend = backend


def install_method(transformer: WanTransformer3DModel, method: Method, config: Any, *, backend: str = "auto") -> None:
    """Put one processor into every `blocks[i].attn1`; cross-attention stays as it is.

    Args:
        transformer: a Wan transformer without slagen's attention in it.
        config: of the method. backend: one of its own.
    Raises: UsageError if attention is installed already, the model has no such layers, or hooks offload them.
    """
    if installation(transformer) is not None:
        raise UsageError("this transformer has slagen's attention installed already. Call remove_sla(pipe) first.")
    method.check_backend(backend)
    layers = self_attention_layers(transformer)
    refuse_offloaded(transformer, "installed")
    versions = {name: version_of(tensor) for name, tensor in transformer.state_dict().items()}
    record = Installation([attn.processor for attn in layers], versions=versions)
    transformer._slagen_installation = record  # type: ignore[assignment]
    for index, attn in enumerate(layers):
        layer = Layer(index, len(layers), attn.heads, attn.inner_dim // attn.heads)
        device = next(attn.parameters()).device
        processor = make_processor(method, config, layer, backend=backend, context=record.context, device=device)
        attn.set_processor(processor.train(attn.training))
    if method.takes_context(config):
        record.hooks = _follow(transformer, record.context)


def set_config(transformer: WanTransformer3DModel, method: Method, config: Any) -> None:
    """Have the installed attention go on with another config of its method, or with that corrected by delta."""
    for processor in processors(transformer):
        processor.config, processor.method = config, method
    record = installation(transformer)
    if record is not None and not record.hooks and method.takes_context(config):
        record.hooks = _follow(transformer, record.context)


def set_layers(transformer: WanTransformer3DModel, configs: Sequence[Any]) -> None:
    """Have the installed attention go on with a config of its method for each layer."""
    for processor, config in zip(processors(transformer), configs, strict=True):
        processor.config = config


def _follow(transformer: WanTransformer3DModel, context: StepContext) -> list[Any]:
    """Have a transformer's forward passes noted in a context. Returns the hooks' handles."""
    context.position = torch.full((2,), -1)
    return [
        transformer.register_forward_pre_hook(_PassHook(context), with_kwargs=True),
        transformer.condition_embedder.register_forward_hook(_TimeHook(context)),
    ]


@dataclass
class _PassHook:
    """Notes that a forward pass begins. An object, so that a copy of the transformer has its own context."""

    context: StepContext

    @torch.compiler.disable
    def __call__(self, transformer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        begin_pass(transformer, self.context, args[0] if args else kwargs["hidden_states"])


def begin_pass(transformer: Any, context: StepContext, latents: Tensor) -> None:
    """Note in a context, and tell every processor, that a forward pass begins, of latents (B, C, T, h, w)."""
    sizes = zip(latents.shape[2:], transformer.config.patch_size, strict=True)
    context.begin_pass(Grid(*(size // part for size, part in sizes)))
    for processor in processors(transformer):
        processor.kept = context.memory_of(processor.place)
        if (own := getattr(processor, "begin_pass", None)) is not None:
            own(context)


def follow(student: Any, teacher: Any) -> Any:
    """Have the passes of a teacher noted by the attention in a student that runs on its inputs. Returns the handle."""

    def begin(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        record = installation(student)
        if record is not None and record.hooks:
            begin_pass(student, record.context, args[0] if args else kwargs["hidden_states"])

    return teacher.register_forward_pre_hook(begin, with_kwargs=True)


@dataclass
class _TimeHook:
    """Notes the time embedding of a forward pass."""

    context: StepContext

    @torch.compiler.disable
    def __call__(self, embedder: Any, args: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        self.context.time_embedding = output[0]


def remove(transformer: WanTransformer3DModel) -> None:
    """Put the former processors and every overwritten base tensor back. Without an installation, do nothing.

    Raises: UsageError, before anything is changed, where such tensors are offloaded or a LoRA is fused into them.
    """
    record = installation(transformer)
    if record is None:
        return
    if record.replaced:
        refuse_offloaded(transformer, "removed")
        refuse_fused(transformer, "removed")
    for attn, processor in zip(self_attention_layers(transformer), record.processors, strict=True):
        attn.set_processor(processor)
    for hook in record.hooks:
        hook.remove()
    with torch.no_grad():
        state = {name.replace(".base_layer.", "."): x for name, x in transformer.state_dict().items()}  # beside a LoRA
        for name, tensor in record.replaced.items():
            state[name].copy_(tensor)
    del transformer._slagen_installation
    forget_settings(transformer)


def self_attention_layers(transformer: nn.Module) -> list[WanAttention]:
    """The `attn1` of every block."""
    layers = [block.attn1 for block in getattr(transformer, "blocks", []) if hasattr(block, "attn1")]
    if not layers or not all(isinstance(attn, WanAttention) for attn in layers):
        raise UsageError(
            f"{type(transformer).__name__} has no Wan self-attention (blocks[i].attn1). Give a Wan2.1 pipeline."
        )
    return layers


def processors(transformer: WanTransformer3DModel) -> list[Any]:
    """The processor of each self-attention layer, in order."""
    return [attn.processor for attn in self_attention_layers(transformer)]


@contextmanager
def denoising(
    transformer: WanTransformer3DModel, num_steps: int, dense: DensePart | None = None,
    configs: Sequence[Any] | None = None,
) -> Iterator[Callable[[], None]]:  # fmt: skip
    """Tell the installed attention that a clip of so many steps is denoised meanwhile; the value ends a step.

    Args:
        dense: the steps and layers that use dense attention.
        configs: of the method, one for each step, or a tuple with one for each layer; None leaves what is installed.
    """
    record = installation(transformer)
    if record is None:
        yield lambda: None
        return
    context = record.context

    def choose() -> None:
        """A processor's own bool, so that blocks are compiled twice at most; and once for each config."""
        step = context.step or 0
        own = (
            configs[step] if configs is not None and step < len(configs) else None
        )  # after the last step there is none
        for index, processor in enumerate(processors(transformer)):
            processor.runs_dense = dense is not None and (context.step in dense.steps or index in dense.layers)
            if own is not None:
                processor.config = own[index] if isinstance(own, tuple) else own

    def end_step() -> None:
        context.end_step()
        choose()

    installed = [processor.config for processor in processors(transformer)]
    context.begin_clip(num_steps)
    choose()
    try:
        yield end_step
    finally:
        context.end_clip()
        for processor, config in zip(processors(transformer), installed, strict=True):
            processor.runs_dense, processor.config = False, config
