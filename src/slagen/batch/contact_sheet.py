"""index.html of a batch: every job of the output folder with a playing thumbnail."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock

from slagen.batch.manifest import LOCKS, Manifest
from slagen.errors import SlagenError, WeightsError
from slagen.events import Event
from slagen.html.contact_sheet import Card, contact_sheet
from slagen.io.documents import read_json
from slagen.io.files import sweep, write_bytes, write_text
from slagen.io.reading import digest
from slagen.io.text import counted
from slagen.video import make_thumbnail

PAGE = "index.html"


def write_page_or_warn(manifest: Manifest, on_event: Callable[[Event], None]) -> Path | None:
    """Write the page of a batch that has ended; if that fails, warn and return None, for the videos are complete."""
    try:
        return write_page(manifest)
    except OSError as error:
        on_event(Event("warning", f"{manifest.folder / PAGE} could not be written ({error}); the videos are complete"))
        return None


def write_page(manifest: Manifest) -> Path:
    """Write `index.html`: every job of a folder with a playing thumbnail, which is cached under `.slagen`."""
    with FileLock(manifest.folder / LOCKS / "page.lock"):  # one of those that share the work at a time
        return _write_page(manifest)


def _write_page(manifest: Manifest) -> Path:
    thumbnails = manifest.folder / LOCKS / "thumbnails"
    thumbnails.mkdir(exist_ok=True)
    sweep(thumbnails)
    cards = []
    for job in manifest.read().values():
        path, attention, video = manifest.folder / job.name, None, None
        steps: list[tuple[float, float]] = []
        state = job.state if job.state != "failed" else f"failed: {job.result.get('reason')}"
        if job.state == "done" and path.is_file():
            small = thumbnails / f"{job.key[:32]}-{digest(job.result['sha256'])[:16]}.mp4"
            try:
                if not small.is_file():
                    write_bytes(small, make_thumbnail(path))
                video = small.read_bytes()
                attention, steps = _times(path.with_suffix(".json"))
            except (SlagenError, OSError) as error:
                state = f"done, but unreadable: {error}"
        seconds = job.result.get("seconds")
        settings = {**job.settings, "seed": job.seed}
        prompt = job.settings["prompt"]
        cards.append(Card(job.index, job.name, prompt, job.seed, state, video, seconds, attention, settings, steps))
    page = manifest.folder / PAGE
    title = f"{manifest.folder.resolve().name}: {counted(len(cards), 'video')}"
    write_text(page, contact_sheet(title, cards, _common([card.settings for card in cards])))
    return page


def _common(settings: list[dict[str, Any]]) -> str:
    """The settings that all videos share, in one line."""
    names = ("model", "attention", "sparsity", "size", "num_frames", "steps", "guidance_scale")
    shared = [
        f"{name.replace('_', ' ')} {settings[0][name]}"
        for name in names
        if settings and settings[0].get(name) is not None and len({str(each.get(name)) for each in settings}) == 1
    ]
    return ", ".join(shared)


def _times(report: Path) -> tuple[float | None, list[tuple[float, float]]]:
    """The attention share that a report measured, and each step's time and attention time in milliseconds; None and
    empty where they were not measured or the report is unreadable."""
    step = {"latency_ms": float | None, "attention_ms": float | None}
    try:
        content = read_json(report, {"cost": {"measured_attention_share": float | None}, "steps": [step]})
    except WeightsError:
        return None, []
    timed = [(each["latency_ms"], each["attention_ms"] or 0.0) for each in content["steps"] if each["latency_ms"]]
    return content["cost"]["measured_attention_share"], timed
