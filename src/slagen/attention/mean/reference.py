"""Attention with block means as it is defined: one softmax over tokens and means, plain PyTorch, O(L^2) memory.

Queries are split into M blocks of `block_m` rows, keys and values into N blocks of `block_n` rows, the last of each
may be partial. Key block j has n_j tokens, mean key c_j and mean value u_j. `selection.py` says which key blocks a
query block keeps. With S = scale Q K^T, query t gives weight exp(S_ts) to each token s of a kept block, and
m_tj = n_j exp(scale q_t . c_j) to each rejected block j:

    o_t = (sum_s exp(S_ts) v_s + sum_j m_tj u_j) / (sum_s exp(S_ts) + sum_j m_tj)

So a rejected block counts as n_j copies of its mean key with its mean value. Where the keys of a block are equal, that
is exact whatever the values are; where all blocks are kept, this is dense attention. This file makes the weights of
tokens and means one matrix, and the means a product with a matrix of 1 / n_j, so that it can judge the other files.

Source: Sol-Attn, arXiv:2607.24027 (there the values of a block are summed, which is n_j u_j).
"""

import torch
from torch import Tensor

from slagen.attention.mean.config import MeanConfig, SolConfig
from slagen.attention.mean.selection import kept_blocks


def reference_attention(
    q: Tensor, k: Tensor, v: Tensor, config: MeanConfig | SolConfig, scale: float, seeds: Tensor | None = None
) -> Tensor:
    """Attend as the head of this file defines it; differentiable by autograd.

    Args:
        q, k, v: (B, H, L, D), any floating dtype, computed in float32 or, for float64, in float64.
        scale: factor on q @ k^T before softmax. seeds: as in `kept_blocks`.
    Returns: o (B, H, L, D) in q's dtype.
    """
    length, kept = q.shape[2], kept_blocks(q, k, config, seeds, scale)
    out_dtype, dtype = q.dtype, torch.promote_types(q.dtype, torch.float32)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)

    kept = kept.repeat_interleave(config.block_m, dim=2)[:, :, :length]  # (B, H, L, N)
    block_of = torch.arange(length, device=q.device) // config.block_n
    members = (block_of == torch.arange(kept.shape[3], device=q.device)[:, None]).to(dtype)  # (N, L)
    counts = members.sum(1)
    means = members / counts[:, None]

    tokens = (q @ k.mT * scale).masked_fill(~kept[..., block_of], -torch.inf)  # (B, H, L, L)
    rejected = (q @ (means @ k).mT * scale + counts.log()).masked_fill(kept, -torch.inf)  # (B, H, L, N)
    weights = torch.cat([tokens, rejected], -1).softmax(-1)
    return (weights @ torch.cat([v, means @ v], 2)).to(out_dtype)
