"""NABLA as it is defined: dense masks, plain PyTorch, any dtype, any device, O(L^2) memory.

The frames of a grid of T x H x W tokens are cut into patches of 8 x 8; those at the far ends of a frame hold what is
left. With the means q_m, k_n over the tokens of patches m and n, n_n tokens in patch n, and p(i) the patch of token i:

    A_mn = softmax over n of scale q_m . k_n + log n_n                      the pooled map
    O_i  = sum_j P_ij v_j      P = softmax of scale q_i . k_j over the j whose patch is kept for p(i)

`selection.py` says which patches are kept. Where all patches are whole, log n_n is the same for all and changes
nothing, as in the source, which takes no other frames; a partial patch counts here for as many tokens as it has.

Source: NABLA, arXiv:2507.13546; the sum, the sliding tile and its ends: github.com/gen-ai-team/Wan2.1-NABLA, commit
d5c50a8, whose `thr` is top_p: 0.4 with a tile of 11 x 3 x 3, the defaults here.
"""

import torch
from torch import Tensor

from slagen.attention import block_sparse
from slagen.attention.cubes import CUBE_TOKENS
from slagen.attention.nabla.config import NablaConfig
from slagen.attention.nabla.selection import Patches, kept_patches


def reference_attention(q: Tensor, k: Tensor, v: Tensor, config: NablaConfig, patches: Patches, scale: float) -> Tensor:
    """Attend as the head of this file defines it; differentiable by autograd.

    Args:
        q, k, v: (B, H, L, D), any floating dtype, computed in float32 or, for float64, in float64.
        patches: of the grid of the L tokens, which are in raster order.
        scale: factor on q @ k^T before softmax.
    Returns: o (B, H, L, D) in q's dtype.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    kept, patch = kept_patches(q.to(dtype), k.to(dtype), config, patches, scale), patches.order.slots // CUBE_TOKENS
    return block_sparse.reference_attention(q, k, v, kept[:, :, patch][..., patch], scale)
