"""What a report says of the blocks that a cache skipped. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from slagen.io.text import counted


@dataclass(frozen=True)
class StepCacheUse:
    """What a cache skipped.

    Args:
        name, parameters: of the cache. blocks: of all steps and passes. skipped: of these, and skipped_by_step.
        ratios: by step, where the run measured those that the cache mag takes.
    """

    name: str
    parameters: dict[str, float]
    blocks: int
    skipped: int
    skipped_by_step: list[int]
    ratios: list[float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Its object in the JSON."""
        return {name: value for name, value in vars(self).items() if name != "ratios" or value is not None}


def describe_use(use: StepCacheUse) -> str:
    """How many blocks a cache has skipped, in a line."""
    share = use.skipped / use.blocks
    return f"the cache {use.name} skipped {use.skipped} of {counted(use.blocks, 'block')} ({share:.0%})"
