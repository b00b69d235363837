"""Refuse a batch before torch is imported: a faulty prompt file, a missing model, one output file for all."""

from __future__ import annotations

from slagen.batch.config import BatchConfig
from slagen.errors import UsageError
from slagen.generation.config import GenerateConfig
from slagen.generation.preflight import check_model
from slagen.generation.prompts import Request, apply, read_prompts
from slagen.io.paths import is_video, user_path


def read_batch(config: BatchConfig) -> list[Request]:
    """Read a batch's prompt file, and look at what it will run with and write to.

    Raises: UsageError with every fault of the file; as `check_model`.
    """
    requests = read_prompts(config.prompts)
    base = config.generate
    if is_video(base.output):
        raise UsageError(
            f"{user_path(base.output)} is a single file, but a batch writes many. Choose a folder with --output."
        )
    check_model(base.model, base.weights, base.vae, image=None)
    _check_steps(base, requests)
    return requests


def _check_steps(base: GenerateConfig, requests: list[Request]) -> None:
    """Raise UsageError for denoising steps that there are not, where the number of steps is given."""
    faults = []
    for request in requests:
        named = [request.fields.get(name, getattr(base, name)) for name in ("dense_steps", "sparsity_schedule")]
        steps = request.fields.get("steps", base.steps)
        if steps is None or named == [None, None]:
            continue
        try:
            apply(base, request).policy.check_steps(steps)
        except UsageError as error:
            faults.append(f"{request.where}: {error}")
    if faults:
        more = [f"... and {len(faults) - 10} more"] if len(faults) > 10 else []
        raise UsageError(*faults[:10], *more)
