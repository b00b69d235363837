"""The Triton kernels of sparse-linear attention: tensors in, tensors out."""

from slagen.kernels.backward import sla_backward
from slagen.kernels.forward import sla_forward

__all__ = ["sla_backward", "sla_forward"]
