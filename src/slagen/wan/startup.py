"""A quick start for the command's own process: diffusers and transformers without what the run does not use.

Both import whatever they find installed, such as peft (which imports bitsandbytes) and scipy, and always torch._dynamo
and torch.distributed.tensor: together about half of the way from the command to the first step. Here these
packages are hidden from them, as on a machine that lacks them, where slagen runs as well.

A library must not do that, since a program that imports slagen may load a LoRA, compile a model or distribute it over
processes. So only commands that do none of this call it, in a process that ends with them.
"""

import importlib
import sys
from collections.abc import Collection
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any

OPTIONAL = ("peft", "bitsandbytes", "gguf", "scipy", "sklearn", "torchvision")  # none is a dependency of slagen
DYNAMO = "torch._dynamo"
ALONE = "torch._dynamo._trace_wrapped_higher_order_op"  # transformers' masks use it; it needs nothing of its package


def leave_out(*, keep: Collection[str] = ()) -> None:
    """Have diffusers and transformers, once they are imported, leave out what this process does not need.

    Args:
        keep: of OPTIONAL, what the run does need.
    Does nothing where diffusers or transformers was imported already: they have looked around by then.
    """
    if {"diffusers", "transformers"} & sys.modules.keys():
        return
    for name in OPTIONAL:
        if name not in keep and name not in sys.modules:
            sys.modules[name] = None  # type: ignore[assignment]  # an import fails, and find_spec finds nothing
    import torch.distributed

    if DYNAMO not in sys.modules:
        sys.modules[DYNAMO] = _Dynamo(DYNAMO)
        sys.meta_path.insert(0, _Submodules())
    from transformers.utils.import_utils import is_torch_distributed_available

    available = torch.distributed.is_available
    torch.distributed.is_available = lambda: False
    try:
        is_torch_distributed_available()  # keeps its first answer
    finally:
        torch.distributed.is_available = available


def _unchanged(function: Any = None, *args: Any, **options: Any) -> Any:
    """A decorator, with or without arguments, that leaves the function as it is."""
    return _unchanged if function is None else function


class _Dynamo(ModuleType):
    """Stands in for torch._dynamo until something is compiled; any other attribute loads the real package.

    It has what diffusers, transformers and PyTorch say to a compiler, which means nothing where none runs: three
    decorators, and the class of compiled modules.
    """

    __path__: list[str] = []
    allow_in_graph = assume_constant_result = disable = staticmethod(_unchanged)
    eval_frame = SimpleNamespace(OptimizedModule=type("OptimizedModule", (), {}))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(_true_dynamo(), name)


class _Submodules(MetaPathFinder, Loader):
    """Finds the submodules of torch._dynamo while `_Dynamo` stands in for it."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if not name.startswith(DYNAMO + ".") or not isinstance(sys.modules.get(DYNAMO), _Dynamo):
            return None
        torch = find_spec("torch")
        if name == ALONE and torch is not None and torch.submodule_search_locations:
            return PathFinder.find_spec(name, [f"{folder}/_dynamo" for folder in torch.submodule_search_locations])
        _true_dynamo()
        return ModuleSpec(name, self)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return importlib.import_module(spec.name)  # of the true package by now

    def exec_module(self, module: ModuleType) -> None:
        """It has run."""


def _true_dynamo() -> ModuleType:
    if isinstance(sys.modules.get(DYNAMO), _Dynamo):
        del sys.modules[DYNAMO]
    return importlib.import_module(DYNAMO)
