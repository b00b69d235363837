"""Estimate a batch before it starts: its time from earlier runs, its disk space and its memory."""

from __future__ import annotations

import shutil
from pathlib import Path

from slagen.attention.cost import other_flops
from slagen.batch.queue import Task
from slagen.errors import SlagenError, WeightsError
from slagen.generation.generate import check_memory
from slagen.io.documents import read_json
from slagen.io.files import write_json
from slagen.io.reading import digest
from slagen.io.text import counted

MAX_TIMES = 200  # kinds of videos whose times are kept


def check_disk_space(folder: Path, todo: list[Task]) -> None:
    """Raise SlagenError if the disk is too small for the remaining videos, at a quarter of a byte per pixel."""
    needed = sum(2**20 + _num_pixels(task) // 4 for task in todo)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise SlagenError(
            f"{folder} has {free / 2**20:.0f} MiB free, but {counted(len(todo), 'video')} may need "
            f"{needed / 2**20:.0f} MiB. Free some space, or choose another folder with --output."
        )


def check_batch_memory(todo: list[Task]) -> None:
    """Raise SlagenError if none of the videos fits into memory; a single one that does not fit fails alone."""
    first = None
    for task in todo:
        try:
            check_memory(task.plan)
            return
        except SlagenError as error:
            first = first or error
    if first is not None:
        raise first


def _num_pixels(task: Task) -> int:
    config = task.plan.config
    return (config.width or 0) * (config.height or 0) * (config.num_frames or 0)


def describe_forecast(folder: Path, tasks: list[Task], todo: list[Task], times: RecordedTimes) -> str:
    """How many videos, how long and how much disk space; a time only if such videos were generated here before."""
    if not todo:
        return f"{counted(len(tasks), 'video')}, nothing left to generate"
    seconds = times.of(todo)
    duration = "" if seconds is None else f"estimated time: {readable_duration(seconds)}; "
    size = sum(2**20 + _num_pixels(task) // 4 for task in todo) / 2**20
    videos = f"{counted(len(tasks), 'video')}, {len(todo)} to generate"
    return f"{videos}; {duration}disk space: at most {size:.0f} MiB in {folder}"


MAX_SECONDS = 1e7  # seconds for a video: slower than any machine, so no measurement


class RecordedTimes:
    """Seconds that recent videos took on this machine, cached by what the time depends on.

    Videos of other sizes or with other steps are not used: the share of decoding and of the smallest layers differs
    at each, and a forecast by FLOPs alone was several times too long.

    Args:
        about: the weights and the device.
    """

    def __init__(self, cache: Path, about: list[str]) -> None:
        self.store, self.about = cache / "times.json", about

    def of(self, tasks: list[Task]) -> float | None:
        """Seconds for all of some videos, each by the median of its like; None where one of them has none."""
        known = self._known()
        times = [sorted(known.get(self._key(task), [])) for task in tasks]
        return sum(found[len(found) // 2] for found in times) if all(times) else None

    def add(self, task: Task, seconds: float) -> None:
        """Remember one more."""
        known, key = self._known(), self._key(task)
        try:
            self.store.parent.mkdir(parents=True, exist_ok=True)
            others = [item for item in known.items() if item[0] != key][-MAX_TIMES:]
            write_json(self.store, dict([*others, (key, [*known.get(key, []), seconds][-9:])]))
        except OSError:
            pass  # it is a forecast, no more

    def _key(self, task: Task) -> str:
        plan = task.plan
        how = [str(plan.weights.dtype), plan.backend, *["compiled"] * plan.config.compile]
        how += [] if plan.config.cache is None else [plan.config.cache]
        return digest([*self.about, denoising_flops(task), _num_pixels(task), *how])

    def _known(self) -> dict[str, list[float]]:
        try:
            content = read_json(self.store, {str: [float]})
        except WeightsError:
            return {}
        return {key: times for key, times in content.items() if all(0 < time < MAX_SECONDS for time in times)}


def readable_duration(seconds: float) -> str:
    """Seconds in the unit that reads best."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def denoising_flops(task: Task) -> int:
    """FLOPs of a video's denoising, which its estimated time is proportional to."""
    plan, shape = task.plan, task.plan.weights.source.shape
    passes = (plan.config.steps or 1) * (2 if (plan.config.guidance_scale or 0) > 1 else 1)
    return passes * (plan.attention_flops() + other_flops(shape, plan.num_tokens))
