"""The parts of a forward pass of SLA, each to be timed alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from slagen.attention.order import CubeOrder
from slagen.attention.parts import ordered
from slagen.attention.protocol import Attend, Grid
from slagen.attention.ranking import selector_scores
from slagen.attention.sla import blocks, blockwise, blockwise_linear, blockwise_sparse
from slagen.attention.sla.functional import choose_backend
from slagen.attention.sla.module import SparseLinearAttention
from slagen.attention.sla.reference import EPSILON


def stages(
    module: SparseLinearAttention, q: Tensor, k: Tensor, v: Tensor, grid: Grid | CubeOrder | None = None
) -> dict[str, Attend]:
    """Block map, state of the linear branch, projection, and what attends; of both branches. They need not add up to
    the whole: alone, a part finds its inputs where the part before it left them long ago.

    Args:
        q, k, v: (B, H, L, D), which the later parts' inputs are made of.
        grid: of the L tokens, or its cubes, where they are attended in cube order: putting them in order and back is a
            part too.
    """
    own = _triton_stages if choose_backend(q, module.backend) == "triton" else _torch_stages
    parts, q, k, v = ordered(module.config.order, grid, q, k, v)
    return {**parts, **own(module, q, k, v)}


def _triton_stages(module: SparseLinearAttention, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Attend]:
    """The stages of `sla_forward`, each on what the stages before it make of the first inputs.

    `state` holds the pooling of the keys, which shares its pass over them. In the domain "marginal" `state` sums the
    states of each row's blocks too, and the weight is multiplied into them there, so there is no projection.
    """
    from slagen.kernels.forward import attend
    from slagen.kernels.selection import pool, select
    from slagen.kernels.states import combine, key_states, mix, precision, projects, state_dtype

    config, projection = module.config, module.proj_l
    marginal, (length, head_dim) = config.linear_domain == "marginal", q.shape[2:]
    num_columns = config.num_blocks(length)[1]
    topk, num_negligible = config.num_critical(num_columns), config.num_negligible(num_columns)
    weight = projection.weight.to(state_dtype(q)) if marginal and projects(q) else None

    def sums(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return key_states(k, v, config.block_n, config.feature_map, marginal, weight, pool=True)

    def block_map(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        found = selector_scores(config, q, k, None, head_dim**-0.5)
        scores = torch.bmm(pool(q, config.block_m), means.mT) if found is None else found.float().flatten(0, 1)
        return select(scores, topk, num_negligible, classes=marginal)

    def state(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        _, states, zs = sums(k, v)
        if not marginal:
            return states, zs
        mixed, z = mix(states, zs, classes, None, q.dtype, precision(q))
        return mixed if projects(q) else mixed @ projection.weight.to(q.dtype).mT, z

    def project(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return combine(states, zs, projection.weight, length, q.dtype, False)[:2]

    def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        o = torch.empty_like(q)
        attend(
            q, k, v, o, z.new_empty(0), kv_indices, folded, z, projection.bias, block_m=config.block_m,
            block_n=config.block_n, num_critical=topk, linear=True, marginal=marginal,
            feature_map=config.feature_map, eps=EPSILON[config.linear_domain] / (1 if marginal else length),
            scale=head_dim**-0.5, sparse=True,
        )  # fmt: skip
        return o

    means = sums(k, v)[0]
    kv_indices, classes = block_map(q, k, v)
    states, zs = state(q, k, v)
    stages: dict[str, Attend] = {"block_map": block_map, "state": state}
    if not marginal:
        stages["projection"] = project
    folded, z = (states, zs) if marginal else project(q, k, v)
    return {**stages, "fused": fused}


def _torch_stages(module: SparseLinearAttention, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Attend]:
    """As `_triton_stages`; in the domain "marginal" every row is projected, after it has attended."""
    config, projection = module.config, module.proj_l
    length, head_dim = q.shape[2:]

    def block_map(q: Tensor, k: Tensor, v: Tensor) -> tuple[Any, Tensor | None]:
        scores = selector_scores(config, q, k, None, head_dim**-0.5)
        return blockwise.select_blocks(q, k, config, sparse=True, linear=True, scores=scores)

    def states(k: Tensor, v: Tensor) -> Iterator[tuple[tuple[slice, slice], Tensor, Tensor, tuple[Tensor, Tensor]]]:
        for heads in blocks.head_groups(q):
            k_j, v_j = (blocks.to_blocks(x[heads], config.block_n) for x in (k, v))
            yield heads, k_j, v_j, blockwise_linear.key_states(k_j, v_j, config, length)

    def state(q: Tensor, k: Tensor, v: Tensor) -> None:
        for _ in states(k, v):
            pass

    def project(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return projected @ projection.weight.mT

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        o = torch.empty_like(q)
        for heads, k_j, v_j, sums in prepared:
            for run, tokens in blocks.query_runs(q, config.block_m):
                q_i = blocks.to_blocks(q[heads][:, :, tokens], config.block_m)
                o_i = torch.empty_like(q_i)
                indices = blocks.rows_of_run(kv_indices, heads, run)
                blockwise_sparse.sparse_forward(q_i * head_dim**-0.5, k_j, v_j, indices, length, o_i)
                domain_i = None if domain is None else blocks.rows_of_run(domain, heads, run)
                o_i += blockwise_linear.linear_rows(q_i, *sums, domain_i, config)[-1].view(o_i.shape)
                o_i += projection.bias
                blocks.from_blocks(o_i, o[heads][:, :, tokens])
        return o

    prepared = list(states(k, v))
    kv_indices, domain = block_map(q, k, v)
    rows = length if config.linear_domain == "marginal" else head_dim
    projected = torch.randn(*q.shape[:2], rows, head_dim, device=q.device)
    return {"block_map": block_map, "state": state, "projection": project, "fused": attend}
