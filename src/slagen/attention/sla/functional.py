"""`sparse_linear_attention`: checks what it is given, and hands it to a backend."""

import math
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from slagen.attention.order import CubeOrder, in_order
from slagen.attention.protocol import Grid
from slagen.attention.ranking import selector_scores
from slagen.attention.sla.blockwise import blockwise_attention
from slagen.attention.sla.config import Backend, SLAConfig
from slagen.attention.sla.fused import WELL_KNOWN, fused_attention, unsupported
from slagen.attention.sla.reference import reference_attention

Branches = Literal["both", "sparse", "linear"]
BRANCHES = get_args(Branches)

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def sparse_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: SLAConfig,
    proj_weight: Tensor | None = None,
    proj_bias: Tensor | None = None,
    *,
    scale: float | None = None,
    backend: Backend = "auto",
    branches: Branches = "both",
    block_means: tuple[Tensor, Tensor] | None = None,
    grid: Grid | CubeOrder | None = None,
    seeds: Tensor | None = None,
) -> Tensor:
    """Attend exactly to the critical key blocks and linearly to the others: o = O^s + O^l W^T + b.

    The maths is written out at the head of `reference.py`. Scores, softmax, feature map and sums run in float32, or
    float64 for float64 input, under autocast too. Gradients reach q, k, v, W and b; the choice of blocks has none.
    Blocks of equal score are chosen by index, lower first, by every backend alike.

    Args:
        q, k, v: (B, H, L, D), one of float16, bfloat16, float32 and float64, any L >= 1, any strides.
        config: sparsity, domain of the linear branch, feature map and block sizes.
        proj_weight: (D, D) as in `F.linear`, any floating dtype: W. Without it the linear branch adds nothing.
        proj_bias: (D,): b, added to every row, also where O^l is 0.
        scale: factor on q @ k^T before softmax, above 0; None is D ** -0.5.
        backend: "reference" is the definition, with dense masks; "torch" gathers the critical blocks, in bounded
            memory; "triton" runs the fused kernels, on CUDA, in float16, bfloat16 and float32, for head dimensions from
            16 to 256 that are powers of two. "auto" is "triton" on CUDA where it can be, up to a head dimension of 128
            (few cards hold the states of 256), otherwise "torch".
        branches: "both"; "sparse" for o = O^s, as without a weight; "linear" for o = O^l W^T + b, where the blocks
            chosen still bound the domain "marginal".
        block_means: the means of the blocks of q and of k, (B * H, M, D) and (B * H, N, D) float32, where they are
            known already; "triton" then takes none itself, other backends do all the same.
        grid: of the L tokens, or its cubes, which `config.order` "cube" needs; q, k, v and o are in raster order.
        seeds: (H,) int64, of the selector "random"; None takes 0, 1, ...
    Returns: o, (B, H, L, D) in q's dtype.
    Raises: ValueError if shapes, dtypes, devices or options do not fit, or the grid is needed and missing.
    """
    _check_tensors(q, k, v, proj_weight, proj_bias)
    if not isinstance(config, SLAConfig):
        raise ValueError(f"config is {config!r}; it must be an SLAConfig. Try SLAConfig().")
    _check_means(q, config, block_means)
    scale = pick_scale(q, scale)
    _check_branches(branches, proj_weight)
    chosen = choose_backend(q, backend)
    if branches == "sparse":
        proj_weight = proj_bias = None
    known = {"block_means": block_means} if chosen == "triton" and block_means is not None else {}
    sparse, bounded = branches != "linear", proj_weight is not None and config.linear_domain == "marginal"

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = selector_scores(config, q, k, seeds, scale) if sparse or bounded else None
        return BACKENDS[chosen](q, k, v, config, proj_weight, proj_bias, scale, sparse, scores, **known)

    with torch.autocast(q.device.type, enabled=False):
        return in_order(config.order, grid, attend, q, k, v)


BACKENDS: dict[str, Callable[..., Tensor]] = {
    "reference": reference_attention,
    "torch": blockwise_attention,
    "triton": fused_attention,
}


def choose_backend(q: Tensor, backend: Backend = "auto") -> Literal["reference", "torch", "triton"]:
    """The backend that tensors like q (B, H, L, D) run on. Raises ValueError where a named one cannot, or is none."""
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend is {backend!r}; it must be one of auto, {', '.join(BACKENDS)}.")
    if backend == "auto":
        return "triton" if q.is_cuda and q.shape[-1] <= WELL_KNOWN and unsupported(q) is None else "torch"
    if backend == "triton" and (reason := unsupported(q)) is not None:
        raise ValueError(f"backend is 'triton', but {reason}. Try torch or auto.")
    return backend


def pick_scale(q: Tensor, scale: float | None) -> float:
    """The factor on scores: as given, or D ** -0.5. Raises ValueError unless it is finite and above 0."""
    if scale is None:
        return float(q.shape[-1] ** -0.5)
    if not 0 < scale < math.inf:
        raise ValueError(f"scale is {scale}; it must be finite and above 0. Try None for the default.")
    return float(scale)


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ValueError unless q, k and v are (B, H, L, D) of one shape, dtype and device."""
    if q.ndim != 4 or k.shape != q.shape or v.shape != q.shape or q.numel() == 0:
        raise ValueError(
            f"q, k, v have shapes {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}; "
            "all must have the same shape (B, H, L, D), and no dimension may be 0."
        )
    if q.dtype not in DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(
            f"q, k, v have dtypes {q.dtype}, {k.dtype}, {v.dtype}; "
            f"all must have the same dtype, one of {', '.join(map(str, DTYPES))}. Convert them with .to()."
        )
    for name, tensor in (("k", k), ("v", v)):
        _check_device(name, tensor, q)


def _check_device(name: str, tensor: Tensor, q: Tensor) -> None:
    if tensor.device != q.device:
        raise ValueError(f"{name} is on {tensor.device}, but q is on {q.device}. Move it with .to(q.device).")


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, proj_weight: Tensor | None, proj_bias: Tensor | None) -> None:
    check_qkv(q, k, v)
    if proj_weight is None and proj_bias is not None:
        raise ValueError("proj_bias is given without proj_weight, so there is no linear branch. Give both or neither.")
    head_dim = q.shape[-1]
    for name, tensor, shape in (
        ("proj_weight", proj_weight, (head_dim, head_dim)),
        ("proj_bias", proj_bias, (head_dim,)),
    ):
        if tensor is None:
            continue
        if tensor.shape != shape or not tensor.is_floating_point():
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} and dtype {tensor.dtype}; for head dimension {head_dim} it "
                f"must have shape {shape} and a floating-point dtype."
            )
        _check_device(name, tensor, q)


def _check_branches(branches: str, proj_weight: Tensor | None) -> None:
    if branches not in BRANCHES:
        raise ValueError(f"branches is {branches!r}; it must be one of {', '.join(BRANCHES)}.")
    if branches == "linear" and proj_weight is None:
        raise ValueError("branches is 'linear', but the linear branch needs proj_weight. Give proj_weight.")


def _check_means(q: Tensor, config: SLAConfig, block_means: tuple[Tensor, Tensor] | None) -> None:
    batch, num_heads, length, head_dim = q.shape
    for name, means, count in zip("qk", block_means or (), config.num_blocks(length), strict=False):
        shape = (batch * num_heads, count, head_dim)
        if means.shape != shape or means.dtype != torch.float32 or means.device != q.device:
            raise ValueError(
                f"block_means of {name} has shape {tuple(means.shape)} and dtype {means.dtype} on {means.device}; "
                f"it must have shape {shape} and dtype torch.float32 on {q.device}."
            )
