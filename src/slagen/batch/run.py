"""batch(BatchConfig) -> BatchResult: a video of every prompt in a file, with one manifest that survives any crash.

Every job is looked up in the manifest, or queued there with its seed, before a model loads. Then each is taken under
its lock, generated, and its end recorded; what is complete is verified and left alone. Several processes can work on
one folder: a process that cannot get a lock goes on to the next job and comes back later.
"""

from __future__ import annotations

import os
import socket
import threading
import uuid
from collections.abc import Callable

from slagen.batch.config import BatchConfig
from slagen.batch.contact_sheet import write_page_or_warn
from slagen.batch.manifest import Manifest
from slagen.batch.preflight import read_batch
from slagen.batch.result import BatchResult
from slagen.batch.worker import run_worker
from slagen.events import Event
from slagen.generation import prompts


def batch(
    config: BatchConfig, on_event: Callable[[Event], None] = lambda event: None,
    requests: list[prompts.Request] | None = None,
) -> BatchResult:  # fmt: skip
    """Generate every video of a prompt file that is not complete yet.

    Args:
        requests: what `read_batch` returned, if the caller has read the prompt file already.
        on_event: called for the plan, and for every video, stage and step.
    Raises: UsageError for a faulty prompt file, before anything is loaded; SlagenError where nothing can be written.
        What goes wrong with one prompt is in the result.
    """
    requests = requests or read_batch(config)
    stop = threading.Event()
    worker = f"{uuid.uuid4().hex[:12]}:{socket.gethostname()}:{os.getpid()}"
    result = run_worker(config, requests, stop, on_event, worker)
    result.page = write_page_or_warn(Manifest(result.folder), on_event)
    return result
