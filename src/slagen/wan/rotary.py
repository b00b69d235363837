"""Wan's norm of q and k and their rotary embedding: one Triton kernel where it can run, PyTorch's lines elsewhere.

The kernel is for inference alone: it has no gradient. Where one is wanted, and under autocast, the lines run.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_wan import WanAttention
from torch import Tensor, nn

from slagen.attention.sla.config import Backend
from slagen.attention.sla.fused import unsupported

Rotary = tuple[Tensor, Tensor]
BlockMeans = tuple[Tensor, Tensor]

_works: dict[tuple[Any, ...], bool] = {}  # device, dtype, heads and their dimension -> what `trial` found


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x (B, L, H, D), pairs interleaved, computed in the tables' float32."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).type_as(x)


def norm_and_rotate(
    attn: WanAttention,
    query: Tensor,
    key: Tensor,
    rotary_emb: Rotary | None,
    backend: Backend,
    blocks: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor, BlockMeans | None]:
    """RMSNorm over all heads, then the rotary embedding.

    Args:
        query, key: (B, L, H * D), as the projections give them.
        rotary_emb: cos and sin, (1, L, 1, D) float32, every angle twice; None turns nothing.
        backend: of the attention; "torch" and "reference" keep to PyTorch's lines, "auto" does so off CUDA.
        blocks: tokens in a block of q and of k whose means are wanted.
    Returns:
        q, k: (B, L, H, D) in their dtype. The kernel rounds once, the lines after each of their two steps.
        means: where the kernel ran and `blocks` is given, those of the blocks of q and k as returned, (B * H, M, D) and
            (B * H, N, D) float32; otherwise None.
    """
    if rotary_emb is not None and fits(attn, query, key, rotary_emb, backend):
        cos, sin = (table[0, :, 0] for table in rotary_emb)
        weights, eps = (attn.norm_q.weight, attn.norm_k.weight), attn.norm_q.eps
        query, key, *means = norm_rotate(query, key, *weights, cos, sin, attn.heads, eps, blocks)
        return query, key, None if blocks is None else (means[0], means[1])
    query, key = (x.unflatten(2, (attn.heads, -1)) for x in (attn.norm_q(query), attn.norm_k(key)))
    if rotary_emb is not None:
        query, key = rotate(query, *rotary_emb), rotate(key, *rotary_emb)
    return query, key, None


def fits(attn: WanAttention, query: Tensor, key: Tensor, rotary_emb: Rotary, backend: Backend) -> bool:
    """Whether the kernel computes the same as the lines here; arguments as in `norm_and_rotate`."""
    if backend not in ("auto", "triton") or (backend == "auto" and not query.is_cuda):
        return False
    norms = (attn.norm_q, attn.norm_k)
    if not all(_is_plain(norm, query) for norm in norms) or norms[0].eps is None or norms[0].eps != norms[1].eps:
        return False
    given = (query, key, norms[0].weight, norms[1].weight)
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in given)
    if wanted or torch.is_autocast_enabled(query.device.type):
        return False
    heads = query.unflatten(2, (attn.heads, -1))
    shape = (1, heads.shape[1], 1, heads.shape[3])
    if any(table.dtype != torch.float32 or table.shape != shape for table in rotary_emb):
        return False
    return unsupported(heads) is None and _is_proven(heads)


def _is_plain(norm: nn.Module, x: Tensor) -> bool:
    """An RMSNorm with a weight beside x and no hook, which would run with `forward` only, as those of offloading do."""
    hooked = "forward" in norm.__dict__ or norm._forward_hooks or norm._forward_pre_hooks
    return type(norm) is nn.RMSNorm and not hooked and norm.weight is not None and norm.weight.device == x.device


def _is_proven(x: Tensor) -> bool:
    """Try the kernel once for each device, dtype and shape of heads like x (B, L, H, D); a fault is reported, once.

    During capture or compilation nothing is tried: what was found before stands.
    """
    key = (x.device, x.dtype, *x.shape[2:])
    if torch.compiler.is_compiling() or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
        return _works.get(key, True)
    if key not in _works:
        fault = trial(x)
        _works[key] = fault is None
        if fault is not None:
            warnings.warn(
                f"the fused norm and rotary-embedding kernel fails on {x.device} ({fault}); using PyTorch instead.",
                stacklevel=2,
            )
    return _works[key]


def trial(x: Tensor) -> str | None:
    """Run the kernel on three random tokens of heads like x (B, L, H, D): what is wrong, or None."""
    from slagen.kernels.failures import LaunchError, launching

    num_heads, head_dim = x.shape[2:]
    make: dict[str, Any] = {"generator": torch.Generator(x.device).manual_seed(0), "device": x.device}
    q, k = (torch.randn(1, 3, num_heads * head_dim, **make).to(x.dtype) for _ in range(2))
    weight = torch.randn(num_heads * head_dim, **make).to(x.dtype)
    angles = torch.randn(3, head_dim // 2, **make).repeat_interleave(2, 1)
    tables = angles.cos(), angles.sin()
    try:
        with launching():
            found = norm_rotate(q, k, weight, weight, *tables, num_heads, 1e-6)[:2]
    except LaunchError as error:
        return error.reason
    for actual, given in zip(found, (q, k), strict=True):
        normed = F.rms_norm(given.double(), weight.shape, weight.double(), 1e-6).unflatten(2, (num_heads, head_dim))
        exact = rotate(normed, *(table.double()[None, :, None] for table in tables))
        # What rounding can cause, with room to spare, as in `attention.sla.fused.trial`.
        if not (actual.double() - exact).abs().max() <= 32 * torch.finfo(x.dtype).eps * exact.abs().max():
            return "the result is wrong"
    return None


@torch.library.custom_op("slagen::norm_rotate", mutates_args=())
def norm_rotate(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    eps: float,
    blocks: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The kernel as one PyTorch operator, for torch.compile and CUDA graphs; as `kernels.rotary.norm_rotate` says."""
    from slagen.kernels import rotary

    sizes = None if blocks is None else (blocks[0], blocks[1])
    with torch.cuda.device_of(q):  # Triton launches on the current device, which need not be q's
        return rotary.norm_rotate(q, k, q_weight, k_weight, cos, sin, num_heads, eps, sizes)


@norm_rotate.register_fake
def _(q, k, q_weight, k_weight, cos, sin, num_heads, eps, blocks=None):
    batch, length, width = q.shape
    head_dim = width // num_heads
    outs = [q.new_empty(batch, length, num_heads, head_dim) for _ in range(2)]
    shapes: list[tuple[int, ...]] = [(0,), (0,)]
    if blocks is not None:
        shapes = [(batch * num_heads, -(-length // block), head_dim) for block in blocks]
    return (*outs, *(q.new_empty(shape, dtype=torch.float32) for shape in shapes))
