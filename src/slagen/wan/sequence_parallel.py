"""One clip's tokens over several processes (Ulysses): split along the sequence, by heads within self-attention.

Each process computes its share of the tokens; within self-attention the shares are exchanged so that it sees all tokens
of its share of the heads, and blocks are chosen as if there were one process.

Source: DeepSpeed-Ulysses, arXiv:2309.14509.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from torch import Tensor

from slagen.errors import UsageError
from slagen.timing import StepRecorder, communicating


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
        return grads[0].chunk(dist.get_world_size(ctx.group), 1)[dist.get_rank(ctx.group)], None


@dataclass
class TokenGroup:
    """The processes that share a clip's tokens, of which this is one.

    Args:
        group: the process group. num_tokens: L, of the clip whose forward pass runs. Where it is no multiple of P, the
            last shares are filled up with zeros, which no attention sees and no output has.
    """

    group: dist.ProcessGroup
    num_tokens: int = 0

    @property
    def size(self) -> int:
        """P, the number of processes."""
        return dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        """Of this process, from 0."""
        return dist.get_rank(self.group)

    def own(self, x: Tensor) -> Tensor:
        """Of all tokens, (B, L, ...), this process's share."""
        return self._filled(x, 1).chunk(self.size, 1)[self.rank]

    def all(self, x: Tensor) -> Tensor:
        """The other way round."""
        gathered: Tensor = _Gather.apply(x, self.group)
        return gathered[:, : self.num_tokens]

    def to_heads(self, x: Tensor) -> Tensor:
        """(B, H, L / P, D), this process's share of the tokens, to (B, H / P, L, D), its heads."""
        exchanged: Tensor = _Exchange.apply(x, self.group, True)
        return exchanged[:, :, : self.num_tokens]

    def to_tokens(self, x: Tensor) -> Tensor:
        """The other way round."""
        return _Exchange.apply(self._filled(x, 2), self.group, False)  # type: ignore[no-any-return]

    def _filled(self, x: Tensor, dim: int) -> Tensor:
        lacking = -x.shape[dim] % self.size
        return F.pad(x, (0, 0) * (x.ndim - 1 - dim) + (0, lacking)) if lacking else x


def split_tokens(transformer: WanTransformer3DModel, group: dist.ProcessGroup) -> None:
    """Have a transformer with slagen's processors in it share every clip's tokens with a group of processes.

    All of them must call it on the same inputs. Each then has the gradients of its own tokens, to be summed.

    Raises: UsageError where the heads do not divide, or the attention method needs all of them.
    """
    for block in transformer.blocks:
        block.attn1.processor.method.check_context_parallel()
    tokens, heads = TokenGroup(group), transformer.config.num_attention_heads
    if heads % tokens.size:
        raise UsageError(
            f"context_parallel is {tokens.size}, but must evenly divide the model's {heads} attention heads."
        )

    def split_rope(module: Any, args: Any, tables: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        tokens.num_tokens = tables[0].shape[1]
        return tuple(tokens.own(table) for table in tables)

    def split_hidden(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (tokens.own(args[0]), *args[1:])

    def gather(module: Any, args: Any, output: Tensor) -> Tensor:
        with communicating(recorder_of(transformer)):
            return tokens.all(output)

    transformer.rope.register_forward_hook(split_rope)
    transformer.blocks[0].register_forward_pre_hook(split_hidden)
    transformer.proj_out.register_forward_hook(gather)
    for block in transformer.blocks:
        processor = block.attn1.processor
        processor.token_group = tokens
        if getattr(processor, "seeds", None) is not None:  # of the heads, of which this process has its share
            processor.seeds = processor.seeds.chunk(tokens.size)[tokens.rank]


def recorder_of(transformer: WanTransformer3DModel) -> StepRecorder | None:
    """What notes the times of a transformer with slagen's processors in it, if anything does."""
    return transformer.blocks[0].attn1.processor.recorder  # type: ignore[no-any-return, union-attr]
