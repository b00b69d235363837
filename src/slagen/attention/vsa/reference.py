"""Video Sparse Attention as it is defined: dense masks, plain PyTorch, any dtype, any device, O(L^2) memory.

A grid of T x H x W tokens is cut into N cubes of 4 x 4 x 4; those at its far ends hold what is left. With the means
q_n, k_n, v_n over the tokens of cube n, and c(i) the cube of token i:

    A_mn  = softmax over n of scale q_m . k_n                      over all cubes
    fine    O^f_i = sum_j P_ij v_j      P = softmax of scale q_i . k_j over the j whose cube is kept for c(i)
    coarse  O^c_i = sum_n A_c(i)n v_n                              the same for all tokens of a cube
    output  O_i = O^f_i + g_i * O^c_i                              channel by channel

Kept for cube m are its `num_kept(N)` cubes of highest q_m . k_n; of equal ones, those of lower index. No gradient
passes through that choice. The gate g = x W^T + b, with x the hidden states that q, k and v were projected from, is not
bounded; where it is zero, or there is none, O = O^f.

Source: VSA, arXiv:2505.13389; g, the rounding of the number kept, and ragged cubes: github.com/hao-ai-lab/FastVideo,
commit 2f3d407. Where FastVideo rounds means, scores and O^c to the inputs' dtype, float32 is kept here.
"""

import torch
from torch import Tensor

from slagen.attention.cubes import CUBE_TOKENS
from slagen.attention.order import CubeOrder
from slagen.attention.sla.block_map import highest, scores_of_means
from slagen.attention.vsa.config import VSAConfig


def reference_attention(
    q: Tensor, k: Tensor, v: Tensor, config: VSAConfig, cubes: CubeOrder, gate: Tensor | None, scale: float
) -> Tensor:
    """Attend as the head of this file defines it; differentiable by autograd.

    Args:
        q, k, v: (B, H, L, D), any floating dtype, computed in float32 or, for float64, in float64.
        cubes: of the grid of the L tokens, which are in raster order.
        gate: (B, H, L, D), g above; None leaves the coarse branch out.
        scale: factor on q @ k^T before softmax.
    Returns: o (B, H, L, D) in q's dtype.
    """
    out_dtype, dtype = q.dtype, torch.promote_types(q.dtype, torch.float32)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    cube = cubes.slots // CUBE_TOKENS  # (L,)
    kept = highest(cube_scores(q, k, cubes), config.num_kept(len(cubes.counts)))  # (B, H, N, N)
    s = (q @ k.mT * scale).masked_fill(~kept[:, :, cube][..., cube], -torch.inf)
    o = s.softmax(-1) @ v
    if gate is not None:
        o = o + gate.to(dtype) * coarse_attention(q, k, v, cubes, scale)[:, :, cube]
    return o.to(out_dtype)


def cube_scores(q: Tensor, k: Tensor, cubes: CubeOrder) -> Tensor:
    """q_m . k_n of every two cubes: (B, H, L, D) twice -> (B, H, N, N) float32, or float64; nan becomes infinity."""
    return scores_of_means(cubes.means(q.detach()), cubes.means(k.detach()))


def coarse_attention(q: Tensor, k: Tensor, v: Tensor, cubes: CubeOrder, scale: float) -> Tensor:
    """O^c of each cube: (B, H, L, D) -> (B, H, N, D) float32, or float64."""
    q, k, v = (cubes.means(x) for x in (q, k, v))
    return torch.softmax(q @ k.mT * scale, -1) @ v
