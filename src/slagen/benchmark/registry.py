"""Every method that `slagen bench` compares: slagen's own, and attention of other libraries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from slagen.attention import protocol, registry
from slagen.attention.delta.correction import corrected
from slagen.attention.delta.method import with_delta
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
            return corrected(module(q, k, v, inputs), q, k, v, record.delta)

        return attend

    return build


def _dense(name: str) -> Callable[[Setting], Attend]:
    return lambda setting: dense_kernel(name, setting.device)


def all_methods(delta: int | None = None) -> tuple[Contender, ...]:
    """slagen's own methods, dense attention by each of its backends, and other libraries' sparse attention.

    Args:
        delta: corrects slagen's own.
    """
    records = [with_delta(each, delta) for each in registry.METHODS.values() if each.family != "dense"]
    own = [Contender(each.name, each.family, _own(each), record=each) for each in records]
    dense = [
        Contender(each.name, "dense", _dense(each.name), each.backward, each.error_limit, each.package)
        for each in DENSE.backends if each.name != "auto"
    ]  # fmt: skip
    return (*own, *dense, *OTHER_LIBRARIES)
