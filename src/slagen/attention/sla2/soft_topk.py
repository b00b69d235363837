"""The soft top-k by which the router of SLA2 is trained."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def soft_topk(x: Tensor, count: int) -> Tensor:
    """x + lambda, with lambda of each row such that the sigmoids of the row sum to `count`.

    With u = m (1 - m) of the sigmoids m, the gradient of lambda by x is -u / sum(u): that is a softmax of log u, so
    it is exact also where every u is 0 in floating point.

    Args: x: (..., N), finite. count: from 1 to N - 1.
    Source: SLA2, arXiv:2602.12675, SoftTop-k; the gradient by the implicit function theorem.
    """
    ranked = x.detach().sort(-1, descending=True).values
    border = ranked[..., count - 1, None]
    x = x - border  # around the border, where the degrees are decided, this is exact
    with torch.no_grad():
        ranked = (ranked - border).double()
        top, others = ranked.split((count, x.shape[-1] - count), -1)
        # At `low` all but the first count - 1 add at most 1; at `high` the first count + 1 add at least count.
        low = torch.full_like(top[..., :1], -math.log(others.shape[-1]))
        high = math.log(count) - others[..., :1]
        for _ in range(64):
            middle = (low + high) / 2  # compare what the top lack to 1 with what the others have: no digits cancel
            below = (others + middle).sigmoid().sum(-1, keepdim=True) < (-top - middle).sigmoid().sum(-1, keepdim=True)
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        shift = high.to(x.dtype)
        logs = x + shift
        shares = (F.logsigmoid(logs) + F.logsigmoid(-logs)).softmax(-1)
    return x + shift - (shares * (x - x.detach())).sum(-1, keepdim=True)
