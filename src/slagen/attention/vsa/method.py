"""The method `vsa`: Video Sparse Attention. No torch here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, get_args

from slagen.attention.cubes import CUBE_TOKENS, num_cubes
from slagen.attention.protocol import Backend, Grid, Inputs, Layer, Method, Needs, ParameterGroup
from slagen.attention.vsa import config as settings
from slagen.attention.vsa.config import VSAConfig
from slagen.attention.vsa.cost import vsa_flops

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


def _build(config: VSAConfig, layer: Layer, backend: str, device: torch.device | str | None) -> nn.Module:
    from slagen.attention.vsa.layer import VSA

    return VSA(config, layer, backend, device)


def _reference(
    config: VSAConfig, q: Tensor, k: Tensor, v: Tensor, parameters: Mapping[str, Tensor], inputs: Inputs | None
) -> Tensor:
    from torch.nn.functional import linear

    from slagen.attention.cubes import check_tokens
    from slagen.attention.vsa.functional import video_sparse_attention

    grid = check_tokens(None if inputs is None else inputs.context.grid, q.shape[2])
    gate = None
    if config.gate:
        assert inputs is not None and inputs.hidden_states is not None
        weight, bias = (parameters[f"to_gate_compress.{name}"].to(q.dtype) for name in ("weight", "bias"))
        gate = linear(inputs.hidden_states.to(q.dtype), weight, bias).unflatten(2, (q.shape[1], -1)).transpose(1, 2)
    return video_sparse_attention(q, k, v, config, grid, gate, backend="reference")


def _choose_backend(name: str, head_dim: int, device: torch.device, dtype: torch.dtype, config: VSAConfig) -> str:
    return "torch" if name == "auto" else name


def _describe(config: VSAConfig, grid: Grid) -> dict[str, Any]:
    cubes = num_cubes(grid)
    kept = config.num_kept(cubes)
    coarse, unseen = (cubes - kept, 0) if config.gate else (0, cubes - kept)
    counts = {"critical": kept, "marginal": coarse, "negligible": unseen}  # as SLA's report calls them
    return {
        "sparsity": config.sparsity, "gate": config.gate, "block_m": CUBE_TOKENS, "block_n": CUBE_TOKENS,
        "query_blocks": cubes, "key_blocks": cubes, **counts,
        "fractions": {name: count / cubes for name, count in counts.items()},
    }  # fmt: skip


def _note(config: VSAConfig, options: Mapping[str, Any], grid: Grid) -> str:
    cubes = num_cubes(grid)
    branch = "with a gated coarse branch" if config.gate else "no coarse branch because the weights have no gate"
    kept = f"sparsity {config.sparsity:g} -> {config.num_kept(cubes)} of {cubes} key cubes per query cube"
    return f"{kept}, {branch}"


VSA = Method(
    name="vsa",
    summary=(
        "Video Sparse Attention (VSA): exact attention to the highest-scoring cubes of 4x4x4 tokens, plus a gated "
        "coarse branch"
    ),
    config=VSAConfig,
    needs=Needs(context=True, hidden_states=True),
    cost=vsa_flops,
    build=_build,
    reference=_reference,
    backends=tuple(map(Backend, get_args(settings.Backend))),
    choose_backend=_choose_backend,
    parameters=(ParameterGroup("to_gate_compress"),),
    in_training=lambda config: dataclasses.replace(config, gate=True),
    parts=lambda module, *tensors: module.parts(*tensors),
    describe=_describe,
    applies=lambda config, grid: config.gate or num_cubes(grid) >= 2,
    density=lambda config, grid: config.num_kept(num_cubes(grid)) / num_cubes(grid),
    note=_note,
)
