"""What a Wan transformer costs in FLOPs, 2 for each multiply-add: full self-attention, and all else. No torch here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a Wan transformer that its cost depends on."""

    num_layers: int
    num_heads: int
    head_dim: int
    ffn_dim: int
    text_tokens: int


def dense_attention_flops(shape: ModelShape, num_tokens: int) -> int:
    """FLOPs of full self-attention in one forward pass of one sample: 4 L^2 D for each head and layer."""
    return 4 * num_tokens**2 * shape.head_dim * shape.num_heads * shape.num_layers


def other_flops(shape: ModelShape, num_tokens: int) -> int:
    """FLOPs of a forward pass but for self-attention's core: linear layers, cross-attention, feed-forward."""
    width = shape.num_heads * shape.head_dim
    self_linears = 8 * num_tokens * width**2
    cross = 4 * num_tokens * shape.text_tokens * width + 4 * (num_tokens + shape.text_tokens) * width**2
    return (self_linears + cross + 4 * num_tokens * width * shape.ffn_dim) * shape.num_layers
