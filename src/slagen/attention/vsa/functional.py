"""`video_sparse_attention`: checks what it is given, and hands it to a backend."""

from collections.abc import Callable

import torch
from torch import Tensor

from slagen.attention.order import CubeOrder, cubes_of
from slagen.attention.protocol import Grid
from slagen.attention.sla.functional import check_qkv
from slagen.attention.vsa.blockwise import blockwise_attention
from slagen.attention.vsa.config import Backend, VSAConfig
from slagen.attention.vsa.reference import reference_attention

BACKENDS: dict[str, Callable[..., Tensor]] = {
    "auto": blockwise_attention,
    "reference": reference_attention,
    "torch": blockwise_attention,
}


def video_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: VSAConfig,
    grid: Grid | CubeOrder | None,
    gate: Tensor | None = None,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """Attend exactly to the best cubes, and, times a gate, coarsely to all: o = O^f + g * O^c.

    The maths is written out at the head of `reference.py`. Means, scores, softmax and sums run in float32, or float64
    for float64 input, under autocast too. Gradients reach q, k, v and the gate; the choice of cubes has none.

    Args:
        q, k, v: (B, H, L, D), one of float16, bfloat16, float32 and float64, any strides, tokens in raster order.
        grid: of the L tokens, or its cubes, on q's device.
        gate: (B, H, L, D), any floating dtype; None leaves the coarse branch out.
        backend: "reference" is the definition, with dense masks; "torch", which is "auto", gathers the cubes kept, in
            bounded memory.
    Returns: o, (B, H, L, D) in q's dtype.
    Raises: ValueError if shapes, dtypes, devices or the grid do not fit.
    """
    check_qkv(q, k, v)
    cubes = cubes_of(grid, q)
    if gate is not None and (gate.shape != q.shape or not gate.is_floating_point()):
        raise ValueError(
            f"gate has shape {tuple(gate.shape)} and dtype {gate.dtype}; it must have the shape of q, "
            f"{tuple(q.shape)}, and a floating-point dtype."
        )
    if backend not in BACKENDS:
        raise ValueError(
            f"backend is {backend!r}, but must be one of {', '.join(BACKENDS)} for vsa attention. Try auto."
        )
    with torch.autocast(q.device.type, enabled=False):
        return BACKENDS[backend](q, k, v, config, cubes, gate, q.shape[3] ** -0.5)
