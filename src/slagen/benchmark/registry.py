"""Every method that `slagen bench` compares: slagen's own, and attention of other libraries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from slagen.attention import protocol, registry
from slagen.attention.dense.kernels import dense_kernel
from slagen.attention.dense.method import DENSE
from slagen.attention.protocol import Attend, Inputs
from slagen.benchmark.methods import Contender, Setting, begin_pass, build_module
from slagen.benchmark.other_libraries import OTHER_LIBRARIES


def _own(record: protocol.Method) -> Callable[[Setting], Attend]:
    def build(setting: Setting) -> Attend:
        made: list[tuple[Any, Inputs]] = []

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if not made:
                made.append(build_module(record, setting, q))
            module, inputs = made[0]
            begin_pass(module, inputs)
            return module(q, k, v, inputs)  # type: ignore[no-any-return]

        return attend

    return build


def _dense(name: str) -> Callable[[Setting], Attend]:
    return lambda setting: dense_kernel(name, setting.device)


def all_methods() -> tuple[Contender, ...]:
    """slagen's own methods, dense attention by each of its backends, and other libraries' sparse attention."""
    records = [registry.get(name) for name in registry.names()]
    own = [Contender(each.name, each.family, _own(each), record=each) for each in records if each.family != "dense"]
    dense = [
        Contender(each.name, "dense", _dense(each.name), each.backward, each.error_limit, each.package)
        for each in DENSE.backends if each.name != "auto"
    ]  # fmt: skip
    return (*own, *dense, *OTHER_LIBRARIES)
