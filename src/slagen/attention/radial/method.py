"""The method `radial`: exact attention in a fixed band that narrows with the distance between frames. No torch here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from slagen.attention.protocol import Grid, Inputs, Layer, Method, Needs
from slagen.attention.radial.config import RadialConfig
from slagen.attention.radial.cost import density, radial_flops
from slagen.attention.sla.config import SLAConfig
from slagen.attention.sla.method import BACKENDS, choose_backend

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


def _build(config: RadialConfig, layer: Layer, backend: str, device: torch.device | str | None) -> nn.Module:
    from slagen.attention.radial.layer import Radial

    return Radial(config, backend, device)  # type: ignore[arg-type]


def _reference(
    config: RadialConfig, q: Tensor, k: Tensor, v: Tensor, parameters: Mapping[str, Tensor], inputs: Inputs | None
) -> Tensor:
    from slagen.attention.radial.functional import radial_attention

    return radial_attention(q, k, v, config, None if inputs is None else inputs.context.grid, backend="reference")


def _check(backend: str, head_dim: int, device: torch.device, dtype: torch.dtype, config: RadialConfig) -> None:
    from slagen.attention.sla.backends import check_kernels

    sizes = SLAConfig(block_m=config.block_m, block_n=config.block_n)
    check_kernels(backend, head_dim, device, dtype, sizes)  # its kernels are those of SLA's sparse branch


def _describe(config: RadialConfig, grid: Grid) -> dict[str, Any]:
    rows, columns = config.num_blocks(grid.num_tokens)
    return {
        **dataclasses.asdict(config), "query_blocks": rows, "key_blocks": columns,
        "expected_density": density(config, grid),
    }  # fmt: skip


def _note(config: RadialConfig, options: Mapping[str, Any], grid: Grid) -> str:
    return (
        f"decay-factor {config.decay_factor:g} over {grid.num_frames} frames -> {density(config, grid):.1%} of all "
        "query-key pairs"
    )


RADIAL = Method(
    name="radial",
    summary="exact attention in a fixed band of tokens that narrows with the distance between frames (Radial)",
    config=RadialConfig,
    needs=Needs(context=True),
    cost=radial_flops,
    build=_build,
    reference=_reference,
    backends=BACKENDS,
    choose_backend=choose_backend,
    check=_check,
    parts=lambda module, *tensors: module.parts(*tensors),
    describe=_describe,
    applies=lambda config, grid: grid.num_frames >= 2 and config.num_blocks(grid.num_tokens) != (1, 1),
    density=density,
    note=_note,
    benched=False,
)
