"""Attention, a folder for each method. The public names load torch on first use: configs and costs need none."""

from importlib import import_module
from typing import Any

_HOMES = {
    "SparseLinearAttention": "slagen.attention.sla.module",
    "sparse_linear_attention": "slagen.attention.sla.functional",
}

__all__ = ["SparseLinearAttention", "sparse_linear_attention"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'slagen.attention' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
