"""The methods `mean` and `sol`: exact attention to selected blocks, and the mean of every other one. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from slagen.attention.cost import ModelShape
from slagen.attention.cubes import note_of_order
from slagen.attention.mean.config import BlockMeanConfig, MeanConfig, SolConfig
from slagen.attention.mean.cost import block_mean_flops, density, expected_share
from slagen.attention.protocol import Grid, Inputs, Layer, Method
from slagen.attention.selectors import note_of_selector
from slagen.attention.sla.method import BACKENDS, choose_backend
from slagen.settings import to_fields

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


def _cost(config: BlockMeanConfig, shape: ModelShape, grid: Grid) -> int:
    return block_mean_flops(config, shape, grid.num_tokens)


def _build(config: MeanConfig | SolConfig, layer: Layer, backend: str, device: torch.device | str | None) -> nn.Module:
    from slagen.attention.mean.layer import BlockMeanAttention

    return BlockMeanAttention(config, backend, device, layer)  # type: ignore[arg-type]


def _reference(
    config: MeanConfig | SolConfig, q: Tensor, k: Tensor, v: Tensor, parameters: Mapping[str, Tensor],
    inputs: Inputs | None,
) -> Tensor:  # fmt: skip
    from slagen.attention.mean.functional import block_mean_attention
    from slagen.attention.ranking import seeds_of

    grid = None if inputs is None else inputs.context.grid
    return block_mean_attention(q, k, v, config, backend="reference", grid=grid, seeds=seeds_of(inputs, q))


def _check(
    backend: str, head_dim: int, device: torch.device, dtype: torch.dtype, config: MeanConfig | SolConfig
) -> None:
    from slagen.attention.mean.fused import check_kernels

    if backend == "triton":
        check_kernels(head_dim, device, dtype, config)


def _describe(config: BlockMeanConfig, grid: Grid) -> dict[str, Any]:
    rows, columns = config.num_blocks(grid.num_tokens)
    counts = {"query_blocks": rows, "key_blocks": columns}
    if isinstance(config, MeanConfig):
        counts["kept"] = config.num_kept(columns)
    return {**to_fields(config), **counts, "expected_density": density(config, grid.num_tokens)}


def _applies(config: BlockMeanConfig, grid: Grid) -> bool:
    rows, columns = config.num_blocks(grid.num_tokens)
    if isinstance(config, SolConfig):
        return any(len(config.forced(i, grid.num_tokens)) < columns for i in (0, rows - 1))
    return columns >= 2


def _density(config: BlockMeanConfig, grid: Grid) -> float:
    return density(config, grid.num_tokens)


def _mean_note(config: MeanConfig, options: Mapping[str, Any], grid: Grid) -> str:
    columns = config.num_blocks(grid.num_tokens)[1]
    kept = f"sparsity {config.sparsity:g} -> {config.num_kept(columns)} of {columns} key blocks per query block"
    return kept + note_of_selector(config.selector) + note_of_order(config.order)


def _sol_note(config: SolConfig, options: Mapping[str, Any], grid: Grid) -> str:
    whole = density(config, grid.num_tokens)
    return (
        f"tau {config.tau:g} -> about {expected_share(config.tau):.0%} of key blocks, or {whole:.0%} including those "
        f"around each query block (estimates; the report has the measured fraction){note_of_order(config.order)}"
    )


_COMMON: dict[str, Any] = {
    "cost": _cost,
    "build": _build,
    "reference": _reference,
    "backends": BACKENDS,
    "choose_backend": choose_backend,
    "check": _check,
    "parts": lambda module, *tensors: module.parts(*tensors),
    "describe": _describe,
    "applies": _applies,
    "density": _density,
    "benched": False,
}
MEAN = Method(
    name="mean",
    summary="exact attention to the highest-scoring key blocks, block means for the rest",
    config=MeanConfig,
    note=_mean_note,
    **_COMMON,
)
SOL = Method(
    name="sol",
    summary="exact attention to key blocks that score above a threshold, block means for the rest (Sol-Attn)",
    config=SolConfig,
    note=_sol_note,
    **_COMMON,
)
