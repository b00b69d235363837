"""The wrapper `delta`: any sparse method, and one exact query row of every N. No torch here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from slagen.attention.cost import ModelShape, dense_attention_flops
from slagen.attention.protocol import Addition, Attend, Grid, Inputs, Method
from slagen.errors import UsageError
from slagen.io.forms import shown

if TYPE_CHECKING:
    from torch import Tensor

DELTA = Addition(
    name="delta",
    kind="wrapper",
    summary="any sparse method, corrected by its error in one query row of every N (delta attention)",
    help="Correct any sparse method: compute one of every N query rows exactly, and add its difference from the sparse "
    "result to all N rows.",
    example="--delta 64",
)


def check_delta(stride: object) -> None:
    """Raise UsageError for what is neither None nor a number of rows."""
    if stride is not None and (type(stride) is not int or stride < 1):
        raise UsageError(f"delta is {shown(stride)}, but must be a whole number of at least 1. Try --delta 64.")


def exact_share(num_tokens: int, stride: int | None) -> float:
    """The fraction of all query rows that is attended exactly: the first of every `stride`; None is none."""
    return 0.0 if stride is None else -(-num_tokens // stride) / num_tokens


def with_delta(method: Method, stride: int | None) -> Method:
    """A sparse method with one exact row of every `stride`; None is the method itself. Other records stay the same.

    What it computes stands at the head of `reference.py`. Whoever calls the method's module hands its output to
    `correction.corrected`. Raises: UsageError for what is no number of rows, and for dense attention.
    """
    check_delta(stride)
    if stride is None:
        return method
    if method.family == "dense":
        raise UsageError("--delta corrects sparse attention, and dense attention has no such error. Leave --delta out.")
    both = (method, stride)
    return dataclasses.replace(
        method, delta=stride, cost=partial(_cost, *both), density=partial(_density, *both),
        describe=partial(_describe, *both), note=partial(_note, *both), reference=partial(_reference, *both),
        parts=partial(_parts, *both),
    )  # fmt: skip


def _cost(method: Method, stride: int, config: Any, shape: ModelShape, grid: Grid) -> int:
    full, share = dense_attention_flops(shape, grid.num_tokens), exact_share(grid.num_tokens, stride)
    return method.cost(config, shape, grid) + round(share * full)


def _density(method: Method, stride: int, config: Any, grid: Grid) -> float:
    share = exact_share(grid.num_tokens, stride)
    return share + (1 - share) * method.density(config, grid)


def _describe(method: Method, stride: int, config: Any, grid: Grid) -> dict[str, Any]:
    return {**method.describe(config, grid), "delta": stride}


def _note(method: Method, stride: int, config: Any, options: Mapping[str, Any], grid: Grid) -> str:
    rows = -(-grid.num_tokens // stride)
    own = f"delta {stride} -> {rows} of {grid.num_tokens} query rows computed exactly"
    note = method.note(config, options, grid)
    return own if note is None else f"{note}; {own}"


def _parts(
    method: Method, stride: int, module: Any, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs
) -> dict[str, Attend]:
    from slagen.attention.delta.correction import corrected

    own = {} if method.parts is None else method.parts(module, q, k, v, inputs)
    o = module(q, k, v, inputs)
    return {**own, "correction": lambda q, k, v: corrected(o, q, k, v, stride)}


def _reference(
    method: Method, stride: int, config: Any, q: Tensor, k: Tensor, v: Tensor, parameters: Mapping[str, Tensor],
    inputs: Inputs | None,
) -> Tensor:  # fmt: skip
    from slagen.attention.delta.reference import reference_correction

    return reference_correction(method.reference(config, q, k, v, parameters, inputs), q, k, v, stride)
