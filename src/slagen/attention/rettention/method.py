"""The method `rettention`. No torch here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, get_args

from slagen.attention.cost import ModelShape
from slagen.attention.protocol import Backend, Grid, Inputs, Layer, Method, Needs
from slagen.attention.rettention import config as settings
from slagen.attention.rettention.config import RettentionConfig
from slagen.io.text import counted

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


def _build(config: RettentionConfig, layer: Layer, backend: str, device: torch.device | str | None) -> nn.Module:
    from slagen.attention.rettention.layer import Rettention

    return Rettention(config, backend, device)


def _reference(
    config: RettentionConfig, q: Tensor, k: Tensor, v: Tensor, parameters: Mapping[str, Tensor], inputs: Inputs | None
) -> Tensor:
    from slagen.attention.rettention.layer import Rettention

    assert inputs is not None
    module = Rettention(config, "reference", q.device)
    module.begin_pass(inputs.context)
    return module(q, k, v, inputs)  # type: ignore[no-any-return]


def _cost(config: RettentionConfig, shape: ModelShape, grid: Grid) -> int:
    """The mean over dense steps, whose window costs a second product with the values, and those between."""
    full, window = 4 * grid.num_tokens**2, 4 * config.pairs(grid)
    dense, between = full + window // 2, (config.refresh_steps - 1) * window
    return round((dense + between) / config.refresh_steps) * shape.head_dim * shape.num_heads * shape.num_layers


def _density(config: RettentionConfig, grid: Grid) -> float:
    between = config.pairs(grid) / grid.num_tokens**2
    return (1 + (config.refresh_steps - 1) * between) / config.refresh_steps


def _memory(config: RettentionConfig, shape: ModelShape, grid: Grid, item_bytes: int) -> int:
    """The residual, and a ratio in float32 for each row."""
    return grid.num_tokens * shape.num_heads * (shape.head_dim * item_bytes + 4) * shape.num_layers


def _describe(config: RettentionConfig, grid: Grid) -> dict[str, Any]:
    return {**dataclasses.asdict(config), "expected_density": _density(config, grid)}


def _applies(config: RettentionConfig, grid: Grid) -> bool:
    return config.refresh_steps > 1 and config.pairs(grid) < grid.num_tokens**2


def _note(config: RettentionConfig, options: Mapping[str, Any], grid: Grid) -> str:
    places = min(2 * config.reach(grid) + 1, grid.height * grid.width)
    return (
        f"window of {places} of {grid.height * grid.width} positions in each frame -> "
        f"{config.pairs(grid) / grid.num_tokens**2:.1%} of all query-key pairs, and dense attention every "
        f"{counted(config.refresh_steps, 'step')}"
    )


RETTENTION = Method(
    name="rettention",
    summary=(
        "exact attention in a fixed window, corrected with the result of the last dense step (Re-ttention); the first "
        "30% of the steps are dense unless --dense-steps is given"
    ),
    config=RettentionConfig,
    needs=Needs(context=True),
    cost=_cost,
    build=_build,
    reference=_reference,
    backends=tuple(Backend(name, backward=False) for name in get_args(settings.Backend)),
    choose_backend=lambda name, head_dim, device, dtype, config: "torch" if name == "auto" else name,
    describe=_describe,
    applies=_applies,
    density=_density,
    note=_note,
    benched=False,
    memory=_memory,
    dense_steps="30%",
)
