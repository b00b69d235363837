"""What `slagen plan` and `slagen models` say, typed: the estimate of a run, and the presets. No torch here."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from slagen.attention.sla.config import SLAConfig
from slagen.wan.presets import Preset


@dataclass(frozen=True)
class Flops:
    """FLOPs of one transformer forward of one sample, 2 for each multiply-add.

    Args:
        sla_forward, sla_attention: with the method that is named `flops_of` in the estimate.
        other: all but the self-attention.
    """

    dense_forward: int
    sla_forward: int
    dense_attention: int
    sla_attention: int
    other: int


@dataclass(frozen=True)
class TotalFlops:
    """FLOPs of all forward passes of a run, with dense attention and with the method."""

    dense: int
    sla: int


@dataclass(frozen=True)
class StageMemory:
    """GiB of a stage on a card: its weights, and what it needs beside them."""

    weights: float
    activations: float


@dataclass(frozen=True)
class CpuMemory:
    """GiB of a run on a CPU: all weights, what denoising and decoding need beside them, the peak, what is available."""

    weights: float
    denoise: float
    decode: float
    peak: float
    left: float


@dataclass(frozen=True)
class RunMemory:
    """GiB that a run takes.

    Args:
        stages: "text", "denoise" and "decode" on a card.
        gpu_peak_all_resident, gpu_peak_offloaded: with all models on the card, and with one at a time. host: beside it.
    """

    stages: dict[str, StageMemory]
    gpu_peak_all_resident: float
    gpu_peak_offloaded: float
    host: float
    estimated: bool
    cpu: CpuMemory


@dataclass(frozen=True)
class Download:
    """A hub's repository that a first run fetches, and its size."""

    repository: str
    gib: float
    estimated: bool = True


@dataclass(frozen=True)
class RunEstimate:
    """What a run will be.

    Args:
        settings: by name, with the attention method's own options. With dense attention the sparsity is None.
        trained_sparsity: of the weights; None without any, and if only their tensors show it.
        query_blocks, key_blocks, tail_tokens, topk_blocks: None for a method without blocks.
        kept_fraction: of all query-key pairs, those attended exactly.
        flops: of one forward pass. flops_of: the method they are of; SLA beside dense attention.
        flops_speedup: dense over the method's, of a whole forward pass. amdahl_ceiling: with free attention.
        forward_passes: of one video, with guidance two a step.
        device: the kind that it will run on; None where it is not known.
        outputs: file names. notes: what looks wrong.
        step_densities: the fraction of all query-key pairs attended exactly in each step, and step_attention_flops:
            FLOPs of the method in a forward pass of each; None where no --sparsity-schedule sets them.
    """

    model: str
    settings: dict[str, Any]
    trained_sparsity: float | None
    tokens: int
    query_blocks: int | None
    key_blocks: int | None
    tail_tokens: int | None
    topk_blocks: float | None
    kept_fraction: float
    flops: Flops
    flops_of: str
    flops_speedup: float
    amdahl_ceiling: float
    forward_passes: int
    total_flops: TotalFlops
    device: str | None
    memory_gib: RunMemory
    downloads: list[Download]
    outputs: list[str]
    notes: list[str]
    step_densities: list[float] | None = None
    step_attention_flops: list[int] | None = None

    def to_dict(self) -> dict[str, Any]:
        """What --json prints."""
        by_step = ("step_densities", "step_attention_flops")
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in by_step or v is not None}


@dataclass(frozen=True)
class ListedModel:
    """A preset, as `slagen models` lists it.

    Args:
        base, weights: hub repositories; None for the bundled model, and where the base's own weights are taken.
        size: width x height in pixels. flow_shift: None where the sampler takes none.
        sla: what its SLA weights were trained with; None without any.
        recommended_attention: the attention method to run its weights with, where that is not the default.
        takes_image: whether its videos begin with an image.
    """

    name: str
    about: str
    base: str | None
    weights: str | None
    size: str
    num_frames: int
    steps: int
    guidance_scale: float
    sampler: str
    flow_shift: float | None
    negative_prompt: str
    sla: SLAConfig | None
    recommended_attention: str | None
    takes_image: bool

    def to_dict(self) -> dict[str, Any]:
        """Its object in the JSON."""
        return {**vars(self), "sla": None if self.sla is None else self.sla.to_dict()}

    @classmethod
    def of(cls, preset: Preset) -> ListedModel:
        """The row of a preset."""
        defaults = preset.defaults
        return cls(
            name=preset.name, about=preset.about, base=preset.base, weights=preset.weights,
            size=f"{defaults.width}x{defaults.height}", num_frames=defaults.num_frames, steps=defaults.steps,
            guidance_scale=defaults.guidance_scale, sampler=defaults.sampler,
            flow_shift=None if defaults.sampler == "rcm" else defaults.flow_shift,
            negative_prompt=defaults.negative_prompt, sla=preset.sla, recommended_attention=preset.recommended,
            takes_image=preset.takes_image,
        )  # fmt: skip
