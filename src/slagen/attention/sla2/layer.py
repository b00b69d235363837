"""SLA2 as a layer of a transformer, with the router and the weights of the branches that it learns."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from slagen.attention.block_maps import BlockMap, map_in_order
from slagen.attention.order import CubesOfPass, in_order
from slagen.attention.parts import ordered
from slagen.attention.protocol import Attend, Inputs
from slagen.attention.sla.block_map import block_map, block_means, scores_of_means
from slagen.attention.sla.config import Backend
from slagen.attention.sla2.config import SLA2Config
from slagen.attention.sla2.functional import (
    branches,
    choose_backend,
    mixed,
    routed_attention,
    sla2_attention,
    smoothed,
)

START = math.log(9)  # the logit of a = 0.9


class _IdentityLinear(nn.Linear):
    """A linear layer without bias that starts as the identity."""

    def reset_parameters(self) -> None:
        nn.init.eye_(self.weight)


class _Mix(nn.Module):
    """The logits (H, mixing_blocks) of the exact branch's weight."""

    def __init__(self, num_heads: int, num_blocks: int, device: torch.device | str | None) -> None:
        super().__init__()
        self.logit = nn.Parameter(torch.full((num_heads, num_blocks), START, dtype=torch.float32, device=device))

    def forward(self) -> Tensor:
        return self.logit


class SLA2(CubesOfPass):
    """SLA2 in one layer: exact attention to the blocks that the router chooses, linear attention to all others.

    `router_q` and `router_k` (D x D, without bias, float32, shared by all heads) start as the identity, so that a fresh
    module keeps the blocks that SLA keeps. `mix.logit` (H, mixing_blocks) starts where the exact branch weighs 0.9.
    Making it draws no random numbers.

    `soft` is False, and True in the stage that trains the router: blocks are then kept by degrees, which let gradients
    through.

    Args:
        head_dim, num_heads: D and H of the q, k, v to come.
        config: how to divide the work; None is `SLA2Config()`.
        backend: as in `sla2_attention`.
        device: where the weights are made; None is torch's default.
    """

    def __init__(
        self,
        head_dim: int,
        num_heads: int,
        config: SLA2Config | None = None,
        *,
        backend: Backend = "auto",
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.config = config or SLA2Config()
        self.backend = backend
        self.soft = False
        self.follow_cubes(device)
        self.router_q = _IdentityLinear(head_dim, head_dim, bias=False, dtype=torch.float32, device=device)
        self.router_k = _IdentityLinear(head_dim, head_dim, bias=False, dtype=torch.float32, device=device)
        self.mix = _Mix(num_heads, self.config.mixing_blocks, device)

    def kept_blocks(self, q: Tensor, k: Tensor, inputs: Inputs) -> BlockMap:
        """Which key blocks are attended exactly, of q, k (B, H, L, head_dim)."""
        config = self.config

        def classify(q: Tensor, k: Tensor) -> Tensor:
            return block_map(scores_of_means(*self._route(q, k)[1:]), config.sla)

        return map_in_order(config, config.order, self.cubes_in(inputs, q), q, k, classify)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs | None = None) -> Tensor:
        """Attend: q, k, v (B, H, L, head_dim) -> o (B, H, L, head_dim) in q's dtype.

        Raises: ValueError where tokens are in cube order, and the grid is unknown or not one of L tokens.
        """
        config, grid = self.config, self.cubes_in(inputs, q)
        chosen = choose_backend(q, config, self.soft, self.backend)
        if chosen == "reference":
            weights = self.router_q.weight, self.router_k.weight, self.mix()
            return sla2_attention(q, k, v, config, *weights, soft=self.soft, backend=chosen, grid=grid)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, q_routed, k_routed = self._route(q, k)
            logit = self.mix()
            return routed_attention(q, keys, v, config, q_routed, k_routed, logit, soft=self.soft, backend=chosen)

        with torch.autocast(q.device.type, enabled=False):
            return in_order(config.order, grid, attend, q, k, v)

    def _route(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The smoothed keys, and the means of queries and keys after the router."""
        keys = smoothed(k, self.config)
        q_routed = _routed(self.router_q, block_means(q, self.config.block_m))
        return keys, q_routed, _routed(self.router_k, block_means(keys, self.config.block_n))

    def parts(self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs) -> dict[str, Attend]:
        """What a forward pass consists of, as `Method.parts`; what attends includes the choice of blocks."""
        config, chosen = self.config, choose_backend(q, self.config, self.soft, self.backend)
        parts, q, k, v = ordered(config.order, self.cubes_in(inputs, q), q, k, v)
        keys, q_routed, k_routed = self._route(q, k)

        def fused(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            scale, logit = q.shape[3] ** -0.5, self.mix()
            return branches(q, keys, v, config, q_routed, k_routed, logit, scale, self.soft, chosen)

        found = fused(q, k, v)
        own: dict[str, Attend] = {"router": lambda q, k, v: self._route(q, k), "fused": fused}
        return {**parts, **own, "mix": lambda q, k, v: mixed(*found, config).to(q.dtype)}

    def extra_repr(self) -> str:
        return f"{self.config}, backend={self.backend!r}, soft={self.soft}"


def _routed(router: nn.Module, means: Tensor) -> Tensor:
    """The means through a layer in whatever dtype its weight has, if it has one."""
    weight = getattr(router, "weight", None)
    dtype = weight.dtype if isinstance(weight, Tensor) and weight.is_floating_point() else means.dtype
    routed: Tensor = router(means.to(dtype))
    return routed.to(means.dtype)
