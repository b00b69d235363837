"""SLA inside `blocks[i].attn1` of a diffusers Wan transformer: install it, remove it again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_wan import WanAttention, WanTransformer3DModel, _get_qkv_projections
from torch import Tensor, nn

from slagen.attention import SparseLinearAttention
from slagen.attention.sla.functional import Branches
from slagen.config import Backend, SLAConfig
from slagen.errors import UsageError
from slagen.timing import StepRecorder
from slagen.wan.guards import refuse_fused, refuse_offloaded
from slagen.wan.rotary import BlockMeans, Rotary, norm_and_rotate
from slagen.wan.saved import forget_settings
from slagen.wan.sequence_parallel import to_heads, to_tokens


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
    """A diffusers attention processor for one Wan self-attention layer; a subclass has the attention itself."""

    _attention_backend = None  # diffusers sets both on every processor that has them
    _parallel_config = None
    layer: int  # index of the block, for the recorder
    backend: Backend
    recorder: StepRecorder | None = None  # `attach_recorder` gives one
    token_group: Any = None  # the processes that share a clip's tokens, see context.py

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: Rotary | None = None,
    ) -> Tensor:
        _refuse_what_sla_lacks(encoder_hidden_states, attention_mask, self._parallel_config)
        # Of a process's own tokens no blocks can be formed: they are those of the whole clip.
        blocks = None if self.token_group is not None else self._blocks(hidden_states.shape[1])
        return _self_attention(attn, hidden_states, rotary_emb, self._attend, self.backend, blocks)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, means: BlockMeans | None) -> Tensor:
        if self.token_group is not None:
            q, k, v = (to_heads(x, self.token_group) for x in (q, k, v))
            return to_tokens(self._timed(q, k, v, None), self.token_group)
        return self._timed(q, k, v, means)

    def _timed(self, q: Tensor, k: Tensor, v: Tensor, means: BlockMeans | None) -> Tensor:
        if self.recorder is None:
            return self._operator(q, k, v, means)
        with self.recorder.attention(self.layer):
            return self._operator(q, k, v, means)

    def _blocks(self, length: int) -> tuple[int, int] | None:
        """The sizes of blocks whose means `_operator` can use."""
        return None

    def _operator(self, q: Tensor, k: Tensor, v: Tensor, means: BlockMeans | None) -> Tensor:
        """Attention of q, k, v, each (B, H, L, D), with the means of their blocks where they are known."""
        raise NotImplementedError


class SLAProcessor(_Processor, SparseLinearAttention):
    """Sparse-linear attention in one layer. Holds that layer's `proj_l`.

    A sequence of fewer than two key blocks has nothing to choose from and is attended densely.

    Args:
        head_dim: D of the layer.
        config: how SLA divides the work.
        layer: index of the block.
        backend, branches: as in `sparse_linear_attention`.
        device: where `proj_l` is made.
    """

    def __init__(
        self,
        head_dim: int,
        config: SLAConfig,
        layer: int,
        *,
        backend: Backend = "auto",
        branches: Branches = "both",
        device: torch.device | str | None = None,
    ) -> None:
        SparseLinearAttention.__init__(self, head_dim, config, backend=backend, branches=branches, device=device)
        self.layer = layer

    def _blocks(self, length: int) -> tuple[int, int] | None:
        chooses = self.branches != "linear" or self.config.linear_domain == "marginal"
        if not chooses or self.config.num_blocks(length)[1] < 2:
            return None
        return self.config.block_m, self.config.block_n

    def _operator(self, q: Tensor, k: Tensor, v: Tensor, means: BlockMeans | None) -> Tensor:
        if self.config.num_blocks(q.shape[2])[1] < 2:
            return F.scaled_dot_product_attention(q, k, v)
        # Called as a module, so that hooks on it run; `__call__` itself is what diffusers calls a processor by.
        return nn.Module.__call__(self, q, k, v, **({} if means is None else {"block_means": means}))  # type: ignore[no-any-return]


class DenseProcessor(_Processor):
    """Full attention with the same spans around it, and the same norm and rotation: what SLA is compared with."""

    def __init__(self, layer: int, backend: Backend = "auto") -> None:
        self.layer, self.backend = layer, backend

    def _operator(self, q: Tensor, k: Tensor, v: Tensor, means: BlockMeans | None) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


def _refuse_what_sla_lacks(encoder_hidden_states: Any, attention_mask: Any, parallel_config: Any) -> None:
    if encoder_hidden_states is not None or attention_mask is not None:
        raise ValueError("this processor is for unmasked self-attention (attn1) only. Leave attn2 as it is.")
    if parallel_config is not None:
        raise ValueError(
            "context parallelism splits the tokens, and SLA needs all of them to choose its blocks. "
            "Call remove_sla() before enable_parallelism()."
        )


@dataclass
class Installation:
    """What `install` put aside, so that `remove` can put it back."""

    processors: list[Any]
    replaced: dict[str, Tensor] = field(default_factory=dict)  # base tensors that SLA weights overwrote, on the CPU


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
    """Put one processor into every `blocks[i].attn1`; cross-attention stays as it is.

    Args:
        transformer: a Wan transformer without SLA in it.
        config: for SLA with a fresh (zero) `proj_l` in each layer; None for timed full attention.
        backend: of SLA, and of the norm and rotation around either attention.
        branches: as in `sparse_linear_attention`.
    Raises: UsageError if SLA is installed already, the model has no such layers, or hooks offload them.
    """
    if installation(transformer) is not None:
        raise UsageError("this transformer has slagen's attention installed already. Call remove_sla(pipe) first.")
    layers = self_attention_layers(transformer)
    refuse_offloaded(transformer, "put in")
    transformer._slagen_installation = Installation([attn.processor for attn in layers])  # type: ignore[assignment]
    for index, attn in enumerate(layers):
        if config is None:
            attn.set_processor(DenseProcessor(index, backend))
            continue
        head_dim = attn.inner_dim // attn.heads
        device = next(attn.parameters()).device
        processor = SLAProcessor(head_dim, config, index, backend=backend, branches=branches, device=device)
        attn.set_processor(processor.train(attn.training))


def remove(transformer: WanTransformer3DModel) -> None:
    """Put the former processors and every overwritten base tensor back. Without an installation, do nothing.

    Raises: UsageError, before anything is changed, where such tensors are offloaded or a LoRA is fused into them.
    """
    record = installation(transformer)
    if record is None:
        return
    if record.replaced:
        refuse_offloaded(transformer, "taken out")
        refuse_fused(transformer, "taken out")
    for attn, processor in zip(self_attention_layers(transformer), record.processors, strict=True):
        attn.set_processor(processor)
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


def attach_recorder(transformer: WanTransformer3DModel, recorder: StepRecorder) -> Callable[[], None]:
    """Have every forward pass and every self-attention noted by a recorder. Returns what detaches it again."""
    for processor in processors(transformer):
        processor.recorder = recorder
    hook = transformer.register_forward_pre_hook(lambda module, args: recorder.begin_pass())

    def detach() -> None:
        hook.remove()
        for processor in processors(transformer):
            processor.recorder = None

    return detach
