"""Two reports of videos beside each other: the settings that differ, and where the time went in each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slagen.generation.pages import read_report
from slagen.generation.video_report import VideoReport


@dataclass(frozen=True)
class ReportsCompared:
    """What two reports say.

    Args:
        names: of the files. settings_changed: by option, the two values where they differ.
        times_s: seconds by stage, of attention and of all steps; None where they were not taken.
        same_latents, same_device: whether these are equal.
    """

    names: tuple[str, str]
    settings_changed: dict[str, tuple[Any, Any]]
    times_s: dict[str, tuple[float | None, float | None]]
    same_latents: bool
    same_device: bool

    def to_dict(self) -> dict[str, Any]:
        """What --json prints."""
        return {
            "reports": list(self.names),
            "settings_changed": {name: list(pair) for name, pair in self.settings_changed.items()},
            "times_s": {name: list(pair) for name, pair in self.times_s.items()},
            "same_latents": self.same_latents, "same_device": self.same_device,
        }  # fmt: skip


def compare_reports(first: Path, second: Path) -> ReportsCompared:
    """Raises UsageError for a file that does not exist, WeightsError for one that is no report with times."""
    a, b = read_report(first), read_report(second)
    settings = {
        name: (a.settings.get(name), b.settings.get(name))
        for name in dict.fromkeys([*a.settings, *b.settings])
        if a.settings.get(name) != b.settings.get(name)
    }
    stages = {name: (a.stages_s.get(name), b.stages_s.get(name)) for name in dict.fromkeys([*a.stages_s, *b.stages_s])}
    steps = {"steps": (_seconds(a, "latency_ms"), _seconds(b, "latency_ms")),
             "attention": (_seconds(a, "attention_ms"), _seconds(b, "attention_ms"))}  # fmt: skip
    names = (str(first), str(second))
    return ReportsCompared(names, settings, {**steps, **stages}, a.latents_hash == b.latents_hash, a.device == b.device)


def _seconds(report: VideoReport, name: str) -> float | None:
    times = [time for step in report.steps if (time := getattr(step, name)) is not None]
    return sum(times) / 1e3 if times else None
