"""The kernels of dense attention by name: PyTorch's own, FlashAttention, SageAttention and FlashInfer."""

from __future__ import annotations

import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from slagen.attention.dense.config import BACKENDS
from slagen.attention.protocol import Attend, Unavailable
from slagen.errors import EnvironmentProblem

MATH_LIMIT_GIB = 16.0  # scores of PyTorch's math backend are not asked for beyond this
SDPA = {
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa-math": SDPBackend.MATH,
}


def is_absent(name: str) -> bool:
    """Whether the package that a kernel takes is not installed."""
    package = next(backend.package for backend in BACKENDS if backend.name == name)
    return package is not None and importlib.util.find_spec(package) is None


def dense_kernel(name: str, device: torch.device) -> Attend:
    """What attends, of q, k, v (B, H, L, D) in one dtype. Raises Unavailable where this machine cannot run it."""
    if name in ("auto", "sdpa"):
        return F.scaled_dot_product_attention
    if is_absent(name):
        raise Unavailable("not installed")
    if name in SDPA:
        return _sdpa(SDPA[name], device)
    return {"flash-attn": _flash_attn, "sage": _sage, "flashinfer": _flashinfer}[name]()


def pick_kernel(name: str, device: torch.device) -> str:
    """The same name, if that runs here. Raises EnvironmentProblem where it does not."""
    try:
        dense_kernel(name, device)
    except (Unavailable, ImportError) as error:
        reason = str(error).removesuffix(".")
        raise EnvironmentProblem(f"{name} cannot run on this machine: {reason}. Leave --backend out.") from error
    return name


def check_kernel(name: str, head_dim: int, device: torch.device, dtype: torch.dtype) -> None:
    """Try a kernel on a short sequence. Raises EnvironmentProblem where it refuses that head dimension or dtype."""
    if name in ("auto", "sdpa"):
        return
    q = torch.zeros(1, 1, 128, head_dim, device=device, dtype=dtype)
    try:
        dense_kernel(name, device)(q, q, q)
    except (RuntimeError, ValueError, TypeError, AssertionError, NotImplementedError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise EnvironmentProblem(
            f"{name} does not support head dimension {head_dim} in {str(dtype).removeprefix('torch.')} on this machine "
            f"({reason}). Leave --backend out."
        ) from error


def _sdpa(backend: SDPBackend, device: torch.device) -> Attend:
    if device.type != "cuda":
        raise Unavailable("no CUDA device")

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if backend == SDPBackend.MATH:
            gib = q.shape[0] * q.shape[1] * q.shape[2] ** 2 * 4 / 2**30
            if gib > MATH_LIMIT_GIB:
                raise Unavailable(f"the attention matrix would take {gib:.0f} GiB")
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    return attend


def _flashinfer() -> Attend:
    from flashinfer import single_prefill_with_kv_cache

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        sequences = zip(q.transpose(1, 2), k, v, strict=True)  # queries (L, H, D), keys and values (H, L, D)
        o = [single_prefill_with_kv_cache(*sequence, kv_layout="HND") for sequence in sequences]
        return torch.stack(o).transpose(1, 2)

    return attend


def _flash_attn() -> Attend:
    from flash_attn import flash_attn_func

    return lambda q, k, v: flash_attn_func(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def _sage() -> Attend:
    from sageattention import sageattn

    return lambda q, k, v: sageattn(q, k, v, tensor_layout="HND", is_causal=False)
