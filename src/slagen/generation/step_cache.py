"""What a run with --cache computed: blocks, FLOPs and densities, where not every block ran in every pass. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from slagen.attention import registry
from slagen.attention.cost import dense_attention_flops
from slagen.attention.delta.method import exact_share
from slagen.generation.cache_use import StepCacheUse
from slagen.timing import StepRecorder, StepTimes
from slagen.wan.caches import read_cache

if TYPE_CHECKING:
    from slagen.generation.resolve import Plan

Ran = Sequence[Sequence[int]]  # the passes in which each block ran, by step


def blocks_ran(steps: Sequence[StepTimes]) -> list[list[int]] | None:
    """By step and layer, the passes that ran; None without a cache."""
    ran = [step.blocks_ran for step in steps if step.blocks_ran is not None]
    return ran if len(ran) == len(steps) and ran else None


def use_of(plan: Plan, recorder: StepRecorder) -> StepCacheUse | None:
    """What a report says of a plan's cache; None without one."""
    ran = blocks_ran(recorder.steps)
    if plan.config.cache is None or ran is None:
        return None
    cache, by_step = read_cache(plan.config.cache), len(ran[0]) * (2 if (plan.config.guidance_scale or 0) > 1 else 1)
    skipped = [by_step - sum(layers) for layers in ran]
    given = {name: value for name, value in cache.parameters.items() if value is not None}
    return StepCacheUse(cache.name, given, by_step * len(ran), sum(skipped), skipped, recorder.cache_ratios)


def attention_flops(plan: Plan, densities: Sequence[float | None], ran: Ran) -> int:
    """FLOPs of self-attention in all blocks that ran.

    Args: densities: as in `Plan.attention_flops`.
    """
    shape, schedule = plan.weights.source.shape, plan.schedule
    full, bare = dense_attention_flops(shape, plan.num_tokens), registry.get(plan.config.attention)
    estimate = schedule.mean(lambda config: bare.density(config, plan.grid))
    total = 0.0
    for step, layers in enumerate(ran):
        own = schedule.flops_by_layer(step, shape)
        for layer, passes in enumerate(layers):
            counted_density = densities[layer] if layer < len(densities) else None
            dense = step in schedule.dense.steps or layer in schedule.dense.layers
            more = 0.0 if counted_density is None or dense else full * (counted_density - estimate)
            total += passes * (full if dense else own[layer] + more) / shape.num_layers
    return round(total)


def density_section(plan: Plan, densities: Sequence[float | None], ran: Ran) -> dict[str, Any]:
    """As `report.density_section`, of the passes of each layer that ran."""
    dense, exact = plan.dense, exact_share(plan.num_tokens, plan.config.delta)
    if not any(density is not None for density in densities):
        return {}
    layers, attended, passes = list[float | None](), 0.0, 0
    for layer, density in enumerate(densities):
        all_ran = sum(step[layer] for step in ran)
        exactly = sum(own[layer] for step, own in enumerate(ran) if step in dense.steps or layer in dense.layers)
        sparse = all_ran - exactly
        known = not sparse or density is not None
        value = exactly + sparse * (exact + (1 - exact) * (density or 0.0))
        layers.append(value / all_ran if known and all_ran else None)
        if known:
            attended, passes = attended + value, passes + all_ran
    return {"density": attended / passes, "layer_densities": layers} if passes else {}
