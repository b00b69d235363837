"""What a method is to `slagen bench`: how it is built, and the reference that it is validated against."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from slagen.attention import protocol, registry
from slagen.attention.protocol import Attend, Grid, Inputs, Layer, StepContext, Unavailable
from slagen.attention.sla.config import SLAConfig
from slagen.errors import EnvironmentProblem


@dataclass(frozen=True)
class Setting:
    """What a method is built for: SLA's settings and weights, which other libraries take too, and where it runs.

    Args:
        own: options that only some methods have, by name.
        grid: how the tokens are arranged; None is in one row.
    """

    config: SLAConfig
    weight: Tensor
    bias: Tensor
    backend: Any
    device: torch.device
    dtype: torch.dtype
    num_heads: int = 1
    own: Mapping[str, Any] = field(default_factory=dict)
    grid: Grid | None = None

    @property
    def options(self) -> dict[str, Any]:
        """The settings by name, of which a method takes those that it knows."""
        return {**dataclasses.asdict(self.config), **self.own}


@dataclass(frozen=True)
class Contender:
    """One way to attend.

    Args:
        kind: "sla", "sparse" or "dense": whose reference it is validated against, if it has none of its own.
        error_limit: of another's, the largest error to the reference, in units of the largest output.
        package: what it is imported from, where that need not be installed.
        record: of slagen's own method; None for another's.
    """

    name: str
    kind: str
    build: Callable[[Setting], Attend]
    backward: bool = True
    error_limit: float | None = None
    package: str | None = None
    record: protocol.Method | None = None

    @property
    def absent(self) -> bool:
        """Whether the package that it takes is not installed."""
        return self.package is not None and importlib.util.find_spec(self.package) is None

    @property
    def takes_sparsity(self) -> bool:
        """Whether its work depends on the sparsity."""
        return self.kind != "dense" if self.record is None else "sparsity" in self.record.option_names

    @property
    def by_default(self) -> bool:
        """Whether it runs where no method is named."""
        return self.record is None or self.record.benched

    def make(self, setting: Setting) -> Attend:
        """Raises Unavailable where this machine can not run it."""
        if self.absent:
            raise Unavailable("not installed")
        return self.build(setting)

    def limit(self, setting: Setting) -> float:
        """The largest error to the reference, in units of the largest output."""
        given = (
            self.error_limit if self.record is None else self.record.error_limit(method_config(self.record, setting))
        )
        return given or 32 * torch.finfo(setting.dtype).eps

    def exact(self, setting: Setting, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The exact output, by the reference."""
        if self.record is not None:
            module, inputs = build_module(self.record, setting, q)
            begin_pass(module, inputs)
            parameters = {name: x.to(q.dtype) for name, x in module.state_dict().items()}
            return self.record.reference(module.config, q, k, v, parameters, inputs)
        parameters = {"proj_l.weight": setting.weight, "proj_l.bias": setting.bias}
        record = registry.get(self.kind)
        config = setting.config if record.config is SLAConfig else record.config()
        return record.reference(config, q, k, v, parameters, None)


def method_config(record: protocol.Method, setting: Setting, grid: Grid | None = None) -> Any:
    """A method's config at a setting, for tokens in a grid; without one as far as it depends on none."""
    return record.configure(record.config(), record.own(setting.options), grid or setting.grid or Grid.flat(1))


def build_module(record: protocol.Method, setting: Setting, q: Tensor) -> tuple[Any, Inputs]:
    """A method's module at a setting, with random parameters, and the inputs of each call.

    Args:
        q: (B, H, L, D), as in the calls.
    """
    grid = setting.grid or Grid.flat(q.shape[2])
    config = method_config(record, setting, grid)
    layer = Layer(0, 1, setting.num_heads, setting.weight.shape[0])
    names = [backend.name for backend in record.backends]
    backend = setting.backend if setting.backend in names else "auto"
    generator = torch.Generator().manual_seed(1)
    with torch.inference_mode(False):  # a backward pass may follow
        module: Any = record.build(config, layer, backend, setting.device)
        for parameter in module.requires_grad_(False).parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(drawn.mul_(parameter.shape[-1] ** -0.5) if parameter.ndim > 1 else drawn)
        hidden_states = _drawn(setting, q, q.shape[2]) if record.needs.hidden_states else None
        if not record.takes_context(config):
            return module, Inputs(layer, StepContext(), hidden_states)
        context = StepContext(grid=grid, time_embedding=_drawn(setting, q), position=torch.full((2,), -1))
    return module, Inputs(layer, context, hidden_states, kept={})


def _drawn(setting: Setting, q: Tensor, *sizes: int) -> Tensor:
    """Random (B, *sizes, H * D), alike for q of every dtype."""
    generator, channels = torch.Generator(q.device).manual_seed(2), q.shape[1] * q.shape[3]
    drawn = torch.randn(q.shape[0], *sizes, channels, generator=generator, device=q.device)
    return drawn.to(setting.dtype).to(q.dtype)


def begin_pass(module: Any, inputs: Inputs) -> None:
    """A forward pass begins, as outside a denoising loop: nothing is remembered."""
    if inputs.kept is None:
        return  # nobody asks
    inputs.kept.clear()
    inputs.context.begin_pass(inputs.context.grid)
    if hasattr(module, "begin_pass"):
        module.begin_pass(inputs.context)


def unavailable(name: str, reason: str) -> EnvironmentProblem:
    """The error for a method that was named and cannot run here."""
    return EnvironmentProblem(
        f"{name} cannot run on this machine: {reason.removesuffix('.')}. Leave it out of --method."
    )
