"""The method `sla2`. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from slagen.attention.cost import ModelShape
from slagen.attention.cubes import note_of_order
from slagen.attention.protocol import Grid, Inputs, Layer, Method, Needs, ParameterGroup
from slagen.attention.sla.cost import block_counts, density, describe_blocks
from slagen.attention.sla.method import BACKENDS, choose_backend
from slagen.attention.sla2.config import COARSE, SLA2Config
from slagen.attention.sla2.cost import sla2_attention_flops
from slagen.errors import EnvironmentProblem
from slagen.settings import to_fields

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


def _build(config: SLA2Config, layer: Layer, backend: str, device: torch.device | str | None) -> nn.Module:
    from slagen.attention.sla2.layer import SLA2

    return SLA2(layer.head_dim, layer.num_heads, config, backend=backend, device=device)  # type: ignore[arg-type]


def _cost(config: SLA2Config, shape: ModelShape, grid: Grid) -> int:
    return sla2_attention_flops(config, shape, grid.num_tokens)


def _reference(
    config: SLA2Config, q: Tensor, k: Tensor, v: Tensor, parameters: Mapping[str, Tensor], inputs: Inputs | None
) -> Tensor:
    from slagen.attention.sla2.functional import sla2_attention

    weights = (parameters[name].to(q.device) for name in ("router_q.weight", "router_k.weight", "mix.logit"))
    grid = None if inputs is None else inputs.context.grid
    return sla2_attention(q, k, v, config, *weights, backend="reference", grid=grid)


def _choose_backend(name: str, head_dim: int, device: torch.device, dtype: torch.dtype, config: SLA2Config) -> str:
    chosen = choose_backend(name, head_dim, device, dtype, config)
    return "torch" if name == "auto" and chosen == "triton" and _without_kernels(head_dim, config) else chosen


def _without_kernels(head_dim: int, config: SLA2Config) -> str | None:
    """What of a config has no Triton kernels, or None."""
    from slagen.attention.sla2.low_bit import no_kernel

    return "--mixing mass" if config.mixing == "mass" else no_kernel(head_dim, config)


def _check(backend: str, head_dim: int, device: torch.device, dtype: torch.dtype, config: SLA2Config) -> None:
    from slagen.attention.sla.backends import check_kernels
    from slagen.attention.sla2.low_bit import check_kernel

    without = _without_kernels(head_dim, config)
    if backend == "triton" and without:
        raise EnvironmentProblem(f"sla2 attention with {without} has no Triton kernels. Give --backend torch.")
    check_kernels(backend, head_dim, device, dtype, config.sla)
    if backend == "triton" and config.low_bit == "int8":
        check_kernel(head_dim, device, dtype, config)


def _describe(config: SLA2Config, grid: Grid) -> dict[str, Any]:
    return {**to_fields(config), **describe_blocks(config.sla, grid.num_tokens)}


def _applies(config: SLA2Config, grid: Grid) -> bool:
    key_blocks = config.sla.num_blocks(grid.num_tokens)[1]
    return config.sla.num_critical(key_blocks) < key_blocks


def _density(config: SLA2Config, grid: Grid) -> float:
    return density(config.sla, grid.num_tokens)


def _note(config: SLA2Config, options: Mapping[str, Any], grid: Grid) -> str:
    counts = block_counts(config.sla, grid.num_tokens)
    kept = f"{counts['critical']} of {counts['key_blocks']} key blocks per query block"
    arithmetic = "" if config.low_bit == "none" else f", computed in {config.low_bit}"
    return f"sparsity {config.sparsity:g} -> {kept}{note_of_order(config.order)}{arithmetic}"


SLA2 = Method(
    name="sla2",
    summary="exact attention to the key blocks that a learned router chooses, linear attention for the rest",
    config=SLA2Config,
    needs=Needs(training=True, weights=True, all_heads=True),
    cost=_cost,
    build=_build,
    reference=_reference,
    family="sla",
    backends=BACKENDS,
    choose_backend=_choose_backend,
    check=_check,
    error_limit=lambda config: None if config.low_bit == "none" else COARSE,
    parameters=(
        ParameterGroup("router_q", stage="router"),
        ParameterGroup("router_k", stage="router"),
        ParameterGroup("mix"),
    ),
    parts=lambda module, *tensors: module.parts(*tensors),
    describe=_describe,
    applies=_applies,
    density=_density,
    note=_note,
    benched=False,
)
