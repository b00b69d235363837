"""`sla2_attention`: checks what it is given, and hands it to a backend."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from slagen.attention.order import CubeOrder, in_order
from slagen.attention.protocol import Grid
from slagen.attention.sla.block_map import MARGINAL, block_map, block_means, block_tokens, scores_of_means
from slagen.attention.sla.config import Backend
from slagen.attention.sla.functional import check_qkv, pick_scale, sparse_linear_attention
from slagen.attention.sla.functional import choose_backend as choose_sla_backend
from slagen.attention.sla2.blockwise import blockwise_branches
from slagen.attention.sla2.config import SLA2Config
from slagen.attention.sla2.low_bit import low_bit_attention, no_kernel
from slagen.attention.sla2.reference import reference_attention
from slagen.attention.sla2.soft_topk import soft_topk

Branches = tuple[Tensor, Tensor, Tensor]  # O^s and O^l, (B, H, L, D), and the logits of a, broadcast to them


def sla2_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: SLA2Config,
    router_q: Tensor,
    router_k: Tensor,
    logit: Tensor,
    *,
    scale: float | None = None,
    soft: bool = False,
    backend: Backend = "auto",
    grid: Grid | CubeOrder | None = None,
) -> Tensor:
    """Attend exactly to the key blocks that the router chooses, linearly to all others, and mix: a O^s + (1 - a) O^l.

    The maths is written out at the head of `reference.py`. All of it runs in float32, or float64 for float64 input,
    under autocast too. Gradients reach q, k, v and logit; router_q and router_k only where blocks are kept by degrees.

    Args:
        q, k, v: (B, H, L, D), one of float16, bfloat16, float32 and float64, any L >= 1, any strides.
        router_q, router_k: (D, D) as in `F.linear`, any floating dtype: Wq and Wk.
        logit: (H, config.mixing_blocks), any floating dtype.
        scale: factor on q @ k^T before softmax, above 0; None is D ** -0.5.
        soft: keep every block by a degree, as in training of the router: at the cost of dense attention.
        backend: "reference" is the definition, with dense masks; "torch" works block by block, in bounded memory;
            "triton" runs SLA's fused kernels, once for each branch, where blocks are kept whole and `config.mixing` is
            "learned"; in int8 a kernel of its own, from a head dimension and key blocks of 32 on. "auto" is "triton" on
            CUDA where it can be, otherwise "torch".
        grid: of the L tokens, or its cubes, which `config.order` "cube" needs; q, k, v and o are in raster order.
    Returns: o, (B, H, L, D) in q's dtype.
    Raises: ValueError if shapes, dtypes, devices or options do not fit, or the grid is needed and missing.
    """
    check_qkv(q, k, v)
    for name, weight in (("router_q", router_q), ("router_k", router_k)):
        _check_weight(name, weight, (q.shape[3], q.shape[3]), q)
    chosen = choose_backend(q, config, soft, backend)
    if chosen == "reference":
        _check_weight("logit", logit, (q.shape[1], config.mixing_blocks), q)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if chosen == "reference":
            return reference_attention(q, k, v, config, router_q, router_k, logit, pick_scale(q, scale), soft)
        keys = smoothed(k, config)
        q_means, k_means = block_means(q, config.block_m), block_means(keys, config.block_n)
        routed = F.linear(q_means, router_q.to(q_means.dtype)), F.linear(k_means, router_k.to(k_means.dtype))
        return routed_attention(q, keys, v, config, *routed, logit, scale=scale, soft=soft, backend=chosen)

    with torch.autocast(q.device.type, enabled=False):
        return in_order(config.order, grid, attend, q, k, v)


def smoothed(k: Tensor, config: SLA2Config) -> Tensor:
    """The keys (B, H, L, D) in float32, or float64, without their mean where the config says so."""
    k = k.to(torch.promote_types(k.dtype, torch.float32))
    return k - k.mean(2, keepdim=True) if config.smooth_keys else k


def routed_attention(
    q: Tensor,
    keys: Tensor,
    v: Tensor,
    config: SLA2Config,
    q_routed: Tensor,
    k_routed: Tensor,
    logit: Tensor,
    *,
    scale: float | None = None,
    soft: bool = False,
    backend: Literal["torch", "triton"],
) -> Tensor:
    """`sla2_attention` after the router: of `smoothed` keys, and the means that went through Wq and Wk.

    Args:
        q, keys, v: (B, H, L, D), tokens in the order of the config.
        q_routed, k_routed: (B, H, M, D) and (B, H, N, D), in the dtype of `keys`.
    """
    _check_weight("logit", logit, (q.shape[1], config.mixing_blocks), q)
    found = branches(q, keys, v, config, q_routed, k_routed, logit, pick_scale(q, scale), soft, backend)
    return mixed(*found, config).to(q.dtype)


def branches(
    q: Tensor, keys: Tensor, v: Tensor, config: SLA2Config, q_routed: Tensor, k_routed: Tensor, logit: Tensor,
    scale: float, soft: bool, backend: str,
) -> Branches:  # fmt: skip
    """Both branches of the blocks that the router's means choose; arguments as in `routed_attention`."""
    if backend == "triton":
        run = _triton_branches
    else:
        run = _soft_branches if soft and not _keeps_all(config, q) else _hard_branches
    return run(q, keys, v, config, q_routed, k_routed, logit, scale)


def mixed(o_sparse: Tensor, o_linear: Tensor, logits: Tensor, config: SLA2Config) -> Tensor:
    """a O^s + (1 - a) O^l, (B, H, L, D)."""
    if _keeps_all(config, o_sparse):  # the linear branch has no term
        return o_sparse
    return logits.sigmoid() * o_sparse + (-logits).sigmoid() * o_linear


def _keeps_all(config: SLA2Config, q: Tensor) -> bool:
    num_columns = config.sla.num_blocks(q.shape[2])[1]
    return config.sla.num_critical(num_columns) == num_columns


def choose_backend(
    q: Tensor, config: SLA2Config, soft: bool, backend: Backend = "auto"
) -> Literal["reference", "torch", "triton"]:
    """The backend that tensors like q (B, H, L, D) run on. Raises ValueError where a named one cannot, or is none."""
    without = "the soft top-k" if soft else "mixing 'mass'" if config.mixing == "mass" else None
    without = without or no_kernel(q.shape[3], config)
    if without and backend == "triton":
        raise ValueError(f"backend is 'triton', but {without} has no Triton kernels. Try torch or auto.")
    chosen = choose_sla_backend(q, backend)
    return "torch" if without and chosen == "triton" else chosen


def _check_weight(name: str, weight: Tensor, shape: tuple[int, int], q: Tensor) -> None:
    if weight.shape != shape or not weight.is_floating_point() or weight.device != q.device:
        raise ValueError(
            f"{name} has shape {tuple(weight.shape)} and dtype {weight.dtype} on {weight.device}; for q of shape "
            f"{tuple(q.shape)} it must have shape {shape} and a floating-point dtype on {q.device}."
        )


def _hard_branches(
    q: Tensor, keys: Tensor, v: Tensor, config: SLA2Config, q_routed: Tensor, k_routed: Tensor, logit: Tensor,
    scale: float,
) -> Branches:  # fmt: skip
    rest = block_map(scores_of_means(q_routed.detach(), k_routed.detach()), config.sla) == MARGINAL
    o_sparse, o_linear, lse = blockwise_branches(q, keys, v, None, rest, config.sla, scale, config.low_bit == "int8")
    return o_sparse, o_linear, _logits(q, keys, config, logit, lse, rest, scale)


def _soft_branches(
    q: Tensor, keys: Tensor, v: Tensor, config: SLA2Config, q_routed: Tensor, k_routed: Tensor, logit: Tensor,
    scale: float,
) -> Branches:  # fmt: skip
    scores = q_routed @ k_routed.mT
    logs = soft_topk(scores * (scale / config.router_tau), config.sla.num_critical(scores.shape[3]))
    kept, rest = F.logsigmoid(logs), F.logsigmoid(-logs)
    o_sparse, o_linear, lse = blockwise_branches(q, keys, v, kept, rest, config.sla, scale, config.low_bit == "int8")
    return o_sparse, o_linear, _logits(q, keys, config, logit, lse, rest, scale)


def _triton_branches(
    q: Tensor, keys: Tensor, v: Tensor, config: SLA2Config, q_routed: Tensor, k_routed: Tensor, logit: Tensor,
    scale: float,
) -> Branches:  # fmt: skip
    """SLA's kernels, which rank blocks by the means that they are given: those that went through the router."""
    q_means, k_means = (x.detach().float().flatten(0, 1).contiguous() for x in (q_routed, k_routed))
    unprojected, k = torch.eye(q.shape[3], device=q.device), keys.to(q.dtype)

    def attend(branches: Literal["sparse", "linear"]) -> Tensor:
        weight = None if branches == "sparse" else unprojected
        o = sparse_linear_attention(
            q, k, v, config.sla, weight, scale=scale, backend="triton", branches=branches,
            block_means=(q_means, k_means),
        )  # fmt: skip
        return o.to(keys.dtype)

    if config.low_bit == "none":
        o_sparse = attend("sparse")
    else:
        o_sparse = low_bit_attention(q, keys, v, q_means, k_means, config, scale).to(keys.dtype)
        if torch.is_grad_enabled() and any(x.requires_grad for x in (q, keys, v)):
            unrounded = attend("sparse")
            o_sparse = o_sparse + (unrounded - unrounded.detach())  # adds 0, and the gradients
    return o_sparse, attend("linear"), _learned_logits(q, config, logit)


def _logits(
    q: Tensor, keys: Tensor, config: SLA2Config, logit: Tensor, lse: Tensor, rest: Tensor, scale: float
) -> Tensor:
    """The logits of a: (B, H, L, 1), or (1, H, 1 or L, 1)."""
    return (
        _mass_logits(q, keys, config, lse, rest, scale)
        if config.mixing == "mass"
        else _learned_logits(q, config, logit)
    )


def _learned_logits(q: Tensor, config: SLA2Config, logit: Tensor) -> Tensor:
    num_rows = config.sla.num_blocks(q.shape[2])[0]
    logit = logit[None].to(torch.promote_types(q.dtype, torch.float32))
    if logit.shape[2] == 1:
        return logit[..., None]
    if logit.shape[2] != num_rows:
        logit = F.interpolate(logit, num_rows, mode="linear")
    return logit.repeat_interleave(config.block_m, 2)[:, :, : q.shape[2], None]


def _mass_logits(q: Tensor, keys: Tensor, config: SLA2Config, lse: Tensor, rest: Tensor, scale: float) -> Tensor:
    """The logits of the sparse branch's share in a softmax where each other block is n copies of its mean key."""
    length, num_rows = q.shape[2], rest.shape[2]
    sizes = block_tokens(length, config.block_n, q.device).to(lse.dtype)
    logs = (rest.to(lse.dtype).log() if rest.dtype == torch.bool else rest) + sizes.log()
    padded = F.pad(q.to(lse.dtype) * scale, (0, 0, 0, num_rows * config.block_m - length))
    rows = padded.unflatten(2, (num_rows, config.block_m)) @ block_means(keys, config.block_n).mT[:, :, None]
    estimated = (rows + logs[:, :, :, None]).logsumexp(-1).flatten(2)[:, :, :length]
    return (lse - estimated)[..., None]
