"""`attend`: any attention method that keeps nothing from call to call, on tensors, by name."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from slagen.attention import registry
from slagen.attention.delta.correction import corrected
from slagen.attention.delta.method import with_delta
from slagen.attention.protocol import Grid, Inputs, Layer, StepContext
from slagen.attention.sla.functional import check_qkv
from slagen.errors import UsageError
from slagen.settings import no_argument, without_complement


@torch.compiler.disable  # it builds a module; compile that instead
def attend(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid: Grid | tuple[int, int, int] | None = None,
    backend: str = "auto",
    delta: int | None = None,
    **options: Any,
) -> Tensor:
    """Attend by the method of a name: `slagen.attend("sol", q, k, v, tau=1.3)`.

    Args:
        name: of a method without learned weights or memory; `slagen.methods()` lists them with their options.
        q, k, v: (B, H, L, D) of one dtype and device.
        grid: (latent frames, rows, columns) of the L tokens, needed by methods that depend on it.
        backend: one of the method's own.
        delta: attend one query row of so many exactly, and correct the others by it; not of dense attention.
        options: of the method, keep among them for 1 - sparsity; what is left out is at its default.
    Returns: o, (B, H, L, D).
    Raises: UsageError, a SlagenError, for an unknown method, one with learned weights, a value out of range, a backend
        that it does not have, a grid that is missing or is not L tokens; TypeError for an option that it does not have;
        ValueError for tensors that do not fit.
    """
    method = with_delta(registry.get(name), delta)
    if "sparsity" in method.option_names:
        options = without_complement(options, "keep", "sparsity")
    for option in options:
        if option not in method.option_names:
            raise no_argument("attend", option, method.option_names)
    method.check_backend(backend)
    if method.memory is not None:
        raise UsageError(
            f"{name} attention keeps tensors from one denoising step to the next, which attend() cannot do. Use "
            "generate()."
        )
    check_qkv(q, k, v)
    layer = Layer(0, 1, q.shape[1], q.shape[3])
    context = StepContext()
    context.begin_pass(_grid(grid, q.shape[2]))
    config = method.configure(method.config(), method.own(options), context.grid or Grid.flat(q.shape[2]))
    if grid is None and method.takes_context(config):
        order = " in cube order" if getattr(config, "order", "raster") == "cube" else ""
        raise UsageError(
            f"{name} attention{order} depends on how the tokens are arranged. Give grid=(latent frames, rows, columns)."
        )
    backend = method.pick_backend(backend, q.shape[3], q.device, q.dtype, config)
    module = method.build(config, layer, backend, q.device)
    learned = [each.name for each in method.parameters if each.used and getattr(module, each.name, None) is not None]
    if learned:
        raise UsageError(
            f"{name} attention needs learned weights ({', '.join(learned)}), which attend() cannot take. Use "
            "generate()."
        )
    if (begin_pass := getattr(module, "begin_pass", None)) is not None:
        begin_pass(context)
    return corrected(module(q, k, v, Inputs(layer, context, kept={})), q, k, v, delta)


def _grid(grid: Grid | tuple[int, int, int] | None, num_tokens: int) -> Grid:
    """The arrangement of the tokens. Raises UsageError unless it is three numbers, and there are as many tokens."""
    if grid is None:
        return Grid.flat(num_tokens)
    sizes = dataclasses.astuple(grid) if isinstance(grid, Grid) else grid
    if not isinstance(sizes, tuple | list) or [type(size) for size in sizes] != [int] * 3:
        raise UsageError(
            f"grid is {repr(grid)[:60]}, but must be three whole numbers. Give grid=(latent frames, rows, columns)."
        )
    made = Grid(*sizes)
    if made.num_tokens != num_tokens or min(made.num_frames, made.height, made.width) < 1:
        raise UsageError(
            f"grid is {made.num_frames} x {made.height} x {made.width} ({made.num_tokens} tokens), but q has "
            f"{num_tokens} tokens. Give grid=(latent frames, rows, columns) of q, or leave grid out."
        )
    return made
