"""batch(BatchConfig) -> BatchResult: many prompts, one model in memory, one manifest that any crash leaves consistent.

Every job is looked up in the manifest, or queued there with its seed, before a model loads. Then each is taken under
its lock, made, and its end written down; what is done is verified and left alone. Several processes on one folder share
the work: who cannot have a lock goes on to the next job and comes back.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from filelock import BaseFileLock
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from slagen import prompts
from slagen.config import BatchConfig, GenerateConfig
from slagen.errors import SlagenError, UsageError, WeightsError
from slagen.generate import Event, Session, Video, save
from slagen.manifest import LOCKS, Job, Manifest, Wanted, digest
from slagen.models import read_header
from slagen.pages import Card, contact_sheet
from slagen.report import write_bytes, write_json, write_text
from slagen.resolve import Plan, Weights, find_weights, make_plan
from slagen.video import make_thumbnail

NOT_PIXELS = {  # settings that change no pixel, the seed, which is kept apart, and paths, whose contents are hashed
    "output", "overwrite", "save_latents", "timing", "num_videos", "seed", "device", "allow_untrained", "model",
    "weights", "vae",
}  # fmt: skip
POLL_S = 0.5
WORKER = f"{socket.gethostname()}:{os.getpid()}"


@dataclass
class BatchResult:
    """What became of every job, by file name, in the order of the prompt file.

    Args:
        made: by this call. kept: done before, and verified. elsewhere: made meanwhile by another process.
        failed: name and reason. interrupted: whether the run was told to stop. page: the contact sheet.
    """

    folder: Path
    made: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)
    interrupted: bool = False
    page: Path | None = None


@dataclass(frozen=True)
class Task:
    """A job and the plan that makes it."""

    job: Job
    plan: Plan


def batch(config: BatchConfig, on_event: Callable[[Event], None] = lambda event: None) -> BatchResult:
    """Make every video of a prompt file that is not made yet.

    Args:
        on_event: told of the plan, of every video, stage and step.
    Raises: UsageError for a faulty prompt file, before anything is loaded; SlagenError where nothing can be written.
        What goes wrong with one prompt is in the result.
    """
    requests = prompts.read_prompts(config.prompts)
    folder = Path(config.generate.output).expanduser()
    if folder.suffix.lower() == ".mp4":
        raise UsageError(f"{folder} is one file, but a batch makes many. Give a folder with --output.")
    weights = find_weights(config.generate, lambda text: on_event(Event("note", text)))
    plans = _plans(config.generate, requests, weights)
    on_event(Event("stage", "hash"))
    identity = _identity(weights, config.generate.vae, Path(config.cache_dir).expanduser())
    manifest = Manifest(folder)
    tasks = _queue(manifest, plans, identity, on_event)
    if config.shard is not None:
        part, parts = config.shard
        tasks = tasks[part - 1 :: parts]
    jobs = manifest.read()
    result = BatchResult(folder)
    todo = _sweep(manifest, jobs, tasks, config, result, on_event)
    _check_room(folder, todo)
    on_event(Event("plan", _forecast(folder, jobs, tasks, todo)))
    if todo:
        stop = threading.Event()
        with _signals(stop, on_event):
            _Run(config, manifest, todo, result, stop, on_event).run()
            result.interrupted = stop.is_set()
        result.page = write_page(manifest)
    return result


def write_page(manifest: Manifest) -> Path:
    """`index.html`: every job of a folder with a playing thumbnail, which is kept under `.slagen` for the next time."""
    thumbnails = manifest.folder / LOCKS / "thumbnails"
    thumbnails.mkdir(exist_ok=True)
    cards = []
    for job in manifest.read().values():
        path, share, video = manifest.folder / job.name, None, None
        state = job.state if job.state != "failed" else f"failed: {job.result.get('reason')}"
        if job.state == "done" and path.is_file():
            small = thumbnails / f"{job.key[:32]}-{str(job.result.get('sha256'))[:16]}.mp4"
            try:
                if not small.is_file():
                    write_bytes(small, make_thumbnail(path))
                video = small.read_bytes()
                share = json.loads(path.with_suffix(".json").read_text())["cost"]["measured_attention_share"]
            except (SlagenError, OSError, ValueError, KeyError) as error:
                state = f"done, but unreadable: {error}"
        seconds = job.result.get("seconds")
        cards.append(Card(job.index, job.name, job.settings["prompt"], job.seed, state, video, seconds, share))
    page = manifest.folder / "index.html"
    write_text(page, contact_sheet(f"{manifest.folder.resolve().name}: {len(cards)} videos", cards))
    return page


def _plans(base: GenerateConfig, requests: list[prompts.Request], weights: Weights) -> list[tuple[Plan, str]]:
    """A plan for every video, its seed None where none is given, and its id. Raises UsageError with every fault."""
    found, faults = [], []
    for request in requests:
        try:
            config = prompts.apply(base, request)
            plan = make_plan(config, weights)
            if (plan.sla is None) != (weights.sla is None):
                raise UsageError(
                    f"{plan.num_tokens} tokens are too few for SLA, which the rest runs with. Make it larger, or apart."
                )
        except SlagenError as error:
            faults.append(f"{request.where}: {error}")
            continue
        for number in range(config.num_videos):
            seed = None if config.seed is None else config.seed + number
            one = dataclasses.replace(plan, config=dataclasses.replace(plan.config, seed=seed, num_videos=1))
            name = request.id and (request.id if config.num_videos == 1 else f"{request.id}-{number + 1}")
            found.append((one, name))
    if faults:
        more = f"\n... and {len(faults) - 10} more" if len(faults) > 10 else ""
        raise UsageError("\n".join(faults[:10]) + more)
    return found


def _queue(
    manifest: Manifest, plans: list[tuple[Plan, str]], identity: str, on_event: Callable[[Event], None]
) -> list[Task]:
    """The job of every plan, queued where it is new; a plan that is there twice with one seed counts once."""
    wanted = []
    for plan, name in plans:
        settings = {key: value for key, value in plan.settings.items() if key not in NOT_PIXELS}
        settings |= {"backend": plan.backend, "weights_hash": identity}
        wanted.append(Wanted(settings, plan.config.seed, plan.config.slug, name))
    tasks: dict[str, Task] = {}
    for job, (plan, _) in zip(manifest.queue(wanted), plans, strict=True):
        if job.key in tasks:
            text = f"{plan.config.prompt!r:.60} is there twice with seed {job.seed}: one video is made"
            on_event(Event("warning", text))
        else:
            config = dataclasses.replace(plan.config, seed=job.seed)
            tasks[job.key] = Task(job, dataclasses.replace(plan, config=config))
    return list(tasks.values())


def _sweep(
    manifest: Manifest, jobs: dict[str, Job], tasks: list[Task], config: BatchConfig, result: BatchResult,
    on_event: Callable[[Event], None],
) -> list[Task]:  # fmt: skip
    """Take away what killed runs left, and sort out what is done or failed; the rest is to do."""
    by_stem = {Path(job.name).stem: job for job in jobs.values()}
    for part in manifest.folder.glob("*.part"):
        stem = re.sub(r"(\.mp4|\.json|\.latents\.safetensors)\.part$", "", part.name)
        if stem in by_stem and (lock := manifest.claim(by_stem[stem])) is not None:
            part.unlink(missing_ok=True)
            lock.release()
    todo = []
    for task in tasks:
        job = jobs[task.job.key]
        if job.state == "done" and manifest.is_whole(job):
            result.kept.append(job.name)
        elif job.state == "failed" and not config.retry_failed:
            result.failed.append((job.name, f"{job.result.get('reason')} (before; --retry-failed tries again)"))
        else:
            if job.state == "done":
                on_event(Event("warning", f"{job.name} is gone or changed, and is made again"))
            todo.append(task)
    return todo


def _check_room(folder: Path, todo: list[Task]) -> None:
    """Raise SlagenError where the disk does not hold the videos to make, at a quarter of a byte a pixel."""
    needed = sum(2**20 + _pixels(task) // 4 for task in todo)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise SlagenError(
            f"{folder} has {free / 2**20:.0f} MiB free, but {len(todo)} videos may need {needed / 2**20:.0f} MiB. "
            "Free some space, or give another folder with --output."
        )


def _pixels(task: Task) -> int:
    config = task.plan.config
    return (config.width or 0) * (config.height or 0) * (config.num_frames or 0)


def _forecast(folder: Path, jobs: dict[str, Job], tasks: list[Task], todo: list[Task]) -> str:
    """How many, how long, how much: the time from what this manifest says of earlier videos, by pixels and steps."""
    rates = [job.result["seconds"] / job.result["work"] for job in jobs.values() if job.result.get("work")]
    if not todo:
        return f"{len(tasks)} videos, none to make"
    duration = "known after the first video"
    if rates:
        duration = "about " + clock(sorted(rates)[len(rates) // 2] * sum(map(_work, todo)))
    size = sum(2**20 + _pixels(task) // 4 for task in todo) / 2**20
    return f"{len(tasks)} videos, {len(todo)} to make; time: {duration}; disk: at most {size:.0f} MiB in {folder}"


def clock(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


class _Run:
    """One process's share of the work: sampling here, writing in a thread, so that one goes on beside the other."""

    def __init__(
        self, config: BatchConfig, manifest: Manifest, todo: list[Task], result: BatchResult, stop: threading.Event,
        on_event: Callable[[Event], None],
    ) -> None:  # fmt: skip
        self.config, self.manifest, self.todo, self.result, self.stop = config, manifest, todo, result, stop
        self.on_event, self.start_time = on_event, time.time()
        self.began, self.spent = time.monotonic(), 0  # work done since, in pixels x steps
        self.writing: tuple[Task, BaseFileLock, Future[Video], float] | None = None

    def run(self) -> None:
        """Make what is to do, and wait for what others hold."""
        embeddings = Embeddings(self.config, self.todo[0].plan)
        missing = [task for task in self.todo if not embeddings.has(task.plan)]
        self.on_event(Event("stage", "load"))
        session = Session(self.todo[0].plan, text_encoder=bool(missing))
        if missing:
            self.on_event(Event("stage", "text"))
            for task in missing:
                embeddings.put(task.plan, session.encode(task.plan))
            session.release_text_encoder()
        waiting = list(self.todo)
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="write") as writer:
            try:
                while waiting and not self.stop.is_set():
                    busy = [task for task in waiting if not self._take(task, session, embeddings, writer)]
                    self._finish()
                    if len(busy) == len(waiting):
                        time.sleep(POLL_S)  # others hold them all; who dies lets go
                    waiting = busy
            finally:
                self._finish()  # a video that is being written is as good as done

    def _take(self, task: Task, session: Session, embeddings: Embeddings, writer: ThreadPoolExecutor) -> bool:
        """Make one video, unless another process has it just now: then False."""
        if self.stop.is_set():
            return True
        lock = self.manifest.claim(task.job)
        if lock is None:
            return False
        kept = False
        try:
            now = self.manifest.read()[task.job.key]
            if now.state == "done" and self.manifest.is_whole(now):
                self.result.elsewhere.append(now.name)
                return True
            if now.state == "failed" and now.result.get("time", 0) > self.start_time:
                self.result.failed.append((now.name, str(now.result.get("reason"))))
                return True
            self.manifest.append({"event": "running", "key": task.job.key, "worker": WORKER})
            number = len(self.result.made) + len(self.result.failed) + 1 + (self.writing is not None)
            self.on_event(
                Event("job", f"{number} of {len(self.todo)}{self._time_left()}: {task.plan.config.prompt:.60}")
            )
            began, stages = time.monotonic(), {"start": 0.0, "load": 0.0, "text": 0.0}  # shared by all
            try:
                sample = session.sample(task.plan, embeddings.get(task.plan, session), stages, self.on_event)
            except (SlagenError, RuntimeError, ValueError, MemoryError) as error:
                self._fail(task, error)
                return True
            self._finish()
            path = self.manifest.folder / task.job.name
            self.writing, kept = (task, lock, writer.submit(save, sample, path), began), True
            return True
        finally:
            if not kept:
                lock.release()

    def _finish(self) -> None:
        """Wait for the video that is being written, and put its end into the manifest."""
        if self.writing is None:
            return
        task, lock, future, began = self.writing
        self.writing = None
        try:
            try:
                video = future.result()
            except (SlagenError, RuntimeError, OSError) as error:
                self._fail(task, error)
                return
            work, seconds = _work(task), time.monotonic() - began
            self.manifest.append({
                "event": "done", "key": task.job.key, "sha256": video.report["video"]["sha256"],
                "latents_hash": video.report["latents_hash"], "seconds": seconds, "work": work,
            })  # fmt: skip
            self.spent += work
            self.result.made.append(task.job.name)
        finally:
            lock.release()

    def _fail(self, task: Task, error: BaseException) -> None:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        self.manifest.append({"event": "failed", "key": task.job.key, "reason": reason})
        self.result.failed.append((task.job.name, reason))
        self.on_event(Event("warning", f"{task.job.name} failed: {reason}"))

    def _time_left(self) -> str:
        if not self.spent:
            return ""
        left = sum(map(_work, self.todo)) - self.spent
        return f", about {clock(left * (time.monotonic() - self.began) / self.spent)} left"


def _work(task: Task) -> int:
    return _pixels(task) * (task.plan.config.steps or 1)


class Embeddings:
    """Prompts as the text encoder gives them, in memory and, unless the config says no, on disk.

    A file is named by a hash of the encoder's and tokenizer's files, the text, its length and dtype: it is never stale.
    """

    def __init__(self, config: BatchConfig, plan: Plan) -> None:
        weights = plan.weights
        self.cache = Path(config.cache_dir).expanduser()
        self.folder = None if config.no_cache else self.cache / "embeddings"
        files = component_files(weights.source.folder, ("text_encoder", "tokenizer"))
        self.about = [
            file_hashes(files, self.cache), weights.source.defaults.max_sequence_length, str(weights.dtype)
        ]  # fmt: skip
        self.memory: dict[str, torch.Tensor] = {}

    def has(self, plan: Plan) -> bool:
        """Whether a plan's texts are all known."""
        return all(self._known(text) for text in _texts(plan))

    def put(self, plan: Plan, embeds: dict[str, torch.Tensor | None]) -> None:
        """Remember what `Session.encode` gave: on disk where that takes it, otherwise in memory."""
        for text, tensor in zip(_texts(plan), embeds.values(), strict=False):
            assert tensor is not None
            tensor, key = tensor.cpu().contiguous(), self._key(text)
            if self.folder is not None:
                try:
                    self.folder.mkdir(parents=True, exist_ok=True)
                    part = self.folder / f"{key}.{os.getpid()}.part"
                    save_file({"embeds": tensor}, part)
                    os.replace(part, self.folder / f"{key}.safetensors")
                    continue
                except (OSError, SafetensorError):
                    self.folder = None
            self.memory[key] = tensor

    def get(self, plan: Plan, session: Session) -> dict[str, torch.Tensor | None]:
        """A plan's embeddings as `Session.sample` takes them. Raises SlagenError if their file is gone or broken."""
        device = session.pipe._execution_device
        tensors: list[torch.Tensor | None] = [self._load(text).to(device) for text in _texts(plan)]
        return dict(zip(("prompt_embeds", "negative_prompt_embeds"), [*tensors, None], strict=False))

    def _key(self, text: str) -> str:
        return digest([*self.about, text])

    def _path(self, key: str) -> Path:
        return self.cache / "embeddings" / f"{key}.safetensors"

    def _known(self, text: str) -> bool:
        key = self._key(text)
        if key in self.memory or self.folder is None:
            return key in self.memory
        try:
            return "embeds" in read_header(self._path(key))
        except WeightsError:
            return False

    def _load(self, text: str) -> torch.Tensor:
        key = self._key(text)
        if key in self.memory:
            return self.memory[key]
        try:
            return load_file(self._path(key))["embeds"]
        except (OSError, SafetensorError, KeyError) as error:
            raise SlagenError(f"{self._path(key)} is gone or broken ({error}). Run the batch again.") from error


def _texts(plan: Plan) -> list[str]:
    guided = (plan.config.guidance_scale or 0) > 1
    return [plan.config.prompt, plan.config.negative_prompt or ""][: 2 if guided else 1]


def component_files(folder: Path, parts: tuple[str, ...]) -> list[Path]:
    """The files of some components of a pipeline, in order."""
    return [file for part in parts for file in sorted((folder / part).rglob("*")) if file.is_file()]


def _identity(weights: Weights, vae: str | None, cache: Path) -> str:
    """A hash of every file whose content changes pixels."""
    source = weights.source
    parts = ("text_encoder", "tokenizer", "scheduler") + (() if vae else ("vae",))
    files = component_files(source.folder, parts if source.weights else (*parts, "transformer"))
    for path in (source.weights, weights.sla_path, Path(vae).expanduser() if vae else None):
        if path is not None:
            files += [path] if path.is_file() else sorted(path.rglob("*.safetensors"))
    return file_hashes(list(dict.fromkeys(files)), cache)


def file_hashes(files: list[Path], cache: Path) -> str:
    """One hash of many files' contents. Each file's is kept in `cache` by path, size and time, so it is read once."""
    store = cache / "hashes.json"
    try:
        known = json.loads(store.read_text())
    except (OSError, ValueError):
        known = {}
    digests, changed = [], False
    for file in files:
        status = file.stat()
        name, stamp = str(file.resolve()), [status.st_size, status.st_mtime_ns]
        entry = known.get(name)
        if not isinstance(entry, list) or entry[:2] != stamp:
            with file.open("rb") as handle:
                entry = known[name] = [*stamp, hashlib.file_digest(handle, "sha256").hexdigest()]
            changed = True
        digests.append([file.name, entry[2]])
    if changed:
        try:
            cache.mkdir(parents=True, exist_ok=True)
            write_json(store, known)
        except OSError:
            pass  # hashed again the next time
    return digest(digests)


@contextmanager
def _signals(stop: threading.Event, on_event: Callable[[Event], None]) -> Iterator[None]:
    """SIGINT once: finish the video and stop. SIGINT again, or SIGTERM: stop now."""

    def interrupt(number: int, frame: Any) -> None:
        if stop.is_set() or number == signal.SIGTERM:
            raise KeyboardInterrupt
        stop.set()
        on_event(Event("warning", "stopping after this video; press Ctrl-C again to stop now"))

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
