"""Refuse a batch before torch is imported: a faulty prompt file, a missing model, one output file for all."""

from __future__ import annotations

from slagen.batch.config import BatchConfig
from slagen.errors import UsageError
from slagen.generation.preflight import check_model
from slagen.generation.prompts import Request, read_prompts
from slagen.io.paths import is_video, user_path


def read_batch(config: BatchConfig) -> list[Request]:
    """Read a batch's prompt file, and look at what it will run with and write to.

    Raises: UsageError with every fault of the file; as `check_model`.
    """
    requests = read_prompts(config.prompts)
    base = config.generate
    if is_video(base.output):
        raise UsageError(
            f"{user_path(base.output)} is one file, but a batch writes many. Choose a folder with --output."
        )
    check_model(base.model, base.weights, base.vae)
    return requests
