"""The method `nabla`: exact attention to the patches that hold most of a pooled attention map. No torch here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, get_args

from slagen.attention.cubes import CUBE_TOKENS, PATCH, num_cubes
from slagen.attention.nabla import config as settings
from slagen.attention.nabla.config import NablaConfig
from slagen.attention.nabla.cost import density_bound, keeps_all, nabla_flops, tile_share
from slagen.attention.protocol import Backend, Grid, Inputs, Layer, Method, Needs

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


def _build(config: NablaConfig, layer: Layer, backend: str, device: torch.device | str | None) -> nn.Module:
    from slagen.attention.nabla.layer import Nabla

    return Nabla(config, backend, device)  # type: ignore[arg-type]


def _reference(
    config: NablaConfig, q: Tensor, k: Tensor, v: Tensor, parameters: Mapping[str, Tensor], inputs: Inputs | None
) -> Tensor:
    from slagen.attention.nabla.functional import nabla_attention

    return nabla_attention(q, k, v, config, None if inputs is None else inputs.context.grid, backend="reference")


def _choose_backend(name: str, head_dim: int, device: torch.device, dtype: torch.dtype, config: NablaConfig) -> str:
    return "torch" if name == "auto" else name


def _describe(config: NablaConfig, grid: Grid) -> dict[str, Any]:
    patches = num_cubes(grid, PATCH)
    return {
        **dataclasses.asdict(config), "block_m": CUBE_TOKENS, "block_n": CUBE_TOKENS, "query_blocks": patches,
        "key_blocks": patches, "density_bound": density_bound(config, grid),
    }  # fmt: skip


def _note(config: NablaConfig, options: Mapping[str, Any], grid: Grid) -> str:
    near = f", plus the sliding tile {config.sliding_tile} ({tile_share(config, grid):.0%})" if config.reach else ""
    return (
        f"top-p {config.top_p:g} over {num_cubes(grid, PATCH)} patches of 8x8 tokens{near} -> at most about "
        f"{density_bound(config, grid):.0%} of all query-key pairs (the report has the measured fraction)"
    )


NABLA = Method(
    name="nabla",
    summary="exact attention to the patches of 8x8 tokens that receive most of the pooled attention (NABLA)",
    config=NablaConfig,
    needs=Needs(context=True),
    cost=nabla_flops,
    build=_build,
    reference=_reference,
    backends=tuple(map(Backend, get_args(settings.Backend))),
    choose_backend=_choose_backend,
    parts=lambda module, *tensors: module.parts(*tensors),
    describe=_describe,
    applies=lambda config, grid: not keeps_all(config, grid),
    density=density_bound,
    note=_note,
    benched=False,
)
