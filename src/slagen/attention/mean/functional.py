"""`block_mean_attention`: checks what it is given, and hands it to a backend."""

from collections.abc import Callable

import torch
from torch import Tensor

from slagen.attention.mean.blockwise import blockwise_attention
from slagen.attention.mean.config import MeanConfig, SolConfig
from slagen.attention.mean.fused import fused_attention
from slagen.attention.mean.reference import reference_attention
from slagen.attention.mean.selection import kept_blocks
from slagen.attention.order import CubeOrder, in_order
from slagen.attention.protocol import Grid
from slagen.attention.sla.config import Backend
from slagen.attention.sla.functional import check_qkv, choose_backend, pick_scale


def block_mean_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: MeanConfig | SolConfig,
    *,
    scale: float | None = None,
    backend: Backend = "auto",
    grid: Grid | CubeOrder | None = None,
    on_kept: Callable[[Tensor], None] | None = None,
    seeds: Tensor | None = None,
) -> Tensor:
    """Attend exactly to the key blocks that `config` selects, and to every other block as its mean, in one softmax.

    The maths is written out at the head of `reference.py`. Scores, softmax, means and sums run in float32, or float64
    for float64 input, under autocast too. Gradients reach q, k and v; the choice of blocks has none.

    Args:
        q, k, v: (B, H, L, D), one of float16, bfloat16, float32 and float64, any L >= 1, any strides.
        config: `MeanConfig` keeps a fraction of the blocks, `SolConfig` those above a threshold.
        scale: factor on q @ k^T before softmax, above 0; None is D ** -0.5.
        backend: as in `sparse_linear_attention`, with one kernel more for "triton".
        grid: of the L tokens, or its cubes, which `config.order` "cube" needs; q, k, v and o are in raster order.
        on_kept: called with the selection, (B, H, M, N) bool.
        seeds: (H,) int64, of the selector "random"; None takes 0, 1, ...
    Returns: o, (B, H, L, D) in q's dtype.
    Raises: ValueError if shapes, dtypes, devices or options do not fit, or the grid is needed and missing.
    """
    check_qkv(q, k, v)
    if not isinstance(config, MeanConfig | SolConfig):
        raise ValueError(f"config is {config!r}; it must be a MeanConfig or a SolConfig. Try SolConfig().")
    scale = pick_scale(q, scale)
    chosen = choose_backend(q, backend)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        kept = kept_blocks(q, k, config, seeds, scale)
        if on_kept is not None:
            on_kept(kept)
        if chosen == "reference":
            return reference_attention(q, k, v, config, scale, seeds)
        return attend_to(kept, q, k, v, config, scale, chosen)

    with torch.autocast(q.device.type, enabled=False):
        return in_order(config.order, grid, attend, q, k, v)


def attend_to(
    kept: Tensor, q: Tensor, k: Tensor, v: Tensor, config: MeanConfig | SolConfig, scale: float, backend: str
) -> Tensor:
    """Attend exactly to the kept blocks, (B, H, M, N) bool, and to the others as their mean, by "triton" or "torch"."""
    run = fused_attention if backend == "triton" else blockwise_attention
    return run(q, k, v, kept, config.block_m, config.block_n, scale)
