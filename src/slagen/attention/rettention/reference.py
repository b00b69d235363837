"""Re-ttention as it is defined: dense masks, plain PyTorch, O(L^2) memory.

A token at place i of a frame (its row times the width plus its column) attends, in every frame, to the tokens at places
j with |i - j| <= r: a static window W, whatever q and k are. In a step that is *dense*, with A = softmax(scale q k^T),

    o = A v,     rho_t = sum over W of A_ts,     res = o - o^W,     o^W_t = sum over W of A_ts v_s

so that rho is the share of each row's softmax that its window holds. In the j-th step after it, from 0, with new q, k
and v, and O^W their softmax over the window alone,

    o = min(1, rho + j growth) O^W + res

What the mask leaves out so changes neither the scale of what is in the window nor, but for what changes from step to
step, the sum. rho and res are kept for each layer and for each of the two passes of guidance.

Which steps are dense: those whose number is a multiple of `refresh_steps`, and the first in which nothing is remembered
yet. The first 30 % of the steps run dense throughout and are not remembered (15 of 50, as in the source), unless
`--dense-steps` says otherwise.

Source: Re-ttention, NeurIPS 2025, and its code (CogVideoX, PixArt and Hunyuan-DiT; none for Wan). Our reading of it:

    window   as `generate_sliding_window_attention_mask` has it; the mask that was used, of 3.1 % of all pairs, is made
             by a file that is not public. There are no text tokens here, which it attends to throughout.
    bound    there rho grows without one, beyond 1 too, where the output would be more than a mean of values. Here it
             stops at 1, which leaves a window that holds everything exact.
    res      there after the output projection; before it is the same, for that is linear, and no weights are needed.
"""

import torch
from torch import Tensor

from slagen.attention.protocol import Grid


def _weights(q: Tensor, k: Tensor) -> Tensor:
    return (q @ k.mT * q.shape[3] ** -0.5).softmax(-1)


def window_mask(grid: Grid, reach: int, device: torch.device | None = None) -> Tensor:
    """W, (L, L) bool, of tokens in raster order."""
    place = torch.arange(grid.num_tokens, device=device) % (grid.height * grid.width)
    return (place[:, None] - place).abs() <= reach


def dense_step(q: Tensor, k: Tensor, v: Tensor, grid: Grid, reach: int) -> tuple[Tensor, Tensor, Tensor]:
    """o and res, (B, H, L, D) in q's dtype, and rho, (B, H, L, 1) float32 or float64, of q, k, v (B, H, L, D)."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    weights = _weights(q.to(dtype), k.to(dtype))
    inside = weights * window_mask(grid, reach, q.device)
    o, o_window = weights @ v.to(dtype), inside @ v.to(dtype)
    return o.to(q.dtype), (o - o_window).to(q.dtype), inside.sum(-1, keepdim=True)


def window_step(q: Tensor, k: Tensor, v: Tensor, grid: Grid, reach: int) -> Tensor:
    """O^W, (B, H, L, D) float32 or float64: the softmax over the window alone."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(dtype) @ k.to(dtype).mT * q.shape[3] ** -0.5
    outside = ~window_mask(grid, reach, q.device)
    return scores.masked_fill(outside, -torch.inf).softmax(-1) @ v.to(dtype)
