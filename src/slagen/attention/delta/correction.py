"""Delta attention in the memory of its exact rows: what `reference.py` defines."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def corrected(o: Tensor, q: Tensor, k: Tensor, v: Tensor, stride: int | None) -> Tensor:
    """Attend the first query row of every `stride` exactly, and add its difference to the rows of its block.

    The exact rows are PyTorch's dense attention; the difference is taken and added in float32, or float64 for float64.
    Differentiable in all tensors.

    Args:
        o: (B, H, L, D), what a sparse method made of q, k and v, each (B, H, L, D).
        stride: query rows in a block; None returns o as it is.
    Returns: (B, H, L, D) in o's dtype.
    """
    if stride is None:
        return o
    stride = min(stride, q.shape[2])  # so that no more rows are made than there are
    exact = F.scaled_dot_product_attention(q[:, :, ::stride], k, v)
    wide = torch.promote_types(o.dtype, torch.float32)
    delta = exact.to(wide) - o[:, :, ::stride].to(wide)
    moved = (o + delta.repeat_interleave(stride, 2)[:, :, : o.shape[2]]).to(o.dtype)
    return moved.slice_scatter(exact.to(o.dtype), 2, step=stride)
