"""batch_on_ray(BatchConfig) -> BatchResult: the same batch, divided among Ray actors on one machine or many.

Each actor is a process with its own model and takes jobs that no other holds, as several `slagen batch` commands on one
folder do. This module starts the actors, forwards their progress, and replaces those that die.
"""

from __future__ import annotations

import dataclasses
import os
import queue
import socket
import threading
import uuid
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any

from slagen import __version__
from slagen.batch.config import BatchConfig
from slagen.batch.contact_sheet import write_page_or_warn
from slagen.batch.manifest import Manifest
from slagen.batch.preflight import read_batch
from slagen.batch.ray_connection import LOCAL, connected_to_ray
from slagen.batch.result import REST, BatchResult
from slagen.batch.worker import run_worker, stop_on_signals
from slagen.errors import EnvironmentProblem, SlagenError, UsageError, for_the_command_line
from slagen.events import Event
from slagen.generation import prompts
from slagen.interrupts import telling_what_is_kept
from slagen.io.paths import user_path
from slagen.io.text import counted
from slagen.wan.presets import PRESETS

POLL_S = 0.5
MAX_LOSSES = 3  # workers that a job, or that starting, may cost before it is given up


def batch_on_ray(
    config: BatchConfig, on_event: Callable[[Event], None] = lambda event: None,
    requests: list[prompts.Request] | None = None,
) -> BatchResult:  # fmt: skip
    """Generate every video of a prompt file that is not complete yet, on Ray.

    Args:
        requests: as for `batch`.
        config: with a `ray_address`. All machines must see its files and its output folder under the same paths.
        on_event: called for every worker's plan, videos, stages and steps.
    Raises: EnvironmentProblem if Ray is not installed or cannot be reached; otherwise as `batch`.
    """
    requests = requests or read_batch(config)
    config = _with_absolute_paths(config)
    stop = threading.Event()
    with (
        open(os.devnull, "w") as nowhere,
        redirect_stdout(nowhere),  # where Ray reports workers that died
        connected_to_ray(config.ray_address or LOCAL) as ray,
        telling_what_is_kept(lambda: f"Finished videos are kept in {config.generate.output}. {REST}"),
        stop_on_signals(stop, on_event),
    ):
        return Driver(ray, config, requests, stop, on_event).run()


def _with_absolute_paths(config: BatchConfig) -> BatchConfig:
    """The same config for processes with another working directory."""
    base = config.generate
    paths: dict[str, Any] = {"output": f"{user_path(base.output).absolute()}/"}
    for name in ("model", "weights", "vae"):
        value = getattr(base, name)
        if value is not None and value not in PRESETS and user_path(value).exists():
            paths[name] = str(user_path(value).absolute())
    cache = str(user_path(config.cache_dir).absolute())
    return dataclasses.replace(config, generate=dataclasses.replace(base, **paths), cache_dir=cache)


class Worker:
    """An actor: one process with one model. The driver calls its methods remotely.

    Args:
        config, requests: the whole batch; the worker takes jobs that no other holds.
        name: for the manifest; host and process are put behind it.
        number: for progress.
    """

    def __init__(self, config: BatchConfig, requests: list[prompts.Request], name: str, number: int) -> None:
        self.config, self.requests, self.number = config, requests, number
        self.name = f"{name}:{socket.gethostname()}:{os.getpid()}"
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.stopping = threading.Event()

    def run(self) -> BatchResult | SlagenError:
        """Work until the batch is complete; an expected error is returned, since Ray would wrap a raised one."""
        try:
            with for_the_command_line():
                return run_worker(self.config, self.requests, self.stopping, self._emit, self.name)
        except SlagenError as error:
            return error

    def poll(self) -> tuple[str, str, list[Event]]:
        """This worker's name, its version of slagen, and the events since the last call; waits a while for one."""
        events: list[Event] = []
        with suppress(queue.Empty):
            events.append(self.events.get(timeout=POLL_S))
            while True:
                events.append(self.events.get_nowait())
        return self.name, __version__, events

    def stop(self) -> None:
        """Stop after the current video."""
        self.stopping.set()

    def _emit(self, event: Event) -> None:
        self.events.put(dataclasses.replace(event, worker=self.number))


@dataclasses.dataclass
class WorkerHandle:
    """The driver's handle on one worker: its actor, the call that works, the call that waits for events."""

    number: int
    actor: Any
    result: Any
    poll: Any
    name: str = ""  # once it has started


class Driver:
    def __init__(
        self, ray: Any, config: BatchConfig, requests: list[prompts.Request], stop: threading.Event,
        on_event: Callable[[Event], None],
    ) -> None:  # fmt: skip
        self.ray, self.config, self.requests, self.stop, self.on_event = ray, config, requests, stop, on_event
        self.run_id = uuid.uuid4().hex[:12]
        self.losses: Counter[str] = Counter()  # by the key of a job, or "" for a worker that had none yet
        self.results: list[BatchResult] = []
        self.handles: list[WorkerHandle] = []

    def run(self) -> BatchResult:
        """Run the workers until the batch is complete."""
        options, count = self._resources()
        self.make_actor = self.ray.remote(max_concurrency=4, max_restarts=0, **options)(Worker)
        self.on_event(Event("note", f"{count} Ray worker{'s' * (count > 1)}, {_describe_resources(options)} each"))
        self.handles = [self._spawn(number) for number in range(1, count + 1)]
        asked_to_stop = False
        try:
            while self.handles:
                if self.stop.is_set() and not asked_to_stop:
                    asked_to_stop = True
                    self._stop_workers()
                waiting = [ref for handle in self.handles for ref in (handle.result, handle.poll)]
                ready, _ = self.ray.wait(waiting, timeout=POLL_S)
                for handle in list(self.handles):
                    if ready and ready[0] in (handle.result, handle.poll):
                        self._handle_message(handle, ready[0])
        finally:
            for handle in self.handles:
                self.ray.kill(handle.actor)
        return self._combined_result()

    def _resources(self) -> tuple[dict[str, float], int]:
        """The resources of one actor, and the number of actors."""
        have = self.ray.cluster_resources()
        gpus = 0 if self.config.generate.device == "cpu" else int(have.get("GPU", 0))
        machines = sum(name.startswith("node:") and not name.startswith("node:__") for name in have)
        wanted = self.config.ray_workers or gpus or machines or 1
        base = self.config.generate.num_videos
        videos = [request.fields.get("num_videos", base) for request in self.requests]
        wanted = min(wanted, sum(videos))
        if gpus:
            if wanted > gpus:
                raise UsageError(
                    f"ray_workers is {wanted}, but Ray has {counted(gpus, 'GPU')}. Try --ray-workers {gpus}."
                )
            return {"num_gpus": 1}, wanted
        cpus = int(have.get("CPU", 0))
        if wanted > cpus:
            raise UsageError(f"ray_workers is {wanted}, but Ray has {cpus} CPUs. Try --ray-workers {max(1, cpus)}.")
        return {"num_cpus": cpus // wanted}, wanted

    def _spawn(self, number: int) -> WorkerHandle:
        actor = self.make_actor.remote(self.config, self.requests, self.run_id, number)
        return WorkerHandle(number, actor, actor.run.remote(), actor.poll.remote())

    def _handle_message(self, handle: WorkerHandle, ref: Any) -> None:
        """Handle the result of one remote call. Raises a worker's error if it would stop all workers."""
        try:
            given = self.ray.get(ref)
        except self.ray.exceptions.RayActorError as error:
            self.handles.remove(handle)
            self._replace(handle, error)
            return
        except self.ray.exceptions.RayError as error:
            raise SlagenError(f"Ray worker {handle.number} failed: {_reason(error)}") from error
        if ref is handle.poll:
            handle.name, version, events = given
            if version != __version__:
                raise EnvironmentProblem(
                    f"a Ray worker runs slagen {version}, but this machine runs {__version__}. Install one "
                    "version everywhere."
                )
            for event in events:
                if event.kind != "plan" or handle.number == 1:
                    self.on_event(event)
            handle.poll = handle.actor.poll.remote()
            return
        self.handles.remove(handle)
        with suppress(self.ray.exceptions.RayActorError):
            for _, _, events in (self.ray.get(handle.poll), self.ray.get(handle.actor.poll.remote())):
                for event in events:
                    self.on_event(event)
        self.ray.kill(handle.actor)
        if isinstance(given, SlagenError):
            raise given
        self.results.append(given)
        if not given.interrupted:  # all is done, so nobody needs those that have not begun
            self._stop_workers()

    def _stop_workers(self) -> None:
        """Ask workers to stop after their video, and kill those that have not started."""
        for handle in list(self.handles):
            if handle.name:
                handle.actor.stop.remote()
            else:
                self.handles.remove(handle)
                self.ray.kill(handle.actor)

    def _replace(self, handle: WorkerHandle, error: Exception) -> None:
        """A worker died: record the job it was on, and start another unless too many have died."""
        manifest = Manifest(Path(self.config.generate.output))
        mine = [job for job in manifest.read().values() if job.state == "running" and self._worker(job) == handle.name]
        for job in mine:
            self.losses[job.key] += 1
            if self.losses[job.key] >= MAX_LOSSES:
                reason = (
                    f"the worker process that was generating it died {MAX_LOSSES} times; it may have run out of memory"
                )
                manifest.finish(job, job.attempt, event="failed", worker=handle.name, reason=reason)
        if self.stop.is_set():
            return
        self.losses[""] = 0 if mine else self.losses[""] + 1
        if self.losses[""] >= MAX_LOSSES:
            raise SlagenError(f"{MAX_LOSSES} Ray workers in a row died before they generated a video: {_reason(error)}")
        self.on_event(Event("warning", f"Ray worker {handle.number} died; starting another"))
        self.handles.append(self._spawn(handle.number))

    @staticmethod
    def _worker(job: Any) -> str:
        return str(job.result.get("worker"))

    def _combined_result(self) -> BatchResult:
        """The result of all workers; what died workers generated is in the manifest."""
        folder = Path(self.config.generate.output)
        manifest = Manifest(folder)
        jobs = manifest.read().values()
        made = [job.name for job in jobs if job.state == "done" and self._worker(job).startswith(self.run_id)]
        there = {name for result in self.results for name in (*result.kept, *result.elsewhere)}
        failed = {name: reason for result in self.results for name, reason in result.failed}
        done = {job.name for job in jobs if job.state == "done"}
        before = {name for result in self.results for name in result.kept}
        return BatchResult(
            folder, made=made,
            kept=[job.name for job in jobs if job.name in before and job.name not in made],
            elsewhere=[job.name for job in jobs if job.name in there - before and job.name not in made],
            failed=[(name, reason) for name, reason in failed.items() if name not in done],
            interrupted=self.stop.is_set(), page=write_page_or_warn(manifest, self.on_event),
        )  # fmt: skip


def _describe_resources(options: dict[str, float]) -> str:
    (name, number), *_ = options.items()
    what = name.removeprefix("num_").removesuffix("s").upper()
    return f"{number:g} {what}{'s' * (number > 1)}"


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[-1][:300]
