"""Sparse-linear attention: `sparse_linear_attention`, and `SparseLinearAttention`, the module with its weights."""

from slagen.attention.functional import sparse_linear_attention
from slagen.attention.module import SparseLinearAttention

__all__ = ["SparseLinearAttention", "sparse_linear_attention"]
