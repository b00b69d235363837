"""diffusers' step caches around a Wan transformer's blocks: for one clip, with a count of the blocks that ran."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import diffusers
import torch
from diffusers import WanTransformer3DModel

from slagen.errors import EnvironmentProblem
from slagen.wan.caches import StepCache
from slagen.wan.processor import self_attention_layers

CONFIGS = {
    "first-block": "FirstBlockCacheConfig", "mag": "MagCacheConfig", "sea": "SeaCacheConfig",
    "taylorseer": "TaylorSeerCacheConfig",
}  # fmt: skip
LEADER = "mag_cache_leader_block_hook"


class BlockCount:
    """How often each block of a transformer ran.

    Args: measured: the ratios of mag so far, where it measures them.
    """

    def __init__(self, num_layers: int, measured: Callable[[], list[float]] | None) -> None:
        self.ran = [0] * num_layers
        self.ratios: list[float] | None = None
        self._measured = measured

    def take(self) -> list[int]:
        """In the step that has ended, by block."""
        ran, self.ran = self.ran, [0] * len(self.ran)
        if self._measured is not None:
            self.ratios = self._measured()  # now, for the pipeline has hooks forget all after the last step
        return ran


@contextmanager
def caching(transformer: WanTransformer3DModel, cache: StepCache, num_steps: int) -> Iterator[BlockCount]:
    """Within it, blocks are skipped as a cache decides. It forgets all when the block ends.

    Raises: EnvironmentProblem where diffusers does not have the cache.
    """
    layers = self_attention_layers(transformer)
    count = BlockCount(len(layers), partial(_measured, transformer) if cache.calibrates else None)

    def counted(layer: int) -> Any:
        def count_one(*_: Any) -> None:
            count.ran[layer] += 1

        return count_one

    transformer.enable_cache(_config(cache, num_steps))
    hooks = [attn.register_forward_hook(counted(layer)) for layer, attn in enumerate(layers)]
    try:
        yield count
    finally:
        transformer.disable_cache()
        for hook in hooks:
            hook.remove()


def _config(cache: StepCache, num_steps: int) -> Any:
    kind = getattr(diffusers, CONFIGS[cache.name], None)
    if kind is None:
        raise EnvironmentProblem(
            f"diffusers {diffusers.__version__} has no {CONFIGS[cache.name]}. Install a newer one: "
            "pip install -U diffusers."
        )
    options: dict[str, Any] = dict(cache.parameters)
    if cache.name == "taylorseer":  # blocks are skipped as a whole, and what the model gives in the end is extrapolated
        return kind(**options, use_lite_mode=True, taylor_factors_dtype=torch.float32)
    if cache.name == "mag":
        options["calibrate"] = cache.calibrates
        # One step more than there are: after its last one diffusers forgets what it has measured.
        more = {"num_inference_steps": num_steps + 1} if cache.calibrates else {"num_inference_steps": num_steps}
        return kind(**options, **more, mag_ratios=list(cache.ratios) or None)
    return kind(**options)


def _measured(transformer: Any) -> list[float]:
    """The ratios by step, the mean of both guidance passes."""
    states = transformer.blocks[0]._diffusers_hook.get_hook(LEADER).state_manager._state_cache.values()
    return [statistics.fmean(ratios) for ratios in zip(*(state.calibration_ratios for state in states), strict=True)]
