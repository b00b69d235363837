"""Sparse-linear attention as it is defined: dense masks, plain PyTorch, any dtype, any device, O(L^2) memory.

Queries are split into M blocks of `block_m` rows, keys and values into N blocks of `block_n` rows; the last of each may
be partial. Per head, `block_map` makes every pair of blocks critical, marginal or negligible. With S = scale Q K^T,
phi >= 0 the feature map, applied to each row, and the sums over tokens:

    sparse branch   O^s_i = sum_j P_ij v_j                    P = softmax of row i of S, over the critical j only
    linear branch   O^l_i = sum_j w_ij v_j / (sum_j w_ij + e)     w_ij = phi(q_i) . phi(k_j), over the j of the domain
    output          O = O^s + O^l W^T + b

The domain "all" is every token, with e = 1e-5: the released code, and the weights made with it. The domain "marginal"
is the tokens of marginal blocks, with e = 0: the paper. Where its denominator is 0, because no block is marginal or
because phi = relu cuts every product off, O^l is 0 and passes no gradient; b is added all the same.
The linear branch costs O(L D^2) because sum_j (phi(q_i) . phi(k_j)) v_j = phi(q_i) H with H = sum_j phi(k_j)^T v_j, one
(D, D) matrix per block of keys. This file does not use that, so that it can judge the files that do.

Source: SLA, arXiv:2509.24006, equations 3 to 7; domain "all", eps, W and b: github.com/thu-ml/SLA, commit d973e55.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from slagen.attention.sla.block_map import CRITICAL, MARGINAL, block_map, block_scores
from slagen.attention.sla.config import FeatureMap, SLAConfig

EPSILON = {"all": 1e-5, "marginal": 0.0}


def reference_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: SLAConfig,
    proj_weight: Tensor | None,
    proj_bias: Tensor | None,
    scale: float,
    sparse: bool,
    scores: Tensor | None = None,
) -> Tensor:
    """Attend as the head of this file defines it; differentiable by autograd.

    Args:
        q, k, v: (B, H, L, D), any floating dtype, computed in float32 or, for float64, in float64.
        proj_weight: (D, D), W above; None leaves the linear branch out.
        proj_bias: (D,), b above, or None.
        scale: factor on q @ k^T before softmax.
        sparse: False leaves the sparse branch out.
        scores: (B, H, M, N), by which blocks are ranked; None takes `block_scores`.
    Returns: o (B, H, L, D) in q's dtype.
    """
    scores = block_scores(q, k, config) if scores is None else scores
    classes = _per_token(block_map(scores, config), config, q.shape[2])  # (B, H, L, L)
    out_dtype, dtype = q.dtype, torch.promote_types(q.dtype, torch.float32)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)

    o = torch.zeros_like(q)
    if sparse:
        s = (q @ k.mT * scale).masked_fill(classes != CRITICAL, -torch.inf)
        o = o + s.softmax(-1) @ v
    if proj_weight is not None:
        w = feature_map(q, config.feature_map) @ feature_map(k, config.feature_map).mT
        if config.linear_domain == "marginal":
            w = w.masked_fill(classes != MARGINAL, 0)
        denominator = w.sum(-1, keepdim=True) + EPSILON[config.linear_domain]
        empty = denominator == 0
        o_linear = (w @ v / denominator.masked_fill(empty, 1)).masked_fill(empty, 0)
        o = o + F.linear(o_linear, proj_weight.to(dtype), None if proj_bias is None else proj_bias.to(dtype))
    return o.to(out_dtype)


def feature_map(x: Tensor, name: FeatureMap) -> Tensor:
    """phi, which makes every row non-negative."""
    if name == "softmax":
        return x.softmax(-1)
    if name == "elu":  # elu + 1, without the digits that adding 1 to nearly -1 would lose
        return torch.where(x < 0, x.clamp(max=0).exp(), x + 1)
    return x.relu()


def _per_token(classes: Tensor, config: SLAConfig, length: int) -> Tensor:
    """Repeat the class of each block over its tokens: (B, H, M, N) -> (B, H, L, L)."""
    rows = classes.repeat_interleave(config.block_m, dim=2)[:, :, :length]
    return rows.repeat_interleave(config.block_n, dim=3)[..., :length]
