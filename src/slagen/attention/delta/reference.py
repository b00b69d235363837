"""Delta attention as it is defined: plain PyTorch, O(L^2) memory.

The L query rows are divided into blocks of N rows in the order of the sequence, the last of which may be shorter. With
A_t row t of dense attention, S_t that of a sparse method, and r(t) = N floor(t / N) the first row of t's block:

    o_t = S_t + A_r(t) - S_r(t)

So the first row of each block is exact, and with N = 1 this is dense attention. Which row of a block is computed the
source does not bind; the first is what it describes, every N-th query.

Source: Delta Attention, arXiv:2505.11254 (there of language models, with causal attention).
"""

import torch
from torch import Tensor


def reference_correction(o: Tensor, q: Tensor, k: Tensor, v: Tensor, stride: int) -> Tensor:
    """Correct a sparse output as the head of this file defines it; differentiable by autograd.

    Args:
        o: (B, H, L, D), what the sparse method made of q, k and v. q, k, v: (B, H, L, D), any floating dtype.
        stride: N, from 1.
    Returns: (B, H, L, D) in q's dtype; computed in float32, or float64 for float64.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    wide = o.to(dtype)
    weights = (q.to(dtype) @ k.to(dtype).mT * q.shape[3] ** -0.5).softmax(-1)
    first = torch.arange(q.shape[2], device=q.device) // stride * stride
    return (wide + (weights @ v.to(dtype) - wide)[:, :, first]).to(q.dtype)
