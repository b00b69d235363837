"""The ways to attend that `slagen bench` compares: SLA, dense attention, and other sparse attention."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from slagen.attention.block_map import block_scores, critical_indices
from slagen.attention.functional import sparse_linear_attention
from slagen.config import SLAConfig

MATH_LIMIT_GIB = 16.0  # scores of PyTorch's math backend are not asked for beyond this

Attend = Callable[[Tensor, Tensor, Tensor], Any]  # q, k, v -> o, or what a stage makes of them


class NotHere(Exception):
    """A method that this machine can not run, and why."""


@dataclass(frozen=True)
class Setting:
    """What a method is made for: SLA's form and weights, and where it runs."""

    config: SLAConfig
    weight: Tensor
    bias: Tensor
    backend: Any
    device: torch.device
    dtype: torch.dtype


@dataclass(frozen=True)
class Method:
    """One way to attend. `error_limit`: the largest error to the reference, in units of the largest output."""

    name: str
    kind: str  # "sla", "sparse" or "dense"
    make: Callable[[Setting], Attend]
    backward: bool = True
    error_limit: float | None = None


def _sla(setting: Setting) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sparse_linear_attention(q, k, v, setting.config, setting.weight, setting.bias, backend=setting.backend)

    return attend


def _sparse(setting: Setting) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sparse_linear_attention(q, k, v, setting.config, backend=setting.backend, branches="sparse")

    return attend


def _sdpa(backend: SDPBackend | None) -> Callable[[Setting], Attend]:
    def make(setting: Setting) -> Attend:
        if backend is None:
            return F.scaled_dot_product_attention
        if setting.device.type != "cuda":
            raise NotHere("needs a CUDA device")

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if backend == SDPBackend.MATH:
                gib = q.shape[0] * q.shape[1] * q.shape[2] ** 2 * 4 / 2**30
                if gib > MATH_LIMIT_GIB:
                    raise NotHere(f"its scores take {gib:.0f} GiB")
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v)

        return attend

    return make


def _flex(setting: Setting) -> Attend:
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        config, length = setting.config, q.shape[2]
        kv_indices = critical_indices(block_scores(q, k, config), config)
        num_columns = config.num_blocks(length)[1]
        kept = torch.full(kv_indices.shape[:3], kv_indices.shape[3], dtype=torch.int32, device=q.device)
        padded = F.pad(kv_indices, (0, num_columns - kv_indices.shape[3])).int()
        mask = BlockMask.from_kv_blocks(
            kept, padded, BLOCK_SIZE=(config.block_m, config.block_n), seq_lengths=(length, length)
        )
        return compiled(q, k, v, block_mask=mask)

    return attend


def _flash_attn(setting: Setting) -> Attend:
    _require("flash_attn")
    from flash_attn import flash_attn_func

    return lambda q, k, v: flash_attn_func(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def _sage(setting: Setting) -> Attend:
    _require("sageattention")
    from sageattention import sageattn

    return lambda q, k, v: sageattn(q, k, v, tensor_layout="HND", is_causal=False)


def _public_sla(setting: Setting) -> Attend:
    _require("sparse_linear_attention")
    from sparse_linear_attention import SparseLinearAttention

    config = setting.config
    if config.linear_domain != "all":
        raise NotHere("it computes the domain 'all' only")
    module = SparseLinearAttention(
        head_dim=setting.weight.shape[0], topk=1 - config.sparsity, feature_map=config.feature_map,
        BLKQ=config.block_m, BLKK=config.block_n,
    ).to(setting.device)  # fmt: skip
    with torch.no_grad():
        module.proj_l.weight.copy_(setting.weight)
        module.proj_l.bias.copy_(setting.bias)
    return module


def _require(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise NotHere("is not installed")


METHODS = (
    Method("sla", "sla", _sla),
    Method("sparse", "sparse", _sparse),
    Method("sdpa", "dense", _sdpa(None)),
    Method("sdpa-flash", "dense", _sdpa(SDPBackend.FLASH_ATTENTION)),
    Method("sdpa-cudnn", "dense", _sdpa(SDPBackend.CUDNN_ATTENTION)),
    Method("sdpa-efficient", "dense", _sdpa(SDPBackend.EFFICIENT_ATTENTION)),
    Method("sdpa-math", "dense", _sdpa(SDPBackend.MATH)),
    Method("flash-attn", "dense", _flash_attn),
    Method("sage", "dense", _sage, backward=False, error_limit=0.1),  # INT8
    Method("flex", "sparse", _flex),
    Method("sla-public", "sla", _public_sla),
)
