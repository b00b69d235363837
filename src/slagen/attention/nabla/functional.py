"""`nabla_attention`: checks what it is given, and hands it to a backend."""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor

from slagen.attention.block_sparse import block_sparse_attention
from slagen.attention.cubes import check_tokens
from slagen.attention.nabla.config import Backend, NablaConfig
from slagen.attention.nabla.reference import reference_attention
from slagen.attention.nabla.selection import Patches, kept_patches, patches_of
from slagen.attention.protocol import Grid
from slagen.attention.sla.functional import check_qkv


def nabla_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: NablaConfig,
    grid: Grid | Patches | None,
    *,
    backend: Backend = "auto",
    kept: Tensor | None = None,
) -> Tensor:
    """Attend exactly to the patches of 8 x 8 tokens that hold most of the pooled attention map.

    The maths is written out at the head of `reference.py`. Means, map, softmax and sums run in float32, or float64 for
    float64 input, under autocast too. Gradients reach q, k and v; the choice of patches has none.

    Args:
        q, k, v: (B, H, L, D), one of float16, bfloat16, float32 and float64, any strides, tokens in raster order.
        grid: of the L tokens, or its patches, on q's device.
        backend: "reference" is the definition, with dense masks; "torch", which is "auto", gathers the patches kept, in
            bounded memory.
        kept: (B, H, N, N) bool, the selection where it is made already ("reference" makes its own); None makes it.
    Returns: o, (B, H, L, D) in q's dtype.
    Raises: ValueError if shapes, dtypes, devices or the grid do not fit.
    """
    check_qkv(q, k, v)
    if backend not in get_args(Backend):
        raise ValueError(
            f"backend is {backend!r}, but must be one of {', '.join(get_args(Backend))} for nabla attention. Try auto."
        )
    length, scale = q.shape[2], q.shape[3] ** -0.5
    patches = grid if isinstance(grid, Patches) else patches_of(check_tokens(grid, length), config.reach, q.device)
    if patches.num_tokens != length:
        raise ValueError(
            f"the grid of patches has {patches.num_tokens} tokens, but q has {length}. Give the grid (latent frames, "
            "rows, columns) of the tokens of q."
        )
    with torch.autocast(q.device.type, enabled=False):
        if backend == "reference":
            return reference_attention(q, k, v, config, patches, scale)
        kept = kept_patches(q, k, config, patches, scale) if kept is None else kept
        return block_sparse_attention(q, k, v, kept, scale, patches.order)
