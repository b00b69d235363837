"""Which kernels a call launches, found out by making the call on CPU tensors.

Launches of Triton are noted and not run, so that long sequences cost nothing: what a kernel would have written stays
unwritten. Operators of PyTorch run, and each one that would start a kernel on CUDA is noted.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# They make or describe memory and start nothing, besides what is a view by its schema.
FREE = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_", "set_", "_unsafe_view",
    "_reshape_alias", "lift_fresh", "_local_scalar_dense", "is_same_size",
}  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """One kernel.

    kernel: the Triton kernel's name, or the operator's, such as "aten.bmm".
    programs: of a Triton kernel; 0 for an operator.
    constants: keyword arguments of a Triton kernel.
    read, written: shapes and bytes of an element of tensors; a Triton kernel's all count as read.
    """

    kernel: str
    programs: int = 0
    constants: dict[str, Any] = field(default_factory=dict)
    read: list[tuple[tuple[int, ...], int]] = field(default_factory=list)
    written: list[tuple[tuple[int, ...], int]] = field(default_factory=list)


def launches(call: Callable[[], Any]) -> list[Launch]:
    """The kernels that `call` would launch on CUDA, in their order; Triton's only under TRITON_INTERPRET."""
    found: list[Launch] = []
    with _triton_noted(found), _Noted(found):
        call()
    return found


class _Noted(TorchDispatchMode):
    """Notes operators, and looks into those that are not PyTorch's own."""

    def __init__(self, found: list[Launch]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace not in ("aten", "prims", "prim"):
            with self:
                return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)
        with self:  # matmul, to, reshape: in inference mode they come whole
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        result = func(*args, **kwargs)
        if not func.is_view and func.overloadpacket.__name__ not in FREE:
            name = f"aten.{func.overloadpacket.__name__}"
            self.found.append(Launch(name, read=_sizes((args, kwargs)), written=_sizes(result)))
        return result


@contextlib.contextmanager
def _triton_noted(found: list[Launch]) -> Iterator[None]:
    from triton.runtime.interpreter import InterpretedFunction

    def note(function: Any, *args: Any, grid: Any, warmup: bool, **constants: Any) -> None:
        sizes = grid(constants) if callable(grid) else grid
        programs = 1
        for size in sizes:
            programs *= size
        plain = {name: value for name, value in constants.items() if not isinstance(value, Tensor)}
        found.append(Launch(function.fn.__name__, programs, plain, _sizes((args, constants))))

    kinds = (InterpretedFunction, triton.runtime.JITFunction)
    before = [kind.run for kind in kinds]
    try:
        for kind in kinds:
            kind.run = note
        yield
    finally:
        for kind, run in zip(kinds, before, strict=True):
            kind.run = run


def _sizes(tree: Any) -> list[tuple[tuple[int, ...], int]]:
    leaves = torch.utils._pytree.tree_leaves(tree)
    return [(tuple(leaf.shape), leaf.element_size()) for leaf in leaves if isinstance(leaf, Tensor)]
