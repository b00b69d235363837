"""BatchConfig: the settings of one call of `slagen batch`. No torch here."""

import re
from dataclasses import dataclass

from slagen.errors import UsageError
from slagen.generation.config import CACHE, GenerateConfig
from slagen.io.text import quote
from slagen.settings import option
from slagen.wan.defaults import MAX_VIDEOS


def parse_shard(text: str) -> tuple[int, int]:
    """(i, n) from "i/n". Raises UsageError."""
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text.strip())
    if match is None:
        raise UsageError(f"shard is {quote(text)}, but must be I/N, such as 1/4 on the first of four machines.")
    return int(match[1]), int(match[2])


@dataclass(frozen=True)
class BatchConfig:
    """One call of `slagen batch`.

    Args:
        prompts: a prompt file, or "-" for stdin.
        generate: the settings of every prompt that says nothing else; its own prompt is not used.
        retry_failed: try again what failed before.
        shard: (i, n): make each n-th job alone, from the i-th on, 1 being the first.
        cache_dir: where hashes and prompt embeddings are kept. no_cache: keep no embeddings.
        ray_address: of a Ray cluster that shares the work; "local" starts one on this machine, None uses no Ray.
        ray_workers: how many of its actors; None is one for each GPU, or for each machine where there is none.
    Raises: UsageError for an invalid shard, or workers without Ray.
    """

    prompts: str
    generate: GenerateConfig
    retry_failed: bool = option(False, "Retry videos that failed in an earlier run.")
    shard: tuple[int, int] | None = option(
        None, "Generate part I of N, to divide the batch among N machines.", metavar="I/N", kind=str, read=parse_shard
    )
    cache_dir: str = option(CACHE, "Folder for cached prompt embeddings and file hashes.")
    no_cache: bool = option(False, "Do not cache prompt embeddings.")
    ray_address: str | None = option(
        None,
        "Distribute the batch over the Ray cluster at this address. If the cluster requires a token, set "
        "RAY_AUTH_TOKEN to the token or RAY_AUTH_TOKEN_PATH to a file that holds it.",
        metavar="HOST:PORT",
    )
    ray_workers: int | None = option(
        None, "Number of Ray workers; each loads the model. Default: one per GPU, or one per machine without GPUs."
    )

    def __post_init__(self) -> None:
        if self.generate.trace is not None:
            raise UsageError("--trace writes the trace of one video, but a batch generates many. Leave --trace out.")
        if self.generate.preview is not None:
            raise UsageError("--preview writes pictures of one video, but a batch generates many. Leave --preview out.")
        if self.ray_workers is not None and self.ray_address is None:
            raise UsageError(f"ray_workers is {self.ray_workers}, but Ray is not used. Add --ray.")
        if self.ray_workers is not None and not 1 <= self.ray_workers <= MAX_VIDEOS:
            raise UsageError(
                f"ray_workers is {self.ray_workers}, but must be from 1 to {MAX_VIDEOS}. Try --ray-workers 1."
            )
        if self.shard is not None and not 1 <= self.shard[0] <= self.shard[1]:
            raise UsageError(f"shard is {self.shard[0]}/{self.shard[1]}, but must be I/N with I from 1 to N. Try 1/2.")
