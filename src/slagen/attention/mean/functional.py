"""`block_mean_attention`: checks what it is given, and hands it to a backend."""

import torch
from torch import Tensor

from slagen.attention.mean.blockwise import blockwise_attention
from slagen.attention.mean.config import MeanConfig, SolConfig
from slagen.attention.mean.fused import fused_attention
from slagen.attention.mean.reference import reference_attention
from slagen.attention.mean.selection import kept_blocks
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
    kept: Tensor | None = None,
) -> Tensor:
    """Attend exactly to the key blocks that `config` selects, and to every other block as its mean, in one softmax.

    The maths is written out at the head of `reference.py`. Scores, softmax, means and sums run in float32, or float64
    for float64 input, under autocast too. Gradients reach q, k and v; the choice of blocks has none.

    Args:
        q, k, v: (B, H, L, D), one of float16, bfloat16, float32 and float64, any L >= 1, any strides.
        config: `MeanConfig` keeps a fraction of the blocks, `SolConfig` those above a threshold.
        scale: factor on q @ k^T before softmax, above 0; None is D ** -0.5.
        backend: as in `sparse_linear_attention`, with one kernel more for "triton".
        kept: (B, H, M, N) bool, the selection where it is made already ("reference" makes its own); None makes it.
    Returns: o, (B, H, L, D) in q's dtype.
    Raises: ValueError if shapes, dtypes, devices or options do not fit.
    """
    check_qkv(q, k, v)
    if not isinstance(config, MeanConfig | SolConfig):
        raise ValueError(f"config is {config!r}; it must be a MeanConfig or a SolConfig. Try SolConfig().")
    scale = pick_scale(q, scale)
    chosen = choose_backend(q, backend)
    with torch.autocast(q.device.type, enabled=False):
        if chosen == "reference":
            return reference_attention(q, k, v, config, scale)
        kept = kept_blocks(q, k, config) if kept is None else kept
        attend = fused_attention if chosen == "triton" else blockwise_attention
        return attend(q, k, v, kept, config.block_m, config.block_n, scale)
