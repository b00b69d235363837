"""SparseLinearAttention: the attention with the weights it learns."""

import functools

import torch
from torch import Tensor, nn

from slagen.attention.order import CubeOrder
from slagen.attention.protocol import Grid
from slagen.attention.sla.config import Backend, SLAConfig
from slagen.attention.sla.functional import DTYPES, Branches, sparse_linear_attention


class ZeroLinear(nn.Linear):
    """A linear layer that starts at zero. (`nn.utils.skip_init` goes by the meta device, and so imports sympy.)"""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_WEIGHTS = (nn.Parameter, Tensor)  # calls of torch.func put plain tensors in


def _is_plain(linear: nn.Module) -> bool:
    """Whether calling a layer does nothing but multiply with the numbers that stand in it.

    Hooks of accelerate and diffusers replace `forward`; adapters and quantisation replace the layer or its weight.
    """
    if type(linear) is not ZeroLinear or "forward" in linear.__dict__ or type(linear.weight) not in _WEIGHTS:
        return False
    return not any(getattr(linear, name) for name in _HOOKS)


class SparseLinearAttention(nn.Module):
    """Sparse-linear attention with its learned projection of the linear branch.

    `proj_l` (head_dim x head_dim, with bias, float32, shared by all heads) starts at zero, so that a fresh module is
    the sparse branch alone. Its name follows the published weights. Making it draws no random numbers.

    As long as `proj_l` is the plain layer made here, its weights go into the operator. Where something stands in its
    way, such as a hook that brings its weights, an adapter or quantised weights, it is called, with O^l: see `forward`.

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
        self.proj_l = ZeroLinear(head_dim, head_dim, dtype=torch.float32, device=device)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        block_means: tuple[Tensor, Tensor] | None = None,
        grid: Grid | CubeOrder | None = None,
        seeds: Tensor | None = None,
    ) -> Tensor:
        """Attend: q, k, v (B, H, L, head_dim) -> o (B, H, L, head_dim) in q's dtype.

        Where `proj_l` is called, the branches are computed one after the other, O^l rounded to q's dtype.

        block_means, grid, seeds: as in `sparse_linear_attention`.
        """
        attend = functools.partial(
            sparse_linear_attention, q, k, v, self.config, backend=self.backend, block_means=block_means,
            grid=grid, seeds=seeds,
        )  # fmt: skip
        if self.branches == "sparse":
            return attend(branches="sparse")
        if _is_plain(self.proj_l):
            return attend(self.proj_l.weight, self.proj_l.bias, branches=self.branches)
        unprojected = torch.eye(q.shape[-1], device=q.device, dtype=torch.promote_types(q.dtype, torch.float32))
        o_linear = attend(unprojected, branches="linear")
        weight = getattr(self.proj_l, "weight", None)
        dtype = weight.dtype if isinstance(weight, Tensor) and weight.dtype in DTYPES else q.dtype
        with torch.autocast(q.device.type, enabled=False):
            o = self.proj_l(o_linear.to(dtype))
        if self.branches == "both":
            o = o + attend(branches="sparse")
        return o.to(q.dtype)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        return f"{self.config}, backend={self.backend!r}, branches={self.branches!r}"
