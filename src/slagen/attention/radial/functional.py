"""`radial_attention`: checks what it is given, and hands it to a backend."""

from __future__ import annotations

import torch
from torch import Tensor

from slagen.attention import block_sparse
from slagen.attention.block_sparse import block_sparse_attention
from slagen.attention.block_sparse_fused import fused_block_sparse_attention
from slagen.attention.cubes import check_tokens
from slagen.attention.protocol import Grid
from slagen.attention.radial.config import RadialConfig
from slagen.attention.radial.mask import RadialMask, radial_mask
from slagen.attention.sla.config import Backend
from slagen.attention.sla.functional import check_qkv, choose_backend


def radial_attention(
    q: Tensor, k: Tensor, v: Tensor, config: RadialConfig, grid: Grid | RadialMask | None, *, backend: Backend = "auto"
) -> Tensor:
    """Attend exactly to the key blocks that the mask of a grid keeps, and to no other.

    The mask is written out at the head of `mask.py`; what is attended to is one softmax, in float32, or float64 for
    float64 input, under autocast too. Gradients reach q, k and v.

    Args:
        q, k, v: (B, H, L, D), one of float16, bfloat16, float32 and float64, any strides, tokens in raster order.
        grid: of the L tokens, or its mask for this config, on q's device.
        backend: "reference" is the definition, with a dense mask; "torch" gathers the blocks kept, in bounded memory;
            "triton" and "auto" are as in `sparse_linear_attention`.
    Returns: o, (B, H, L, D) in q's dtype.
    Raises: ValueError if shapes, dtypes, devices or the grid do not fit.
    """
    check_qkv(q, k, v)
    chosen, scale = choose_backend(q, backend), q.shape[3] ** -0.5
    mask = grid if isinstance(grid, RadialMask) else radial_mask(config, check_tokens(grid, q.shape[2]), q.device)
    if mask.num_tokens != q.shape[2]:
        raise ValueError(
            f"the grid of the mask has {mask.num_tokens} tokens, but q has {q.shape[2]}. Give the grid (latent frames, "
            "rows, columns) of the tokens of q."
        )
    with torch.autocast(q.device.type, enabled=False):
        if chosen == "reference":
            return block_sparse.reference_attention(q, k, v, kept_tokens(mask, config), scale)
        attend = fused_block_sparse_attention if chosen == "triton" else block_sparse_attention
        return attend(q, k, v, mask.of(q), scale, (config.block_m, config.block_n))


def kept_tokens(mask: RadialMask, config: RadialConfig) -> Tensor:
    """Which keys each query attends to, (L, L) bool."""
    rows = mask.kept.repeat_interleave(config.block_m, 0)[: mask.num_tokens]
    return rows.repeat_interleave(config.block_n, 1)[:, : mask.num_tokens]
