"""Before a batch starts: verify what is complete, restore lost reports, remove the leftovers of killed runs."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path

from slagen.batch.manifest import Job, Manifest
from slagen.batch.queue import Task
from slagen.batch.result import BatchResult
from slagen.errors import SlagenError
from slagen.events import Event
from slagen.generation.latents import latents_beside
from slagen.generation.provenance import restored_report
from slagen.io.files import delete, sweep, write_json


def find_remaining(
    manifest: Manifest, jobs: dict[str, Job], tasks: list[Task], retry_failed: bool, worker: str, result: BatchResult,
    on_event: Callable[[Event], None],
) -> list[Task]:  # fmt: skip
    """Delete leftovers of killed runs, record what is complete or failed in `result`, and return what remains."""
    sweep(manifest.folder)
    by_stem = {Path(job.name).stem: job for job in jobs.values()}
    for part in manifest.folder.glob("*.part"):  # as versions before left them
        stem = re.sub(r"(\.mp4|\.json|\.latents\.safetensors)\.part$", "", part.name)
        if stem in by_stem and (lock := manifest.claim(by_stem[stem])) is not None:
            delete(part)
            lock.release()
    todo = []
    for task in tasks:
        job = jobs[task.job.key]
        if job.state == "done" and manifest.is_whole(job):
            result.kept.append(job.name)
            _restore_report(manifest, job, on_event)
        elif job.state == "failed" and str(job.result.get("worker")).split(":")[0] == worker.split(":")[0]:
            result.failed.append((job.name, str(job.result.get("reason"))))  # by another worker of this very run
        elif job.state == "failed" and not retry_failed:
            result.failed.append(
                (job.name, f"{job.result.get('reason')} (in an earlier run; --retry-failed tries again)")
            )
        else:
            if job.state == "done":
                on_event(Event("warning", f"{job.name} is missing or has changed; generating it again"))
            todo.append(task)
    _warn_of_missing_latents(manifest, [task for task in tasks if jobs[task.job.key].name in result.kept], on_event)
    return todo


def _warn_of_missing_latents(manifest: Manifest, kept: list[Task], on_event: Callable[[Event], None]) -> None:
    """Warn of complete videos without the latents that are asked for; they are not generated again."""
    videos = [manifest.folder / task.job.name for task in kept if task.plan.config.save_latents]
    lacking = [video for video in videos if not latents_beside(video)]
    if lacking:
        remove = f"rm {shlex.quote(str(lacking[0]))}"
        have, them = "one complete video has", f"the video ({remove})"
        if len(lacking) > 1:
            have, them = f"{len(lacking)} complete videos have", f"these videos (the first: {remove})"
        text = (
            f"{have} no saved latents and will not be generated again. To get the latents, delete {them} and run this "
            "command again, or choose another folder with --output"
        )
        on_event(Event("warning", text))


def _restore_report(manifest: Manifest, job: Job, on_event: Callable[[Event], None]) -> None:
    """Restore a missing report from the metadata of its video."""
    path = manifest.folder / job.name
    lost = path.with_suffix(".json")
    lock = None if os.path.lexists(lost) else manifest.claim(job)
    if lock is None:
        return
    try:
        write_json(lost, restored_report(path, job.settings, job.result).to_dict())
        on_event(
            Event("note", f"{lost.name} was missing and has been restored from the video's metadata, without timings")
        )
    except (SlagenError, OSError) as error:
        on_event(
            Event(
                "warning",
                f"{lost.name} is missing and cannot be restored ({error}); delete {path.name} to generate the video "
                "and its report again",
            )
        )
    finally:
        lock.release()
