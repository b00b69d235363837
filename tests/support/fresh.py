"""Modules of slagen that are imported anew, as when a record or a config has one more entry from the start."""

import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any


def import_anew(monkeypatch: Any, *names: str) -> Callable[[str], ModuleType]:
    """Forget modules until the end of the test, without the "slagen." of their names.

    Returns: what imports a module by such a name.
    """
    found = [importlib.import_module(f"slagen.{name}") for name in names]  # to be put back
    for module in found:
        package, _, leaf = module.__name__.rpartition(".")
        monkeypatch.delitem(sys.modules, module.__name__)
        monkeypatch.delattr(importlib.import_module(package), leaf)
    return lambda name: importlib.import_module(f"slagen.{name}")
