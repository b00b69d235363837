"""Which backend a run will take, and whether it works on this machine: found out before anything is loaded."""

from __future__ import annotations

import torch

from slagen.attention.sla.config import Backend, SLAConfig
from slagen.attention.sla.functional import choose_backend
from slagen.attention.sla.fused import verify
from slagen.errors import EnvironmentProblem


def pick_backend(name: Backend, head_dim: int, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that SLA will run on. Raises EnvironmentProblem where a named one cannot."""
    try:
        return choose_backend(torch.empty(1, 1, 1, head_dim, dtype=dtype, device=device), name)
    except ValueError as error:
        raise EnvironmentProblem(str(error)) from error


def check_kernels(backend: str | None, head_dim: int, device: torch.device, dtype: torch.dtype, sla: SLAConfig) -> None:
    """Try the kernels, where they will run, before anything is loaded. Raises EnvironmentProblem where none can."""
    if backend == "triton":
        verify(torch.empty(1, 1, 1, head_dim, dtype=dtype, device=device), sla)
