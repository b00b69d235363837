"""SLA2 as it is defined: dense masks, plain PyTorch, any dtype, any device, O(L^2) memory.

Blocks, S = scale Q K^T, and phi = softmax over the channels of a row are as in `sla/reference.py`. Each query block i
and key block j have a degree m_ij in [0, 1] to which j is kept for i. Per head, with the mean query q'_i and mean key
k'_j of each block:

    router          s_ij = (Wq q'_i) . (Wk k'_j)
    hard top-k      m_ij = 1 for the k blocks of highest s_ij, of equal ones those of lower index; otherwise 0
    soft top-k      m_ij = sigmoid(scale s_ij / tau + lambda_i), lambda_i such that sum_j m_ij = k
    sparse branch   O^s = P V        P = softmax of the rows of S + log m, m repeated over the tokens of its blocks
    linear branch   O^l = W V        w_ij = (1 - m_ij) phi(q_i) . phi(k_j), each row divided by its sum
    output          O = a O^s + (1 - a) O^l

`a` is sigmoid(logit), or by "mass" the share of the kept blocks in the softmax over all keys, where the keys of the
others are taken to be their block's mean, n_j of them:

    a_t = l_t / (l_t + sum_j (1 - m_ij) n_j exp(scale q_t . k'_j))      l_t = sum over the keys of exp(S_tj) m_ij

The gradient of the soft top-k includes that of lambda: with w = m (1 - m) / tau and g the gradient of m, that of
scale s_ij is w_ij (g_ij - sum_j(w g) / sum_j(w)). No gradient passes through the hard top-k.

With `low_bit` "int8" the sparse branch is computed of rounded numbers. [x] is x rounded to 127 steps from 0 to the
largest magnitude of its group: the block, for queries, keys and values; and for weights one row within one key block.

    S = scale [Q] [K]^T + log m      P = softmax of the rows of S      O^s = [P] [V]      l_t = sum of exp(S_tj)

So P is divided by the sum of its unrounded terms, and a row's factor drops out of [P]: it may be rounded before it is
known. Gradients pass straight through the rounding: those of q, k and v are those of the sparse branch without it.

What the paper leaves open, and what is done here:

- Its text has neither scale nor softmax on the router's scores, its algorithm has both. Here the soft top-k takes
  them scaled by D^-0.5 and without softmax; for the hard one neither matters.
- One pair (Wq, Wk), D x D and without bias, for each layer, shared by its heads; both start as the identity, where the
  hard top-k is SLA's choice of blocks.
- k is SLA's count, floor of the kept fraction times N, at least 1.
- For soft degrees the branches are not written out. Here m weighs the terms of the exact softmax, and 1 - m those of
  the linear branch, so that degrees of 0 and 1 are the hard form.
- The mean key is subtracted before phi, as in the paper's algorithm; `smooth_keys=False` leaves it. The exact branch
  and the choice of blocks do not depend on it.
- `a` is a number a row in the text, and a number a query block in the algorithm. Here a logit for each layer and head,
  or for each of `mixing_blocks` along the query blocks, interpolated linearly for another number of these. It starts
  at a = 0.9. "mass" is a number a row and learns nothing.
- Where every block is kept the linear branch has no term. Then O = O^s, which is dense attention, whatever `a` is.
  Where a sum of the linear branch is 0 in floating point, O^l is 0 and passes no gradient.
- It quantises "as SageAttention2++", INT8 or FP8, and says neither of which groups the scales are taken nor how P is
  scaled. Here all is int8, with one scale for each block of Q, K and V. P has the fixed scale 1/127 of SageAttention,
  applied to exp(S - the row's maximum in the key block), so that the result depends on no order of blocks. Keys are
  rounded after their mean is subtracted.
- Its backward pass takes O^s and the log-sum-exp of the rounded forward pass beside unrounded Q, K and V. Here it takes
  those of the unrounded branch, so that it is the gradient of a function.
- Which stages of its training round is not said; here whatever runs with the option does, soft degrees too.

Source: SLA2, arXiv:2602.12675v1, sections 3 to 5 and algorithm 2; "mass" and the soft branches are not in it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from slagen.attention.sla2.config import SLA2Config


def reference_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: SLA2Config,
    router_q: Tensor,
    router_k: Tensor,
    logit: Tensor,
    scale: float,
    soft: bool,
) -> Tensor:
    """Attend as the head of this file defines it; differentiable by autograd.

    Args:
        q, k, v: (B, H, L, D), any floating dtype, computed in float32 or, for float64, in float64.
        router_q, router_k: (D, D), Wq and Wk above.
        logit: (H, mixing_blocks).
        scale: factor on q @ k^T before softmax, and on the router's scores.
        soft: whether blocks are kept by degrees.
    Returns: o (B, H, L, D) in q's dtype.
    """
    out_dtype, dtype, length = q.dtype, torch.promote_types(q.dtype, torch.float32), q.shape[2]
    q, k, v, router_q, router_k, logit = (x.to(dtype) for x in (q, k, v, router_q, router_k, logit))
    if config.smooth_keys:
        k = k - k.mean(2, keepdim=True)
    key_means = _means(k, config.block_n)
    scores = F.linear(_means(q, config.block_m), router_q) @ F.linear(key_means, router_k).mT
    count = config.sla.num_critical(scores.shape[3])
    everything = count == scores.shape[3]
    soft = soft and not everything
    m = _soft_topk(scores * (scale / config.router_tau), count) if soft else _hard_topk(scores, count)
    log_kept, log_rest = (_rows(F.logsigmoid(x), config, length) for x in (m, -m))

    o_sparse, lse = _sparse(q, k, v, _columns(log_kept, config, length), config, scale)
    if everything:
        return o_sparse.to(out_dtype)
    w = q.softmax(-1) @ k.softmax(-1).mT * _columns(log_rest.exp(), config, length)
    denominator = w.sum(-1, keepdim=True)
    empty = denominator == 0
    o_linear = (w @ v / denominator.masked_fill(empty, 1)).masked_fill(empty, 0)

    if config.mixing == "mass":
        counts = q.new_tensor([len(piece) for piece in torch.arange(length).split(config.block_n)])
        estimated = (q @ key_means.mT * scale + counts.log() + log_rest).logsumexp(-1, keepdim=True)
        a = (lse - estimated).sigmoid()
    else:
        size = scores.shape[2]
        a = F.interpolate(logit[None], size, mode="linear") if logit.shape[1] not in (1, size) else logit[None]
        a = a.sigmoid().expand(1, -1, size).repeat_interleave(config.block_m, 2)[:, :, :length, None]
    return (a * o_sparse + (1 - a) * o_linear).to(out_dtype)


def _sparse(
    q: Tensor, k: Tensor, v: Tensor, log_kept: Tensor, config: SLA2Config, scale: float
) -> tuple[Tensor, Tensor]:
    """O^s (B, H, L, D) and log l (B, H, L, 1), rounded or not; log_kept (B, H, L, L)."""
    s = q @ k.mT * scale + log_kept
    found = s.softmax(-1) @ v, s.logsumexp(-1, keepdim=True)
    if config.low_bit == "none":
        return found
    with torch.no_grad():
        q, k, v = (_rounded(x, block) for x, block in ((q, config.block_m), (k, config.block_n), (v, config.block_n)))
        s = q @ k.mT * scale + log_kept
        p = [_in_steps(piece, piece.amax(-1, keepdim=True)) for piece in s.softmax(-1).split(config.block_n, -1)]
        rounded = torch.cat(p, -1) @ v, s.logsumexp(-1, keepdim=True)
    o, lse = (x + (r - x).detach() for x, r in zip(found, rounded, strict=True))
    return o, lse


def _rounded(x: Tensor, block: int) -> Tensor:
    """[x] above of blocks of tokens, (..., L, D)."""
    return torch.cat([_in_steps(piece, piece.abs().amax((-2, -1), keepdim=True)) for piece in x.split(block, -2)], -2)


def _in_steps(x: Tensor, largest: Tensor) -> Tensor:
    step = largest / 127
    step = step.masked_fill(step == 0, 1)
    return (x / step).round() * step


def _means(x: Tensor, block: int) -> Tensor:
    """Mean over the tokens of each block: (..., L, D) -> (..., ceil(L / block), D)."""
    return torch.stack([piece.mean(-2) for piece in x.split(block, -2)], -2)


def _hard_topk(scores: Tensor, count: int) -> Tensor:
    """inf for the `count` highest scores of each row, of equal ones those of lower index; -inf for the others."""
    kept = scores.argsort(dim=-1, descending=True, stable=True)[..., :count]
    return torch.full_like(scores, -torch.inf).scatter(-1, kept, torch.inf)


def _soft_topk(x: Tensor, count: int) -> Tensor:
    """x + lambda, whose sigmoids sum to `count` in each row; one differentiable Newton step after the bisection."""
    low, high = -x.detach().amax(-1, keepdim=True) - 60, -x.detach().amin(-1, keepdim=True) + 60
    for _ in range(100):
        middle = (low + high) / 2
        below = (x.detach() + middle).sigmoid().sum(-1, keepdim=True) < count
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    m = (x + high).sigmoid()
    slope = (m * (1 - m)).sum(-1, keepdim=True).detach()
    step = (m.sum(-1, keepdim=True) - count) / slope.masked_fill(slope == 0, 1)
    return x + high - step


def _rows(x: Tensor, config: SLA2Config, length: int) -> Tensor:
    return x.repeat_interleave(config.block_m, 2)[:, :, :length]


def _columns(x: Tensor, config: SLA2Config, length: int) -> Tensor:
    return x.repeat_interleave(config.block_n, 3)[..., :length]
