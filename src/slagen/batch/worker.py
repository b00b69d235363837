"""run_worker: one process makes every job of a batch that no other process has."""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from filelock import BaseFileLock

from slagen.batch.check import find_remaining
from slagen.batch.config import BatchConfig
from slagen.batch.forecast import (
    RecordedTimes,
    check_batch_memory,
    check_disk_space,
    denoising_flops,
    describe_forecast,
    readable_duration,
)
from slagen.batch.manifest import Job, Manifest
from slagen.batch.queue import Task, _warn, identity_of_weights, plan_videos, queue_jobs, warn_of_each
from slagen.batch.result import BatchResult
from slagen.errors import SlagenError, no_memory, of_memory
from slagen.events import Event, counted_parts, nth
from slagen.generation import prompts
from slagen.generation.embeddings import Embeddings
from slagen.generation.generate import check_memory, save, taking
from slagen.generation.lora import asked_loras
from slagen.generation.lora_files import describe_loras
from slagen.generation.resolve import find_weights
from slagen.generation.result import Video
from slagen.generation.sample import Sample
from slagen.generation.session import Session, free_memory
from slagen.generation.stage_clock import StageClock
from slagen.interrupts import ENDING, stopping, telling_what_is_kept
from slagen.io.paths import user_path
from slagen.machine import PeakMemory, describe_device
from slagen.video import check_ffmpeg

POLL_S = 0.5


def run_worker(
    config: BatchConfig, requests: list[prompts.Request], stop: threading.Event, on_event: Callable[[Event], None],
    worker: str,
) -> BatchResult:  # fmt: skip
    """Generate every video of a batch that no other process holds.

    Args:
        stop: set it to end the run after the current video.
        worker: a name for this process, which the manifest keeps: an id of the run, host and process behind colons.
    Raises: as `batch`.
    """
    folder = user_path(config.generate.output)
    check_ffmpeg()
    weights = find_weights(config.generate, lambda text: on_event(Event("note", text)))
    base = config.generate
    for text in describe_loras(weights.loras, asked_loras(base.lora, base.lora_scale))[0]:
        on_event(Event("note", text))
    plans = plan_videos(base, requests, weights)
    _warn(plans, on_event)
    on_event(Event("stage", "hash"))
    cache = user_path(config.cache_dir)
    identity = identity_of_weights(weights, config.generate.vae, cache)
    manifest = Manifest(folder)
    tasks = queue_jobs(manifest, plans, identity, on_event)
    if config.shard is not None:
        part, parts = config.shard
        tasks = tasks[part - 1 :: parts]
    jobs = manifest.read()
    result = BatchResult(folder)
    todo = find_remaining(manifest, jobs, tasks, config.retry_failed, worker, result, on_event)
    check_disk_space(folder, todo)
    check_batch_memory(todo)
    times = RecordedTimes(cache, [identity, describe_device(weights.device).name])
    on_event(Event("plan", describe_forecast(folder, tasks, todo, times)))
    if todo:
        with telling_what_is_kept(lambda: result.kept_so_far), stop_on_signals(stop, on_event):
            WorkerLoop(config, manifest, todo, result, stop, on_event, worker, times).run()
            result.interrupted = stop.is_set()
    return result


@dataclass
class _Attempt:
    """One attempt at a job, from sampling until the manifest records its end; holds the job's lock."""

    task: Task
    lock: BaseFileLock
    id: str
    video: Future[Video] | None = None


class WorkerLoop:
    """The loop of one process: it samples here and writes videos in a thread, so that the two overlap."""

    def __init__(
        self, config: BatchConfig, manifest: Manifest, todo: list[Task], result: BatchResult, stop: threading.Event,
        on_event: Callable[[Event], None], worker: str, times: RecordedTimes,
    ) -> None:  # fmt: skip
        self.config, self.manifest, self.todo, self.result, self.stop = config, manifest, todo, result, stop
        self.on_event, self.worker, self.times = on_event, worker, times
        self.before = {task.job.key: task.job.result for task in todo}
        self.began: tuple[float, int] | None = None  # when the first video had ended, and the FLOPs until then
        self.writing: _Attempt | None = None
        self.memory = PeakMemory(todo[0].plan.weights.device)

    def run(self) -> None:
        """Generate what remains, and wait for what other processes hold."""
        embeddings = Embeddings(self.todo[0].plan, self.config.cache_dir, not self.config.no_cache)
        missing = [task for task in self.todo if not embeddings.has(task.plan)]
        self.on_event(Event("stage", "load"))
        several = len({tuple(map(str, task.plan.loras)) for task in self.todo}) > 1
        session = Session(self.todo[0].plan, bool(missing), on_event=self.on_event, several=several)
        if missing:
            self.on_event(Event("stage", "text", num_steps=len(missing)))
            advance = counted_parts(self.on_event, len(missing))
            for task in missing:
                embeddings.put(task.plan, session.encode(task.plan))
                advance()
            session.release_text_encoder()
        warn_of_each((text for task in self.todo for text in session.cuts(task.plan)), self.on_event)
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
        """Generate one video; False if another process holds it."""
        if self.stop.is_set():
            return True
        lock = self.manifest.claim(task.job)
        if lock is None:
            return False
        held, kept = contextlib.ExitStack(), False  # what the video's frames are encoded into
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
            self.on_event(self._job_event(jobs, task.plan.config.prompt))
            clock = StageClock()
            clock.watch(self.memory)
            clock.begin("prepare")
            sample: Sample | None
            path = self.manifest.folder / task.job.name
            try:
                check_memory(task.plan, loaded=True)
                frames, begin = held.enter_context(taking(task.plan, path, keep=False))
                sample = session.sample(
                    task.plan, embeddings.get(task.plan, session), clock, self.on_event, frames=frames, begin=begin
                )
            except (SlagenError, RuntimeError, ValueError, MemoryError) as error:
                self._fail(attempt, error)
                sample = None
            if sample is None:
                held.close()
                free_memory()  # what ran out of it held it until here
                return True
            clock.overlap()
            clock.begin("wait")
            self._finish()
            attempt.video, kept = writer.submit(_save, sample, path, held), True
            self.writing = attempt
            return True
        finally:
            if not kept:
                held.close()
                lock.release()

    def _finish(self) -> None:
        """Wait for the video that is being written, and record its end in the manifest."""
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
            seconds = video.record.stages_s["total"]
            counts = self.manifest.finish(
                task.job, attempt.id, event="done", worker=self.worker, seconds=seconds,
                sha256=video.record.video.sha256, latents_hash=video.record.latents_hash,
            )  # fmt: skip
            (self.result.made if counts else self.result.elsewhere).append(task.job.name)
            self.times.add(task, seconds - video.record.stages_s.get("compile", 0.0))
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
        """Whether any process has completed or failed a job since this run began."""
        return job.state in ("done", "failed") and job.result is not self.before[job.key]

    def _job_event(self, jobs: dict[str, Job], prompt: str) -> Event:
        """How many videos have ended, and the time left by what all who share the work have done since the first, which
        takes longer: kernels are compiled, and files read."""
        ended = [task for task in self.todo if self._has_ended(jobs[task.job.key])]
        left_s = None
        sampled = [*ended, self.writing.task] if self.writing is not None else ended
        done, everything, now = (
            sum(map(denoising_flops, sampled)),
            sum(map(denoising_flops, self.todo)),
            time.monotonic(),
        )
        if done and self.began is None:
            self.began = now, done
        elif self.began is not None and done > self.began[1]:
            left_s = (everything - done) * (now - self.began[0]) / (done - self.began[1])
        left = "" if left_s is None else f", about {readable_duration(left_s)} left"
        total = len(self.todo)
        text = f"{len(ended)} of {total} done{left}: {prompt}"
        about = nth("video", min(total, len(sampled) + 1), total, prompt)
        return Event("job", text, num_steps=total, done=len(sampled), about=about, left_s=left_s)


def _save(sample: Sample, path: Path, held: contextlib.ExitStack) -> Video:
    """Write what was sampled, whose frames are encoded already in what is held. Raises: as `save`."""
    with held:
        return save(sample, path)


def stop_on_signals(
    stop: threading.Event, on_event: Callable[[Event], None]
) -> contextlib.AbstractContextManager[None]:
    """SIGINT once: finish the video and stop. SIGINT again, SIGTERM or SIGHUP: stop now."""
    text = "stopping after this video; press Ctrl-C again to stop now"
    return stopping(stop, lambda: on_event(Event("warning", text)), at_once=ENDING)
