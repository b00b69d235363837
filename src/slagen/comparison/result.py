"""What a comparison found, typed: a row for each method, averages over prompts, and the JSON of it all."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from slagen.device import Device
from slagen.timing import quartiles

SCHEMA_VERSION = 1
RESAMPLES = 4000  # of a bootstrap interval
MEASURES = ("velocity_error", "latent_error", "psnr_db", "ssim", "lpips")


@dataclass
class Runs:
    """What one row gave for one prompt.

    Args:
        velocity_error: relative L2 error of the velocity to dense attention's, at the dense run's latents; None for
            another seed, which has no latents in common. layer_errors: the same for each layer's attention, to dense
            attention of the layer's own q, k, v.
        latent_error: relative L2 error of the final latents to the dense run's.
        psnr_db, ssim, lpips: of the frames, to the dense run's; None where infinite or unknown.
        density: the fraction of all query-key pairs that was attended exactly, on average.
        attention_ms, denoise_s: of each timed run: attention time of all steps, and the whole denoising.
    """

    velocity_error: float | None = None
    layer_errors: list[float] = field(default_factory=list)
    latent_error: float | None = None
    psnr_db: float | None = None
    ssim: float | None = None
    lpips: float | None = None
    density: float | None = None
    attention_ms: list[float] = field(default_factory=list)
    denoise_s: list[float] = field(default_factory=list)


@dataclass
class Row:
    """One method with its options, over all prompts.

    Args:
        method: its name, or that of a control. sparsity: 0 for dense, None for a method without one.
        options: others that differ from the method's own. trained: whether the weights that ran were trained for it;
            None where it needs none. backend: what ran.
        runs: of each prompt.
    """

    method: str
    sparsity: float | None
    options: dict[str, Any]
    trained: bool | None
    backend: str | None
    runs: list[Runs] = field(default_factory=list)

    @property
    def label(self) -> str:
        """What stands over its clip."""
        return self.method if not self.sparsity else f"{self.method} {self.sparsity:.4g}"

    def values(self, name: str) -> list[float]:
        """A measure of each prompt; those that are infinite or unknown are left out."""
        return [value for runs in self.runs if (value := getattr(runs, name)) is not None]

    def mean(self, name: str) -> float | None:
        """The mean of a measure over the prompts."""
        values = self.values(name)
        return statistics.fmean(values) if values else None

    @property
    def attention_ms(self) -> list[float]:
        """Of every timed run."""
        return [time for runs in self.runs for time in runs.attention_ms]

    @property
    def denoise_s(self) -> list[float]:
        """Of every timed run."""
        return [time for runs in self.runs for time in runs.denoise_s]

    @property
    def layer_errors(self) -> list[float]:
        """Of each layer, the mean over the prompts."""
        found = [runs.layer_errors for runs in self.runs if runs.layer_errors]
        return [statistics.fmean(layer) for layer in zip(*found, strict=True)]

    def to_dict(self, first: Row | None) -> dict[str, Any]:
        """Its object in the JSON; with several prompts, intervals, and differences to `first`, the first sparse row."""
        attention, denoise = quartiles(self.attention_ms), quartiles(self.denoise_s)
        content = {
            "method": self.method, "sparsity": self.sparsity,
            **{name: self.mean(name) for name in MEASURES},
            "attention_ms": attention[1], "denoise_s": denoise[1],
            "attention_share": attention[1] / (1e3 * denoise[1]),
            "attention_ms_quartiles": [attention[0], attention[2]], "denoise_s_quartiles": [denoise[0], denoise[2]],
            "timed_runs": len(self.denoise_s), "density": self.mean("density"), "layer_errors": self.layer_errors,
            "options": self.options, "trained": self.trained, "backend": self.backend,
        }  # fmt: skip
        if len(self.runs) > 1:
            content["intervals"] = {name: interval(self.values(name)) for name in MEASURES}
            if first is not None:
                content["less_first_sparse"] = {name: self.difference(first, name) for name in MEASURES}
        return content

    def difference(self, other: Row, name: str) -> dict[str, Any] | None:
        """The mean over the prompts of a measure less another row's, with its interval; None where one is unknown."""
        pairs = [(getattr(a, name), getattr(b, name)) for a, b in zip(self.runs, other.runs, strict=True)]
        differences = [a - b for a, b in pairs if a is not None and b is not None]
        if not differences:
            return None
        return {"mean": statistics.fmean(differences), "interval": interval(differences)}


def interval(values: Sequence[float]) -> list[float] | None:
    """Where 95 % of the means of as many values drawn from these lie; None for fewer than two."""
    if len(values) < 2:
        return None
    drawn = np.random.default_rng(0).choice(np.asarray(values), (RESAMPLES, len(values))).mean(1)
    return [float(bound) for bound in np.quantile(drawn, (0.025, 0.975))]


@dataclass(frozen=True)
class Comparison:
    """What `slagen compare` found.

    Args:
        prompts: (prompt, seed) of each clip. settings: by option name, of what all rows have in common.
        reference: the dense runs that everything is compared to. rows: in the order that was asked for.
        controls: random blocks, and another seed.
        videos: side by side, one for each prompt. path: of the JSON.
    """

    created: str
    prompts: list[tuple[str, int]]
    settings: dict[str, Any]
    reference: Row
    rows: list[Row]
    controls: list[Row]
    videos: list[Path]
    path: Path
    versions: dict[str, str]
    device: Device

    def speedup(self, row: Row, times: Callable[[Row], list[float]] = lambda row: row.denoise_s) -> float:
        """How many times as fast as dense attention a row is, by the medians."""
        return statistics.median(times(self.reference)) / statistics.median(times(row))

    @property
    def first_sparse(self) -> Row | None:
        """The row that others are compared to, pair by pair: the first that is not dense."""
        return next((row for row in self.rows if row.method != "dense"), None)

    def above(self, bound: float) -> list[Row]:
        """The rows whose velocity error is above a bound, dense ones left out."""
        return [row for row in self.rows if row.method != "dense" and (row.mean("velocity_error") or 0.0) > bound]

    def to_dict(self) -> dict[str, Any]:
        """What the file and --json hold."""
        first = self.first_sparse

        def shown(row: Row) -> dict[str, Any]:
            return {
                **row.to_dict(None if row is first else first), "speedup": self.speedup(row),
                "attention_speedup": self.speedup(row, lambda row: row.attention_ms),
            }  # fmt: skip

        return {
            "schema_version": SCHEMA_VERSION, "kind": "comparison", "created": self.created,
            "prompts": [
                {"prompt": prompt, "seed": seed, "video": video.name}
                for (prompt, seed), video in zip(self.prompts, self.videos, strict=True)
            ],
            "settings": self.settings, "methods": [shown(row) for row in self.rows],
            "controls": [shown(row) for row in self.controls], "reference": shown(self.reference),
            "versions": self.versions, "device": self.device.to_dict(),
        }  # fmt: skip
