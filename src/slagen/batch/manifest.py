"""The append-only record of a batch: which jobs are queued, running, done or failed, whichever process ran them.

`manifest.jsonl` holds one event per line. Lines are appended whole and synced, never changed; a line that a crash cut
off, or of another form, is ignored, and the next append starts a new one. A folder may come from anywhere, so a job's
key and name must be such as this file makes: a hash, and a plain `.mp4` name that no other job has. Who works on a job
holds an OS lock on its lock file, which is free again when the process dies, so
a job that is "running" without a holder was interrupted.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, Timeout

from slagen.errors import SlagenError
from slagen.io.documents import parse_json
from slagen.io.files import append
from slagen.io.forms import Fault, check, matching, one_of, sha256, whole
from slagen.io.reading import digest, file_hash, open_regular
from slagen.io.text import to_json

FILE_NAME = "manifest.jsonl"
LOCKS = ".slagen"
VERSION = 1
MAX_LINE = 2**20
NAME = r"\w[\w.-]{0,249}\.mp4"  # no path, no address, nothing that hides

_WORKER = {"key": sha256(), "attempt?": str, "worker?": str}
FORMS = {
    "queued": {
        "key": sha256(), "index": whole(1, 10**15), "name": matching(NAME, "a plain file name that ends in .mp4"),
        "settings": {"prompt": str}, "seed": whole(0, 2**63 - 1),
        "lookup": matching(r"([0-9a-f]{64}:\d{1,9})?", "a hash and a count"),
    },
    "running": _WORKER,
    "done": {**_WORKER, "sha256": str, "latents_hash?": str, "seconds?": float},
    "failed": {**_WORKER, "reason?": str},
}  # fmt: skip


@dataclass
class Job:
    """One video of a batch, as the manifest knows it.

    Args:
        key: SHA-256 of all that changes its pixels, its seed among them.
        index: its place in the names, given once.
        name: of its video, without folder.
        settings: what it is made with. seed: given, or drawn when it was queued.
        lookup: for a job whose seed was drawn: hash of the settings without it, and its count among equal ones.
        state: "queued", "running", "done" or "failed".
        result: what the event of that state says: the file's hash, the reason of a failure.
        attempt: of the last one that began; whose it is not, does not end it.
    """

    key: str
    index: int
    name: str
    settings: dict[str, Any]
    seed: int
    lookup: str = ""
    state: str = "queued"
    result: dict[str, Any] = field(default_factory=dict)
    attempt: str = ""


@dataclass(frozen=True)
class Wanted:
    """A job that a run asks for: its settings, and its seed if one was given."""

    settings: dict[str, Any]
    seed: int | None
    slug: str
    id: str = ""


def _event(line: bytes) -> dict[str, Any] | None:
    """An event of the form that we write; None for any other line."""
    try:
        event = parse_json(line, {"v": whole(VERSION, VERSION), "event": one_of(*FORMS)})
        check(event, FORMS[event["event"]])
    except Fault:
        return None
    return event


class Manifest:
    """One output folder's record. Any number of processes may hold one on the same folder.

    Args:
        folder: where videos lie; made if it is not there.
    Raises: SlagenError where files cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / FILE_NAME
        for own in (folder / LOCKS, folder / LOCKS / "thumbnails"):
            if own.is_symlink():
                raise SlagenError(f"{own} is a symbolic link, and slagen does not write through links. Delete it.")
        try:
            (folder / LOCKS).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SlagenError(
                f"{folder} is not writable ({error.strerror or error}). Choose another folder with --output."
            ) from error
        self._jobs: dict[str, Job] = {}
        self._names: set[str] = set()
        self._offset = 0
        self._write_lock = FileLock(folder / LOCKS / "manifest.lock")

    def read(self) -> dict[str, Job]:
        """Every job by its key, in the order of queueing. Lines that are no events are passed over."""
        for event in self._events():
            self._apply(event)
        return dict(self._jobs)

    def _apply(self, event: dict[str, Any]) -> None:
        key, kind = event["key"], event["event"]
        if kind == "queued":
            job = Job(key, event["index"], event["name"], event["settings"], event["seed"], event["lookup"])
            if key not in self._jobs and job.name.casefold() not in self._names:
                self._jobs[key] = job
                self._names.add(job.name.casefold())
        elif key in self._jobs:
            job = self._jobs[key]
            if kind == "running":
                job.attempt = str(event.get("attempt"))
            if job.state == "done" and kind != "done":
                return  # a late word of a worker that lost its lock
            job.state, job.result = kind, event

    def _events(self) -> Iterator[dict[str, Any]]:
        """What was appended since the last call; a line without an end is left for the next one."""
        try:
            with open_regular(self.path) as handle:
                handle.seek(self._offset)
                while line := handle.readline(MAX_LINE):
                    if len(line) < MAX_LINE and not line.endswith(b"\n"):
                        return
                    self._offset += len(line)
                    event = _event(line)
                    if event is not None:
                        yield event
        except FileNotFoundError:
            return
        except OSError as error:
            raise SlagenError(
                f"{self.path} cannot be read ({error.strerror or error}). Choose another folder with --output."
            ) from error

    def append(self, *events: dict[str, Any]) -> None:
        """Add events in one write, synced to the disk. Raises SlagenError if they cannot be written."""
        with self._write_lock:
            self._append(events)

    def finish(self, job: Job, attempt: str, **event: Any) -> bool:
        """Append the end of an attempt, unless another has begun since: then False, and what it made does not count."""
        with self._write_lock:
            if self.read()[job.key].attempt != attempt:
                return False
            self._append(({**event, "key": job.key, "attempt": attempt},))
        return True

    def _append(self, events: tuple[dict[str, Any], ...]) -> None:
        stamp = time.time()
        lines = [to_json({"v": VERSION, **event, "time": stamp}) for event in events]
        try:
            append(self.path, ("\n".join(lines) + "\n").encode())
        except OSError as error:
            raise SlagenError(
                f"{self.path} cannot be written ({error.strerror or error}). Fix this, or choose another folder "
                "with --output."
            ) from error

    def queue(self, wanted: list[Wanted]) -> list[Job]:
        """Find each wanted job, or queue it: all new ones in one append.

        A job with a seed is found by its key; one without by its settings and its count among equal ones of this call,
        so that inserting a line elsewhere changes nothing.

        Returns: the job of each that is wanted; the same one for equal settings with equal seeds.
        """
        with self._write_lock:
            jobs = self.read()
            drawn = {job.lookup: job for job in jobs.values() if job.lookup}
            following = 1 + max((job.index for job in jobs.values() if job.index < 10**9), default=0)
            counts: dict[str, int] = {}
            found, events = [], []
            for want in wanted:
                lookup = ""
                if want.seed is None:
                    plain = digest(want.settings)
                    counts[plain] = counts.get(plain, 0) + 1
                    lookup = f"{plain}:{counts[plain]}"
                    job = drawn.get(lookup)
                else:
                    job = jobs.get(digest({**want.settings, "seed": want.seed}))
                if job is None:
                    seed = secrets.randbelow(2**31) if want.seed is None else want.seed
                    key = digest({**want.settings, "seed": seed})
                    name = f"{want.id or f'{following:04d}-{want.slug}'}-s{seed}-{key[:8]}.mp4"
                    if name.casefold() in self._names:  # which only a line that is not ours can have taken
                        name = f"{key[:32]}-{secrets.token_hex(8)}.mp4"
                    job = jobs[key] = Job(key, following, name, want.settings, seed, lookup)
                    following += 1
                    events.append({"event": "queued", "key": key, "index": job.index, "name": name,
                                   "settings": want.settings, "seed": seed, "lookup": lookup})  # fmt: skip
                found.append(job)
            if events:
                self._append(tuple(events))
        return found

    def claim(self, job: Job) -> BaseFileLock | None:
        """Take a job's lock, to be released by the caller; None where another process holds it."""
        lock = FileLock(self.folder / LOCKS / f"{job.key[:32]}.lock", thread_local=False)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return None
        return lock

    def is_whole(self, job: Job) -> bool:
        """Whether a done job's video is there with the bytes that were written."""
        path = self.folder / job.name
        try:
            return file_hash(path) == job.result.get("sha256")
        except OSError:
            return False
