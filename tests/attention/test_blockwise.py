"""What attention methods share: the sparse branch with lse and biases, the linear branch over degrees of blocks."""

import pytest
import torch
from numerics import make_qkv

from slagen.attention.sla import blockwise_linear, blockwise_sparse
from slagen.attention.sla.blocks import to_blocks
from slagen.attention.sla.config import SLAConfig

LENGTH, BLOCK, DIM = 75, 16, 8
CONFIG = SLAConfig(0.5, linear_domain="marginal", block_m=BLOCK, block_n=BLOCK)


def blocks_of(*tensors):
    return [to_blocks(x, BLOCK) for x in tensors]


def per_token(x):
    """(1, 1, M, N) -> (1, 1, L, L)."""
    return x.repeat_interleave(BLOCK, 2).repeat_interleave(BLOCK, 3)[:, :, :LENGTH, :LENGTH]


def test_sparse_branch_gives_lse_and_takes_biases(monkeypatch):
    """O^s, lse and every gradient, of a bias for each kept block too, are autograd's on dense scores."""
    monkeypatch.setattr(blockwise_sparse, "CHUNK_BYTES", 1)
    q, k, v, do = (*make_qkv((1, 1, LENGTH, DIM)), make_qkv((1, 1, LENGTH, DIM), seed=2)[0])
    kv_indices = torch.tensor([[0, 2, 4], [0, 1, 2], [1, 3, 4], [2, 3, 4], [0, 3, 4]])[None]
    bias, dlse = make_qkv((1, 1, 5, 3), seed=3)[0][0], make_qkv((1, 1, LENGTH, 1), seed=4)[0]
    q_i, k_j, v_j, do_i, dlse_i = blocks_of(q, k, v, do, dlse)
    o, lse, dk, dv, dbias = (torch.zeros_like(x) for x in (q_i, q_i[..., 0], k_j, v_j, bias))
    blockwise_sparse.sparse_forward(q_i, k_j, v_j, kv_indices, LENGTH, o, lse, bias)
    dq = blockwise_sparse.sparse_backward(q_i, k_j, v_j, kv_indices, LENGTH, do_i, dk, dv, dlse_i[..., 0], bias, dbias)

    leaves = [x.clone().requires_grad_() for x in (q, k, v, bias)]
    biases = torch.full((1, 5, 5), -torch.inf, dtype=torch.float64).scatter(2, kv_indices, leaves[3])
    s = leaves[0] @ leaves[1].mT + per_token(biases[None])
    o_exact, lse_exact = s.softmax(-1) @ leaves[2], s.logsumexp(-1, keepdim=True)
    exact = torch.autograd.grad([o_exact, lse_exact], leaves, [do, dlse])
    for actual, expected in zip((o, lse[..., None], dq, dk, dv), (o_exact, lse_exact, *exact[:3]), strict=True):
        torch.testing.assert_close(actual.flatten(1, 2)[:, :LENGTH], expected[0].detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dbias, exact[3], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("spread", [1.0, 1000.0], ids=["one-product", "each-block"])
def test_linear_branch_takes_degrees(spread, monkeypatch):
    """O^l and every gradient, of the log of each block's degree too, are autograd's on dense weights.

    At a spread of 1000 between features some states vanish beside those of other blocks.
    """
    q, k, v, do = (*make_qkv((1, 1, LENGTH, DIM)), make_qkv((1, 1, LENGTH, DIM), seed=2)[0])
    k[:, :, BLOCK:, 0] -= spread
    q[..., 0] += spread
    logs = torch.nn.functional.logsigmoid(make_qkv((1, 1, 5, 5), seed=3)[0])[0]
    logs[:, :, 0] *= spread
    q_i, k_j, v_j, do_i = blocks_of(q, k, v, do)
    called, mix_each = [], blockwise_linear._mix_each
    monkeypatch.setattr(blockwise_linear, "_mix_each", lambda *x: called.append(1) or mix_each(*x))
    z, means = blockwise_linear.key_states(k_j, v_j, CONFIG, LENGTH)
    dstates, dlogs = means.new_zeros(1, 5, DIM, DIM + 1), torch.empty_like(logs)
    dq, o = blockwise_linear.linear_backward(q_i, z, means, logs, CONFIG, do_i, dstates, dlogs)
    assert bool(called) == (spread == 1000)
    dk, dv = torch.zeros_like(k_j), torch.zeros_like(v_j)
    blockwise_linear.states_backward(k_j, v_j, CONFIG, LENGTH, z, dstates, dk, dv)

    leaves = [x.clone().requires_grad_() for x in (q, k, v, logs)]
    log_w = (leaves[0].log_softmax(-1)[..., :, None, :] + leaves[1].log_softmax(-1)[..., None, :, :]).logsumexp(-1)
    o_exact = (log_w + per_token(leaves[3][None])).softmax(-1) @ leaves[2]
    exact = torch.autograd.grad(o_exact, leaves, do)
    for actual, expected in zip((o, dq, dk, dv), (o_exact, *exact[:3]), strict=True):
        torch.testing.assert_close(actual.flatten(1, 2)[:, :LENGTH], expected[0].detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(dlogs, exact[3], rtol=1e-9, atol=1e-12)
