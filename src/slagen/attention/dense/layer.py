"""Dense attention as a layer of a transformer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slagen.attention.dense.config import DenseConfig
from slagen.attention.dense.kernels import dense_kernel
from slagen.attention.protocol import Inputs


class Dense(nn.Module):
    """Every query attends to every key, by the kernel named.

    Args:
        backend: a name of `dense.config.BACKENDS`. device: where it will run; None is the CPU.
    Raises: Unavailable where this machine cannot run that.
    """

    def __init__(self, config: DenseConfig, backend: str = "auto", device: torch.device | str | None = None) -> None:
        super().__init__()
        self.config, self.backend = config, backend
        default = backend in ("auto", "sdpa")
        self._kernel = None if default else dense_kernel(backend, torch.device(device or "cpu"))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs | None = None) -> Tensor:
        """Attend: q, k, v (B, H, L, D) -> o (B, H, L, D)."""
        if self._kernel is None:
            return F.scaled_dot_product_attention(q, k, v)
        return self._kernel(q, k, v)  # type: ignore[no-any-return]
