"""SparseLinearAttention: the attention with the weights it learns."""

import torch
from torch import Tensor, nn

from slagen.attention.functional import Branches, sparse_linear_attention
from slagen.config import Backend, SLAConfig


class _ZeroLinear(nn.Linear):
    """A linear layer that starts at zero. (`nn.utils.skip_init` goes by the meta device, and so imports sympy.)"""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


class SparseLinearAttention(nn.Module):
    """Sparse-linear attention with its learned projection of the linear branch.

    `proj_l` (head_dim x head_dim, with bias, float32, shared by all heads) starts at zero, so that a fresh module is
    the sparse branch alone. Its name follows the published weights. Making it draws no random numbers.

    Args:
        head_dim: D of the q, k, v to come.
        config: how to divide the work; None is `SLAConfig()`.
        backend, branches: as in `sparse_linear_attention`, for every call.
        device: where `proj_l` is made; None is torch's default.
    """

    def __init__(
        self,
        head_dim: int,
        config: SLAConfig | None = None,
        *,
        backend: Backend = "auto",
        branches: Branches = "both",
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.config = config or SLAConfig()
        self.backend = backend
        self.branches = branches
        self.proj_l = _ZeroLinear(head_dim, head_dim, dtype=torch.float32, device=device)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, block_means: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Attend: q, k, v (B, H, L, head_dim) -> o (B, H, L, head_dim) in q's dtype.

        block_means: as in `sparse_linear_attention`.
        """
        return sparse_linear_attention(
            q,
            k,
            v,
            self.config,
            self.proj_l.weight,
            self.proj_l.bias,
            backend=self.backend,
            branches=self.branches,
            block_means=block_means,
        )

    def extra_repr(self) -> str:
        return f"{self.config}, backend={self.backend!r}, branches={self.branches!r}"
