"""Video Sparse Attention block by block: what `reference.py` defines, in memory that grows with L, and with N^2.

The fine branch is the sparse branch of SLA (`attention/sla/blockwise_sparse.py`) over cubes of 64 rows, of which ragged
ones are filled in part; it is one operator for PyTorch, with its gradients. The coarse branch is plain PyTorch: its
sequences are 64 times shorter.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from slagen.attention.cubes import CUBE_TOKENS
from slagen.attention.order import CubeOrder, from_slots, to_slots
from slagen.attention.sla.block_map import highest_indices
from slagen.attention.sla.blocks import head_groups, in_a_run, rows_of_run
from slagen.attention.sla.blockwise_sparse import sparse_backward, sparse_forward
from slagen.attention.vsa.config import VSAConfig
from slagen.attention.vsa.reference import coarse_attention, cube_scores


def blockwise_attention(
    q: Tensor, k: Tensor, v: Tensor, config: VSAConfig, cubes: CubeOrder, gate: Tensor | None, scale: float
) -> Tensor:
    """Attend cube by cube; arguments and result as in `reference_attention`. Differentiable once."""
    topk = config.num_kept(len(cubes.counts))
    filled = cubes.counts if cubes.ragged else None
    o, _ = _forward(q, k, v, cube_scores(q, k, cubes), cubes.slots, filled, topk, scale)
    if gate is None:
        return o
    coarse = coarse_attention(q, k, v, cubes, scale)
    coarse = from_slots(coarse[..., None, :].expand(*coarse.shape[:3], CUBE_TOKENS, -1), cubes.slots)
    return torch.addcmul(o.to(coarse.dtype), gate.to(coarse.dtype), coarse).to(q.dtype)


def _cube_runs(cubes: Tensor) -> Iterator[slice]:
    """Split the cubes (G, N, 64, D) of the queries into runs of about RUN_BYTES."""
    step = in_a_run(4 * cubes[0, 0].numel())
    return (slice(i, i + step) for i in range(0, cubes.shape[1], step))


def _cubes_of(x: Tensor, slots: Tensor, num_cubes: int) -> Tensor:
    """The cubes of some heads, (b, h, L, D) -> (G, N, 64, D), float32 or float64."""
    return to_slots(x.to(torch.promote_types(x.dtype, torch.float32)), slots, num_cubes).flatten(0, 1)


@torch.library.custom_op("slagen::vsa_forward", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, scores: Tensor, slots: Tensor, filled: Tensor | None, topk: int, scale: float
) -> tuple[Tensor, Tensor]:
    """O^f, and the cubes kept, ascending: kv_indices (B, H, N, topk) int64."""
    o, kv_indices, num_cubes = torch.empty_like(q), highest_indices(scores, topk), scores.shape[-1]
    length = num_cubes * CUBE_TOKENS
    with torch.autocast(q.device.type, enabled=False):
        for heads in head_groups(q):
            q_j, k_j, v_j = (_cubes_of(x[heads], slots, num_cubes) for x in (q, k, v))
            for run in _cube_runs(q_j):
                q_i, indices = q_j[:, run] * scale, rows_of_run(kv_indices, heads, run)
                sparse_forward(q_i, k_j, v_j, indices, length, o_i := torch.empty_like(q_i), filled=filled)
                q_j[:, run] = o_i  # these queries are not needed any more
            o[heads] = from_slots(q_j, slots).view(o[heads].shape)
    return o, kv_indices


@_forward.register_fake
def _(q, k, v, scores, slots, filled, topk, scale):
    return torch.empty_like(q), q.new_empty(*scores.shape[:-1], topk, dtype=torch.int64)


@torch.library.custom_op("slagen::vsa_backward", mutates_args=())
def _backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, kv_indices: Tensor, slots: Tensor, filled: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv."""
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    num_cubes, length = kv_indices.shape[2], kv_indices.shape[2] * CUBE_TOKENS
    with torch.autocast(q.device.type, enabled=False):
        for heads in head_groups(q):
            q_j, k_j, v_j, do_j = (_cubes_of(x[heads], slots, num_cubes) for x in (q, k, v, do))
            dk_j, dv_j = torch.zeros_like(k_j), torch.zeros_like(v_j)
            for run in _cube_runs(q_j):
                q_i, do_i, indices = q_j[:, run] * scale, do_j[:, run].contiguous(), rows_of_run(kv_indices, heads, run)
                dq_i = sparse_backward(q_i, k_j, v_j, indices, length, do_i, dk_j, dv_j, filled=filled)
                q_j[:, run] = dq_i.mul_(scale)  # these queries are not needed any more
            for x, of_cubes in ((dq, q_j), (dk, dk_j), (dv, dv_j)):
                x[heads] = from_slots(of_cubes, slots).view(x[heads].shape)
    return dq, dk, dv


@_backward.register_fake
def _(do, q, k, v, *_):
    return tuple(torch.empty_like(x) for x in (q, k, v))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, _, slots, filled, _, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, output[1], slots, filled)
    ctx.mark_non_differentiable(output[1])


def _autograd(ctx: Any, do: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward(do, *ctx.saved_tensors, ctx.scale), *(None,) * 5


_forward.register_autograd(_autograd, setup_context=_setup_context)
