"""The method `dense`: every query attends to every key, by one of several kernels. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from slagen.attention.cost import ModelShape, dense_attention_flops
from slagen.attention.dense.config import BACKENDS, DenseConfig
from slagen.attention.protocol import Grid, Inputs, Layer, Method

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


def _cost(config: DenseConfig, shape: ModelShape, grid: Grid) -> int:
    return dense_attention_flops(shape, grid.num_tokens)


def _build(config: DenseConfig, layer: Layer, backend: str, device: torch.device | str | None) -> nn.Module:
    from slagen.attention.dense.layer import Dense

    return Dense(config, backend, device)


def _reference(
    config: DenseConfig, q: Tensor, k: Tensor, v: Tensor, parameters: Mapping[str, Tensor], inputs: Inputs | None
) -> Tensor:
    from torch.nn.functional import scaled_dot_product_attention

    return scaled_dot_product_attention(q, k, v)


def _choose_backend(name: str, head_dim: int, device: torch.device, dtype: torch.dtype, config: DenseConfig) -> str:
    from slagen.attention.dense.kernels import pick_kernel

    return pick_kernel(name, device)


def _check(backend: str, head_dim: int, device: torch.device, dtype: torch.dtype, config: DenseConfig) -> None:
    from slagen.attention.dense.kernels import check_kernel

    check_kernel(backend, head_dim, device, dtype)


DENSE = Method(
    name="dense",
    summary="full attention: every query attends to every key",
    config=DenseConfig,
    cost=_cost,
    build=_build,
    reference=_reference,
    family="dense",
    backends=BACKENDS,
    choose_backend=_choose_backend,
    check=_check,
    describe=lambda config, grid: {},
)
