"""The reference of SLA2 against loops over tokens, from the paper's formulas alone."""

import math

import numpy as np
import pytest
import torch
from numerics import make_qkv

from slagen.attention.sla2.config import SLA2Config
from slagen.attention.sla2.functional import sla2_attention


def degrees_of(scores: list[float], count: int, config: SLA2Config, scale: float, soft: bool) -> list[float]:
    """m of one row."""
    if not soft:
        kept = set(sorted(range(len(scores)), key=lambda j: (-scores[j], j))[:count])
        return [float(j in kept) for j in range(len(scores))]
    low, high = -1e4, 1e4
    for _ in range(200):
        shift = (low + high) / 2
        m = [1 / (1 + math.exp(-min(500, max(-500, scale * s / config.router_tau + shift)))) for s in scores]
        low, high = (shift, high) if sum(m) < count else (low, shift)
    return m


def oracle(q, k, v, config: SLA2Config, router_q, router_k, logits, soft: bool):
    """One head; logits: one for each query block."""
    length, dim = q.shape
    scale, k = dim**-0.5, k - k.mean(0) if config.smooth_keys else k
    pieces = [range(i, min(i + config.block_n, length)) for i in range(0, length, config.block_n)]
    count = max(1, math.floor((1 - config.sparsity) * len(pieces) + 1e-6))

    def phi(x):
        return np.exp(x) / np.exp(x).sum()

    o = np.zeros((length, dim))
    for i, start in enumerate(range(0, length, config.block_m)):
        tokens = range(start, min(start + config.block_m, length))
        means = [k[piece].mean(0) for piece in pieces]
        scores = [(router_q @ q[tokens].mean(0)) @ (router_k @ mean) for mean in means]
        m = degrees_of(scores, count, config, scale, soft)
        for t in tokens:
            exact, linear, p_sum, w_sum, estimated = np.zeros(dim), np.zeros(dim), 0.0, 0.0, 0.0
            for j, piece in enumerate(pieces):
                estimated += (1 - m[j]) * len(piece) * math.exp(scale * q[t] @ means[j])
                for s in piece:
                    p, w = m[j] * math.exp(scale * q[t] @ k[s]), (1 - m[j]) * phi(q[t]) @ phi(k[s])
                    exact, p_sum, linear, w_sum = exact + p * v[s], p_sum + p, linear + w * v[s], w_sum + w
            a = p_sum / (p_sum + estimated) if config.mixing == "mass" else 1 / (1 + math.exp(-logits[i]))
            o[t] = a * exact / p_sum + (1 - a) * linear / w_sum
    return o


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("smooth", [False, True], ids=["plain", "smooth"])
@pytest.mark.parametrize("mixing", ["learned", "mass"])
def test_reference_is_the_formulas(mixing, smooth, soft):
    config = SLA2Config(0.6, smooth_keys=smooth, mixing=mixing, mixing_blocks=2, router_tau=0.5, block_m=32, block_n=16)
    q, k, v = make_qkv((1, 1, 61, 4))
    router = [torch.eye(4, dtype=torch.float64) + 0.4 * x[0, 0] for x in make_qkv((1, 1, 4, 4), seed=5)[:2]]
    logit = torch.tensor([[0.7, -0.4]], dtype=torch.float64)
    o = sla2_attention(q, k, v, config, *router, logit, soft=soft, backend="reference")
    expected = oracle(*(x[0, 0].numpy() for x in (q, k, v)), config, *(w.numpy() for w in router), logit[0], soft)
    np.testing.assert_allclose(o[0, 0].numpy(), expected, rtol=1e-9, atol=1e-11)
