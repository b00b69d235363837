"""The methods `sla`, and its branches `sparse` and `linear` alone. No torch here."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, get_args

from slagen.attention.cost import ModelShape
from slagen.attention.cubes import note_of_order
from slagen.attention.protocol import Backend, Grid, Inputs, Layer, Method, Needs, ParameterGroup
from slagen.attention.selectors import note_of_selector
from slagen.attention.sla import config as settings
from slagen.attention.sla.config import SLAConfig
from slagen.attention.sla.cost import block_counts, density, describe_blocks, sla_attention_flops
from slagen.errors import UsageError
from slagen.io.forms import shown

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from slagen.attention.sla.functional import Branches


def _build(
    branches: Branches, config: SLAConfig, layer: Layer, backend: str, device: torch.device | str | None
) -> nn.Module:
    from slagen.attention.sla.layer import SLA

    return SLA(layer, config, backend=backend, branches=branches, device=device)  # type: ignore[arg-type]


def _cost(branches: Branches, config: SLAConfig, shape: ModelShape, grid: Grid) -> int:
    sparse, linear = branches != "linear", branches != "sparse"
    return sla_attention_flops(shape, grid.num_tokens, config, sparse=sparse, linear=linear)


def _reference(
    branches: Branches, config: SLAConfig, q: Tensor, k: Tensor, v: Tensor, parameters: Mapping[str, Tensor],
    inputs: Inputs | None,
) -> Tensor:  # fmt: skip
    from slagen.attention.ranking import seeds_of
    from slagen.attention.sla.functional import sparse_linear_attention

    weight, bias = parameters["proj_l.weight"].to(q.dtype), parameters["proj_l.bias"].to(q.dtype)
    grid = None if inputs is None else inputs.context.grid
    return sparse_linear_attention(
        q, k, v, config, weight, bias, backend="reference", branches=branches, grid=grid, seeds=seeds_of(inputs, q)
    )


BACKENDS = tuple(map(Backend, get_args(settings.Backend)))


def choose_backend(name: str, head_dim: int, device: torch.device, dtype: torch.dtype, config: Any) -> str:
    """Of BACKENDS the one that runs: for every method that works by SLA's kernels. Raises EnvironmentProblem."""
    from slagen.attention.sla.backends import pick_backend

    return pick_backend(name, head_dim, device, dtype)  # type: ignore[arg-type]


def _check(backend: str, head_dim: int, device: torch.device, dtype: torch.dtype, config: SLAConfig) -> None:
    from slagen.attention.sla.backends import check_kernels

    check_kernels(backend, head_dim, device, dtype, config)


def _parts(module: Any, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs) -> dict[str, Any]:
    from slagen.attention.sla.stages import stages

    return stages(module, q, k, v, module.cubes_in(inputs, q))


def _configure(config: SLAConfig, options: Mapping[str, Any], grid: Grid) -> SLAConfig:
    return config.with_options(options, grid.num_tokens)


def _configure_linear(config: SLAConfig, options: Mapping[str, Any], grid: Grid) -> SLAConfig:
    made = _configure(config, options, grid)
    for name in ("selector", "order"):
        if options.get(name) is not None and made.linear_domain == "all":
            raise UsageError(
                f"{name} is {shown(options[name])}, but linear attention over all tokens chooses no key blocks. Leave "
                f"--{name} out."
            )
    return made


def _describe(config: SLAConfig, grid: Grid) -> dict[str, Any]:
    return {**config.to_dict(), **describe_blocks(config, grid.num_tokens)}


def _describe_linear(config: SLAConfig, grid: Grid) -> dict[str, Any]:
    """No block is critical. Over all tokens every one is marginal; otherwise those that are not are left out."""
    blocks = block_counts(config, grid.num_tokens)
    count = blocks["key_blocks"]
    marginal = count if config.linear_domain == "all" else blocks["marginal"]
    counts = {"critical": 0, "negligible": count - marginal, "marginal": marginal}
    fractions = {name: number / count for name, number in counts.items()}
    return {**config.to_dict(), **blocks, **counts, "fractions": fractions}


def _applies(config: SLAConfig, grid: Grid) -> bool:
    return config.num_blocks(grid.num_tokens)[1] >= 2


def _density(config: SLAConfig, grid: Grid) -> float:
    return density(config, grid.num_tokens)


def _note(config: SLAConfig, options: Mapping[str, Any], grid: Grid) -> str:
    counts, topk = block_counts(config, grid.num_tokens), options.get("sla_topk")
    asked = f"sparsity {config.sparsity:g}" if topk is None else f"sla-topk {topk:g}"
    kept = f"{asked} -> {counts['critical']} of {counts['key_blocks']} key blocks per query block"
    return kept + note_of_selector(config.selector) + note_of_order(config.order)


def _method(name: str, summary: str, branches: Branches, projection: ParameterGroup, **others: Any) -> Method:
    return Method(
        name=name,
        summary=summary,
        config=SLAConfig,
        needs=Needs(training=True, weights=True),
        cost=functools.partial(_cost, branches),
        build=functools.partial(_build, branches),
        reference=functools.partial(_reference, branches),
        backends=BACKENDS,
        choose_backend=choose_backend,
        check=_check,
        parameters=(projection,),
        options=("sla_topk",),
        applies=_applies,
        **{"note": _note, "configure": _configure, "describe": _describe, "density": _density, **others},
    )


SLA = _method(
    "sla", "exact attention to the highest-scoring key blocks, linear attention for the rest", "both",
    ParameterGroup("proj_l"), family="sla", parts=_parts,
)  # fmt: skip
SPARSE = _method(
    "sparse", "only the sparse branch of sla", "sparse", ParameterGroup("proj_l", used=False),
    family="sparse",
)  # fmt: skip
LINEAR = _method(
    "linear", "only the linear branch of sla", "linear", ParameterGroup("proj_l", identity=True),
    family="sla", note=lambda config, options, grid: None, benched=False, configure=_configure_linear,
    describe=_describe_linear, density=lambda config, grid: 0.0,
)  # fmt: skip
