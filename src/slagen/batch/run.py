"""batch(BatchConfig) -> BatchResult: many prompts, one model in memory, one manifest that any crash leaves consistent.

Every job is looked up in the manifest, or queued there with its seed, before a model loads. Then each is taken under
its lock, made, and its end written down; what is done is verified and left alone. Several processes on one folder share
the work: who cannot have a lock goes on to the next job and comes back.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import shutil
import socket
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from filelock import BaseFileLock, FileLock

from slagen.attention.cost import other_flops
from slagen.batch.config import BatchConfig
from slagen.batch.manifest import LOCKS, Job, Manifest, Wanted
from slagen.errors import SlagenError, UsageError, WeightsError, no_memory, of_memory
from slagen.events import Event
from slagen.generation import prompts
from slagen.generation.config import GenerateConfig
from slagen.generation.embeddings import Embeddings, component_files, file_hashes
from slagen.generation.generate import check_memory, save
from slagen.generation.latents import latents_beside
from slagen.generation.provenance import restored_report
from slagen.generation.resolve import Plan, Weights, find_weights, make_plan
from slagen.generation.result import Video
from slagen.generation.session import Sample, Session, free_memory
from slagen.html import Card, contact_sheet
from slagen.interrupts import ENDING, stopping
from slagen.io.documents import read_json
from slagen.io.files import delete, sweep, write_bytes, write_json, write_text
from slagen.io.paths import is_video, user_path
from slagen.io.reading import digest
from slagen.io.text import counted
from slagen.machine import describe_device
from slagen.settings import names_where
from slagen.video import check_ffmpeg, make_thumbnail

NOT_IN_KEY = names_where(GenerateConfig, lambda option: not (option.pixels and option.in_key))
POLL_S = 0.5
MAX_TIMES = 200  # kinds of videos whose times are kept
PAGE = "index.html"


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
    stop = threading.Event()
    worker = f"{uuid.uuid4().hex[:12]}:{socket.gethostname()}:{os.getpid()}"
    result = share(config, requests, stop, on_event, worker)
    result.page = try_page(Manifest(result.folder), on_event)
    return result


def share(
    config: BatchConfig, requests: list[prompts.Request], stop: threading.Event, on_event: Callable[[Event], None],
    worker: str,
) -> BatchResult:  # fmt: skip
    """One process's share of a batch: every job that no other process has.

    Args:
        stop: set it, and the run ends after the video it is at.
        worker: a name for this process, which the manifest keeps: an id of the run, host and process behind colons.
    Raises: as `batch`.
    """
    folder = user_path(config.generate.output)
    if is_video(config.generate.output):
        raise UsageError(f"{folder} is one file, but a batch makes many. Give a folder with --output.")
    check_ffmpeg()
    weights = find_weights(config.generate, lambda text: on_event(Event("note", text)))
    plans = _plans(config.generate, requests, weights)
    _warn(plans, on_event)
    on_event(Event("stage", "hash"))
    cache = user_path(config.cache_dir)
    identity = _identity(weights, config.generate.vae, cache)
    manifest = Manifest(folder)
    tasks = _queue(manifest, plans, identity, on_event)
    if config.shard is not None:
        part, parts = config.shard
        tasks = tasks[part - 1 :: parts]
    jobs = manifest.read()
    result = BatchResult(folder)
    todo = _sweep(manifest, jobs, tasks, config.retry_failed, worker, result, on_event)
    _check_room(folder, todo)
    _check_memory(todo)
    times = Times(cache, [identity, describe_device(weights.device)["name"]])
    on_event(Event("plan", _forecast(folder, tasks, todo, times)))
    if todo:
        with signals(stop, on_event):
            _Run(config, manifest, todo, result, stop, on_event, worker, times).run()
            result.interrupted = stop.is_set()
    return result


def try_page(manifest: Manifest, on_event: Callable[[Event], None]) -> Path | None:
    """The page of a batch that has ended; where the disk does not take it, a warning and None: the videos are made."""
    try:
        return write_page(manifest)
    except OSError as error:
        on_event(
            Event("warning", f"{manifest.folder / PAGE} could not be written ({error}); the videos are not harmed")
        )
        return None


def write_page(manifest: Manifest) -> Path:
    """`index.html`: every job of a folder with a playing thumbnail, which is kept under `.slagen` for the next time."""
    with FileLock(manifest.folder / LOCKS / "page.lock"):  # one of those that share the work at a time
        return _write_page(manifest)


def _write_page(manifest: Manifest) -> Path:
    thumbnails = manifest.folder / LOCKS / "thumbnails"
    thumbnails.mkdir(exist_ok=True)
    sweep(thumbnails)
    cards = []
    for job in manifest.read().values():
        path, attention, video = manifest.folder / job.name, None, None
        state = job.state if job.state != "failed" else f"failed: {job.result.get('reason')}"
        if job.state == "done" and path.is_file():
            small = thumbnails / f"{job.key[:32]}-{digest(job.result['sha256'])[:16]}.mp4"
            try:
                if not small.is_file():
                    write_bytes(small, make_thumbnail(path))
                video = small.read_bytes()
                attention = _attention_share(path.with_suffix(".json"))
            except (SlagenError, OSError) as error:
                state = f"done, but unreadable: {error}"
        seconds = job.result.get("seconds")
        cards.append(Card(job.index, job.name, job.settings["prompt"], job.seed, state, video, seconds, attention))
    page = manifest.folder / PAGE
    write_text(page, contact_sheet(f"{manifest.folder.resolve().name}: {counted(len(cards), 'video')}", cards))
    return page


def _attention_share(report: Path) -> float | None:
    """The share that a report measured; None where it was not, or the report is none."""
    try:
        content = read_json(report, {"cost": {"measured_attention_share": float | None}})
    except WeightsError:
        return None
    return content["cost"]["measured_attention_share"]


def _plans(base: GenerateConfig, requests: list[prompts.Request], weights: Weights) -> list[tuple[Plan, str]]:
    """A plan for every video, its seed None where none is given, and its id. Raises UsageError with every fault."""
    prompts.check_count(requests, base.num_videos)
    found, faults = [], []
    for request in requests:
        try:
            config = prompts.apply(base, request)
            plan = make_plan(config, weights)
            if plan.config.attention != config.attention:
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
        more = [f"... and {len(faults) - 10} more"] if len(faults) > 10 else []
        raise UsageError(*faults[:10], *more)
    return found


def _warn(plans: list[tuple[Plan, str]], on_event: Callable[[Event], None]) -> None:
    """What `generate` would warn of for each video alone: the commonest ten, each once."""
    _tell_often((text for plan, _ in plans for text in plan.warnings), on_event)


def _tell_often(texts: Iterable[str], on_event: Callable[[Event], None]) -> None:
    """Warn of what holds for many videos: the commonest ten, each once."""
    counts = Counter(texts)
    for text, count in counts.most_common(10):
        on_event(Event("warning", text if count == 1 else f"{text} ({counted(count, 'video')})"))
    if len(counts) > 10:
        on_event(Event("warning", f"and {counted(len(counts) - 10, 'more warning')}"))


def _queue(
    manifest: Manifest, plans: list[tuple[Plan, str]], identity: str, on_event: Callable[[Event], None]
) -> list[Task]:
    """The job of every plan, queued where it is new; a plan that is there twice with one seed counts once."""
    wanted = []
    for plan, name in plans:
        settings = {key: value for key, value in plan.settings.items() if key not in NOT_IN_KEY}
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
    manifest: Manifest, jobs: dict[str, Job], tasks: list[Task], retry_failed: bool, worker: str, result: BatchResult,
    on_event: Callable[[Event], None],
) -> list[Task]:  # fmt: skip
    """Take away what killed runs left, and sort out what is done or failed; the rest is to do."""
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
            _restore(manifest, job, on_event)
        elif job.state == "failed" and str(job.result.get("worker")).split(":")[0] == worker.split(":")[0]:
            result.failed.append((job.name, str(job.result.get("reason"))))  # by another worker of this very run
        elif job.state == "failed" and not retry_failed:
            result.failed.append((job.name, f"{job.result.get('reason')} (before; --retry-failed tries again)"))
        else:
            if job.state == "done":
                on_event(Event("warning", f"{job.name} is gone or changed, and is made again"))
            todo.append(task)
    _tell_of_latents(manifest, [task for task in tasks if jobs[task.job.key].name in result.kept], on_event)
    return todo


def _tell_of_latents(manifest: Manifest, kept: list[Task], on_event: Callable[[Event], None]) -> None:
    """Warn of videos that were made before latents were asked for: a video that is whole is not made again."""
    videos = [manifest.folder / task.job.name for task in kept if task.plan.config.save_latents]
    lacking = [video for video in videos if not latents_beside(video)]
    if lacking:
        are = "one video is" if len(lacking) == 1 else f"{len(lacking)} videos are"
        text = (
            f"{are} there without latents, and not made again for them. To have both, delete such a video "
            f"(rm {shlex.quote(str(lacking[0]))}) and run this again, or give another --output"
        )
        on_event(Event("warning", text))


def _restore(manifest: Manifest, job: Job, on_event: Callable[[Event], None]) -> None:
    """Make the report of a video again where it is gone, from what the video says of itself."""
    path = manifest.folder / job.name
    lost = path.with_suffix(".json")
    lock = None if os.path.lexists(lost) else manifest.claim(job)
    if lock is None:
        return
    try:
        write_json(lost, restored_report(path, job.settings, job.result))
        on_event(Event("note", f"{lost.name} was gone, and is made again of what the video says: its times are lost"))
    except (SlagenError, OSError) as error:
        on_event(Event("warning", f"{lost.name} is gone; delete {path.name} to have both made again ({error})"))
    finally:
        lock.release()


def _check_room(folder: Path, todo: list[Task]) -> None:
    """Raise SlagenError where the disk does not hold the videos to make, at a quarter of a byte a pixel."""
    needed = sum(2**20 + _pixels(task) // 4 for task in todo)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise SlagenError(
            f"{folder} has {free / 2**20:.0f} MiB free, but {counted(len(todo), 'video')} may need "
            f"{needed / 2**20:.0f} MiB. Free some space, or give another folder with --output."
        )


def _check_memory(todo: list[Task]) -> None:
    """Raise SlagenError where this machine's memory holds none of the videos; one that it does not hold fails alone."""
    first = None
    for task in todo:
        try:
            check_memory(task.plan)
            return
        except SlagenError as error:
            first = first or error
    if first is not None:
        raise first


def _pixels(task: Task) -> int:
    config = task.plan.config
    return (config.width or 0) * (config.height or 0) * (config.num_frames or 0)


def _forecast(folder: Path, tasks: list[Task], todo: list[Task], times: Times) -> str:
    """How many, how long, how much; how long only where such videos were made here before."""
    if not todo:
        return f"{counted(len(tasks), 'video')}, none to make"
    seconds = times.of(todo)
    duration = "" if seconds is None else f"time: about {clock(seconds)}; "
    size = sum(2**20 + _pixels(task) // 4 for task in todo) / 2**20
    return f"{counted(len(tasks), 'video')}, {len(todo)} to make; {duration}disk: at most {size:.0f} MiB in {folder}"


SLOWEST = 1e7  # seconds for a video: slower than any machine, so no measurement


class Times:
    """Seconds that this machine's last videos took, kept in the cache by what their time depends on.

    A video of another size or with other steps tells nothing: decoding and the smallest layers take a share that is
    another at each, and a forecast by FLOPs alone was several times too long.

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
        return digest([*self.about, _work(task), _pixels(task), str(plan.weights.dtype), plan.backend])

    def _known(self) -> dict[str, list[float]]:
        try:
            content = read_json(self.store, {str: [float]})
        except WeightsError:
            return {}
        return {key: times for key, times in content.items() if all(0 < time < SLOWEST for time in times)}


def clock(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


@dataclass
class _Attempt:
    """One try at a job, from its sampling to its end in the manifest; holds the job's lock."""

    task: Task
    lock: BaseFileLock
    id: str
    video: Future[Video] | None = None


class _Run:
    """One process's share of the work: sampling here, writing in a thread, so that one goes on beside the other."""

    def __init__(
        self, config: BatchConfig, manifest: Manifest, todo: list[Task], result: BatchResult, stop: threading.Event,
        on_event: Callable[[Event], None], worker: str, times: Times,
    ) -> None:  # fmt: skip
        self.config, self.manifest, self.todo, self.result, self.stop = config, manifest, todo, result, stop
        self.on_event, self.worker, self.times = on_event, worker, times
        self.before = {task.job.key: task.job.result for task in todo}
        self.began: tuple[float, int] | None = None  # when the first video had ended, and the FLOPs until then
        self.writing: _Attempt | None = None

    def run(self) -> None:
        """Make what is to do, and wait for what others hold."""
        embeddings = Embeddings(self.todo[0].plan, self.config.cache_dir, not self.config.no_cache)
        missing = [task for task in self.todo if not embeddings.has(task.plan)]
        self.on_event(Event("stage", "load"))
        session = Session(self.todo[0].plan, text_encoder=bool(missing))
        if missing:
            self.on_event(Event("stage", "text"))
            for task in missing:
                embeddings.put(task.plan, session.encode(task.plan))
            session.release_text_encoder()
        _tell_often((text for task in self.todo for text in session.cuts(task.plan)), self.on_event)
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
            jobs = self.manifest.read()
            now = jobs[task.job.key]
            if now.state == "done" and self.manifest.is_whole(now):
                self.result.elsewhere.append(now.name)
                return True
            if now.state == "failed" and self._has_ended(now):
                self.result.failed.append((now.name, str(now.result.get("reason"))))
                return True
            attempt = _Attempt(task, lock, uuid.uuid4().hex)
            running = {"event": "running", "key": now.key, "attempt": attempt.id, "worker": self.worker}
            self.manifest.append(running)
            self.on_event(Event("job", f"{self._progress(jobs)}: {task.plan.config.prompt:.60}"))
            stages = {"start": 0.0, "load": 0.0, "text": 0.0}  # shared by all
            sample: Sample | None
            try:
                check_memory(task.plan, loaded=True)
                sample = session.sample(task.plan, embeddings.get(task.plan, session), stages, self.on_event)
            except (SlagenError, RuntimeError, ValueError, MemoryError) as error:
                self._fail(attempt, error)
                sample = None
            if sample is None:
                free_memory()  # what ran out of it held it until here
                return True
            self._finish()
            attempt.video, kept = writer.submit(save, sample, self.manifest.folder / task.job.name), True
            self.writing = attempt
            return True
        finally:
            if not kept:
                lock.release()

    def _finish(self) -> None:
        """Wait for the video that is being written, and put its end into the manifest."""
        if self.writing is None:
            return
        attempt, self.writing = self.writing, None
        task = attempt.task
        assert attempt.video is not None
        try:
            try:
                video = attempt.video.result()
            except (SlagenError, RuntimeError, OSError) as error:
                self._fail(attempt, error)
                return
            seconds = video.report["stages_s"]["total"]
            counts = self.manifest.finish(
                task.job, attempt.id, event="done", worker=self.worker, seconds=seconds,
                sha256=video.report["video"]["sha256"], latents_hash=video.report["latents_hash"],
            )  # fmt: skip
            (self.result.made if counts else self.result.elsewhere).append(task.job.name)
            self.times.add(task, seconds)
        finally:
            attempt.lock.release()

    def _fail(self, attempt: _Attempt, error: BaseException) -> None:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        reason = of_memory(error) if no_memory(error) else reason
        job = attempt.task.job
        self.manifest.finish(job, attempt.id, event="failed", worker=self.worker, reason=reason)
        self.result.failed.append((job.name, reason))
        self.on_event(Event("warning", f"{job.name} failed: {reason}"))

    def _has_ended(self, job: Job) -> bool:
        """Whether a job was made, or failed, since this run began, whoever ran it."""
        return job.state in ("done", "failed") and job.result is not self.before[job.key]

    def _progress(self, jobs: dict[str, Job]) -> str:
        """How many videos have ended, and the time left by what all who share the work have done since the first, which
        takes longer: kernels are compiled, and files read."""
        ended = [task for task in self.todo if self._has_ended(jobs[task.job.key])]
        left = ""
        sampled = [*ended, self.writing.task] if self.writing is not None else ended
        done, everything, now = sum(map(_work, sampled)), sum(map(_work, self.todo)), time.monotonic()
        if done and self.began is None:
            self.began = now, done
        elif self.began is not None and done > self.began[1]:
            left = f", about {clock((everything - done) * (now - self.began[0]) / (done - self.began[1]))} left"
        return f"{len(ended)} of {len(self.todo)} done{left}"


def _work(task: Task) -> int:
    """The FLOPs of a video's denoising, by which its time is foretold."""
    plan, shape = task.plan, task.plan.weights.source.shape
    attention = plan.method.cost(plan.attention, shape, plan.num_tokens)
    passes = (plan.config.steps or 1) * (2 if (plan.config.guidance_scale or 0) > 1 else 1)
    return passes * (attention + other_flops(shape, plan.num_tokens))


def _identity(weights: Weights, vae: str | None, cache: Path) -> str:
    """A hash of every file whose content changes pixels."""
    source = weights.source
    parts = ("text_encoder", "tokenizer", "scheduler") + (() if vae else ("vae",))
    files = component_files(source.folder, parts if source.weights else (*parts, "transformer"))
    for path in (source.weights, weights.sla_path, user_path(vae) if vae else None):
        if path is not None:
            files += [path] if path.is_file() else sorted(path.rglob("*.safetensors"))
    return file_hashes(list(dict.fromkeys(files)), cache)


def signals(stop: threading.Event, on_event: Callable[[Event], None]) -> AbstractContextManager[None]:
    """SIGINT once: finish the video and stop. SIGINT again, SIGTERM or SIGHUP: stop now."""
    text = "stopping after this video; press Ctrl-C again to stop now"
    return stopping(stop, lambda: on_event(Event("warning", text)), at_once=ENDING)
