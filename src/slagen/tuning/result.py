"""What `slagen tune` found, typed, and the JSON of it: a schedule file that says how it was made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slagen.attention.schedule_file import LayerSchedule
from slagen.device import Device


@dataclass(frozen=True)
class Priced:
    """A schedule with its cost and its error.

    Args:
        text: as --sparsity-schedule takes it. sparsity: where all layers have one; otherwise None.
        flops: of self-attention in all steps of a clip, of one pass each, computed.
        error: relative L2 error of the velocity to dense attention's, of all clips together.
    """

    text: str
    sparsity: float | None
    flops: int
    error: float

    def to_dict(self, dense_flops: int) -> dict[str, Any]:
        """Its object in the JSON."""
        own = {"schedule": self.text} if self.sparsity is None else {"sparsity": self.sparsity}
        return {**own, "velocity_error": self.error, "attention_flops": self.flops,
                "attention_flops_share": self.flops / dense_flops}  # fmt: skip


@dataclass(frozen=True)
class CurvePoint:
    """What may be spent, and the errors on prompts that were not tuned on.

    Args:
        budget: FLOPs of self-attention. uniform: one sparsity in all layers that costs this; None between two of them.
        tuned: the best schedule for it.
    """

    budget: int
    uniform: Priced | None
    tuned: Priced

    @property
    def is_below(self) -> bool | None:
        """Whether the tuned schedule's error is lower; None where there is nothing to compare, or they are one."""
        if self.uniform is None or self.uniform.error == self.tuned.error:
            return None
        return self.tuned.error < self.uniform.error

    def to_dict(self, dense_flops: int) -> dict[str, Any]:
        """Its object in the JSON."""
        uniform = None if self.uniform is None else self.uniform.to_dict(dense_flops)
        return {"budget": self.budget, "budget_share": self.budget / dense_flops, "one_sparsity": uniform,
                "tuned": self.tuned.to_dict(dense_flops), "below": self.is_below}  # fmt: skip


@dataclass(frozen=True)
class Tuned:
    """What `slagen tune` found.

    Args:
        schedule: what the file is for. max_error: the bound. chosen: the schedule with its cost and error.
        uniform: one sparsity in all layers, for each candidate, with the error in the measured steps.
        prompts, held_out: (prompt, seed) of the clips. measured_steps: in which single layers were changed.
        changes: by part of the steps, layer and candidate, what the layer alone adds to the squared error.
        candidates: the sparsities that there were to choose from, each of another number of blocks.
        curve: for several costs, on the held-out clips; empty where it was not asked for.
        settings: by option name, of what all clips have in common. dense_flops: of dense attention.
        created, versions, device, path: as in a report.
    """

    schedule: LayerSchedule
    max_error: float
    chosen: Priced
    uniform: list[Priced]
    prompts: list[tuple[str, int]]
    held_out: list[tuple[str, int]]
    measured_steps: list[int]
    candidates: list[float]
    changes: list[dict[str, Any]]
    curve: list[CurvePoint]
    settings: dict[str, Any]
    dense_flops: int
    created: str
    versions: dict[str, str]
    device: Device
    path: Path

    def to_dict(self) -> dict[str, Any]:
        """What the file and --json hold."""
        clips = {"prompts": self.prompts, "held_out": self.held_out}
        return {
            **self.schedule.to_dict(), "created": self.created,
            "tuned": {
                "max_error": self.max_error, **self.chosen.to_dict(self.dense_flops),
                "dense_attention_flops": self.dense_flops, "candidates": self.candidates,
                **{name: [{"prompt": prompt, "seed": seed} for prompt, seed in own] for name, own in clips.items()},
                "measured_steps": self.measured_steps,
                "one_sparsity": [each.to_dict(self.dense_flops) for each in self.uniform],
                "changes": self.changes, "curve": [point.to_dict(self.dense_flops) for point in self.curve],
            },
            "settings": self.settings, "versions": self.versions, "device": self.device.to_dict(),
        }  # fmt: skip
