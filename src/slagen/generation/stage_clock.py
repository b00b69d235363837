"""The stages of a run on one clock: each begins where the one before it ended, so no time between them is lost."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from slagen.machine import PeakMemory

MEASURE = "measure"  # what ran for a measurement alone, and is not part of making the video
SHARED = ("start", "prepare", "load", "text")  # by all videos of a run, so counted with the first


@dataclass(frozen=True)
class Lap:
    """A stage from its begin, in seconds since the first stage began."""

    stage: str
    start_s: float
    seconds: float


class StageClock:
    """Seconds of the stages of one video, and the most memory in each.

    Args:
        since_start_s: what the stage "start" has taken already: the seconds since the process began.
    """

    def __init__(self, since_start_s: float = 0.0) -> None:
        self._seconds = {**dict.fromkeys(SHARED, 0.0), "start": since_start_s}
        self._last = time.perf_counter()
        self.began = self._last - since_start_s  # by `time.perf_counter`
        self.laps = [Lap("start", 0.0, since_start_s)] if since_start_s else []
        self._stage: str | None = None
        self.memory: PeakMemory | None = None
        self.overlapped = False
        self.peaks_gib: dict[str, float | None] = {}

    def watch(self, memory: PeakMemory) -> None:
        """From now on, note the most memory of each stage."""
        self.memory = memory

    def overlap(self) -> None:
        """End the stage that goes on. Other work goes on beside those to come, so their memory is not known."""
        self.end()
        self.overlapped = True

    def begin(self, stage: str) -> None:
        """Begin a stage where the one before it ends."""
        self.end()
        self._stage = stage

    def end(self) -> None:
        """End the stage that goes on. What comes before the next one begins belongs to that."""
        if self._stage is None:
            return
        now = time.perf_counter()
        self._seconds[self._stage] = self._seconds.get(self._stage, 0.0) + now - self._last
        self.laps.append(Lap(self._stage, self._last - self.began, now - self._last))
        if self.memory is not None:
            self.peaks_gib[self._stage] = None if self.overlapped else self.memory.take()
        self._last, self._stage = now, None

    def set_apart(self, seconds: float, stage: str = MEASURE) -> None:
        """So much of the denoising was for something else: a stage of its own; the total leaves out MEASURE."""
        if seconds:
            self._seconds["denoise"] -= seconds
            self._seconds[stage] = self._seconds.get(stage, 0.0) + seconds

    def read(self) -> dict[str, float]:
        """End the stage that goes on: the seconds of each stage, and as "total" their sum without `MEASURE`."""
        self.end()
        return {**self._seconds, "total": sum(s for name, s in self._seconds.items() if name != MEASURE)}

    def wall_s(self) -> float:
        """Seconds since the first stage began, whatever the stages say."""
        return time.perf_counter() - self.began
