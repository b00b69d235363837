"""One clip's tokens over several processes (Ulysses): split along the sequence, by heads within self-attention.

Each process computes its share of the tokens; within self-attention the shares are exchanged so that it sees all tokens
of its share of the heads, and blocks are chosen as if there were one process.

Source: DeepSpeed-Ulysses, arXiv:2309.14509.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from diffusers import WanTransformer3DModel
from torch import Tensor

from slagen.errors import UsageError


class _Exchange(torch.autograd.Function):
    """(B, H, L / P, D) of all heads to (B, H / P, L, D) of all tokens, or back; each is the other's gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, to_heads: bool) -> Tensor:
        ctx.group, ctx.to_heads = group, to_heads
        parts = dist.get_world_size(group)
        split, join = (1, 2) if to_heads else (2, 1)
        sent = torch.stack(x.chunk(parts, split)).contiguous()
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=group)
        return torch.cat(received.unbind(), join)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _Exchange.apply(grads[0], ctx.group, not ctx.to_heads), None, None


class _Gather(torch.autograd.Function):
    """Every process's tokens, (B, L / P, E) to (B, L, E). All go on alike, so a gradient's own part is all of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        pieces = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        dist.all_gather(pieces, x.contiguous(), group=group)
        return torch.cat(pieces, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _own(grads[0], ctx.group), None


def _own(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    return x.chunk(dist.get_world_size(group), 1)[dist.get_rank(group)]


def to_heads(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(B, H, L / P, D), this process's tokens, to (B, H / P, L, D), its heads."""
    return _Exchange.apply(x, group, True)  # type: ignore[no-any-return]


def to_tokens(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The other way round."""
    return _Exchange.apply(x, group, False)  # type: ignore[no-any-return]


def split_tokens(transformer: WanTransformer3DModel, group: dist.ProcessGroup) -> None:
    """Have a transformer with slagen's processors in it share every clip's tokens with a group of processes.

    All of them must call it on the same inputs. Each then has the gradients of its own tokens, to be summed.

    Raises: UsageError where the heads do not divide, or the attention method needs all of them; the first forward pass
        does where the tokens do not divide.
    """
    for block in transformer.blocks:
        block.attn1.processor.method.check_context_parallel()
    parts, heads = dist.get_world_size(group), transformer.config.num_attention_heads
    if heads % parts:
        raise UsageError(f"context_parallel is {parts}, but must evenly divide the model's {heads} attention heads.")

    def split_rope(module: Any, args: Any, tables: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        if tables[0].shape[1] % parts:
            raise UsageError(
                f"a clip has {tables[0].shape[1]} tokens, which cannot be divided evenly among {parts} processes."
            )
        return tuple(_own(table, group) for table in tables)

    def split_hidden(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (_own(args[0], group), *args[1:])

    def gather(module: Any, args: Any, output: Tensor) -> Tensor:
        return _Gather.apply(output, group)  # type: ignore[no-any-return]

    transformer.rope.register_forward_hook(split_rope)
    transformer.blocks[0].register_forward_pre_hook(split_hidden)
    transformer.proj_out.register_forward_hook(gather)
    for block in transformer.blocks:
        processor = block.attn1.processor
        processor.token_group = group
        if getattr(processor, "seeds", None) is not None:  # of the heads, of which this process has its share
            processor.seeds = processor.seeds.chunk(parts)[dist.get_rank(group)]
