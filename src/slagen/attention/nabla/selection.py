"""Which patches NABLA attends to.

A row of the pooled map is a softmax over all patches. Of each row those of highest weight are kept, the fewest for
which the others sum to less than 1 - `top_p`, and at least one; of equal ones those of lower index. Those within the
sliding tile are kept too. No gradient passes through the selection.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from slagen.attention.cubes import PATCH, Sides, cubes_along
from slagen.attention.nabla.config import NablaConfig
from slagen.attention.order import CubeOrder, cube_order
from slagen.attention.protocol import Grid


@dataclass(frozen=True, eq=False)
class Patches:
    """The patches of one grid, on one device.

    Args:
        order: the N patches.
        near: (N, N) bool, those within the sliding tile of each patch; None without one.
    """

    order: CubeOrder
    near: Tensor | None

    @property
    def num_tokens(self) -> int:
        """L."""
        return len(self.order.slots)

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.order.slots.device


@functools.lru_cache(maxsize=16)
def patches_of(grid: Grid, reach: Sides | None, device: torch.device) -> Patches:
    """The patches of a grid. Made once for each: callers in compiled code get it from outside."""
    order = cube_order(grid, device, PATCH)
    if reach is None:
        return Patches(order, None)
    with torch.inference_mode(False):
        places = torch.meshgrid(*(torch.arange(n, device=device) for n in cubes_along(grid, PATCH)), indexing="ij")
        near = torch.ones(len(order.counts), len(order.counts), dtype=torch.bool, device=device)
        for place, far in zip(places, reach, strict=True):
            near &= (place.flatten()[:, None] - place.flatten()).abs() <= far
        return Patches(order, near)


def pooled_map(q: Tensor, k: Tensor, order: CubeOrder, scale: float) -> Tensor:
    """A of `reference.py`, without gradient: (B, H, L, D) twice -> (B, H, N, N) float32, or float64."""
    scores = order.means(q.detach()) @ order.means(k.detach()).mT * scale
    return (scores + order.counts.to(scores.dtype).log()).softmax(-1)


def kept_patches(q: Tensor, k: Tensor, config: NablaConfig, patches: Patches, scale: float) -> Tensor:
    """Mark the patches that each patch attends to: (B, H, L, D) twice -> (B, H, N, N) bool, at least one in a row."""
    ranked = pooled_map(q, k, patches.order, scale).sort(dim=-1, descending=True, stable=True)
    # Summed from the smallest on, so that the left-out sum keeps its digits however small 1 - top_p is.
    left_out = ranked.values.flip(-1).cumsum(-1).flip(-1) < 1 - config.top_p
    left_out[..., 0] = False
    kept = torch.zeros_like(left_out).scatter(-1, ranked.indices, ~left_out)
    return kept if patches.near is None else kept | patches.near
