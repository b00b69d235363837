"""What `batch` prints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slagen.cli.console import log, log_as, write, write_json

if TYPE_CHECKING:
    from slagen.batch.result import BatchResult


def show_batch(result: BatchResult, as_json: bool) -> None:
    """Print what `batch` generated: one path a line on stdout and counts on stderr, or JSON alone on stdout."""
    if as_json:
        write_json(result.to_dict())
        return
    for name in result.made:
        write(str(result.folder / name))
    for name, reason in result.failed:
        log_as("failed", "bold red", f"{name}: {reason}")
    if result.page is not None:
        log(f"contact sheet: {result.page}")
    elsewhere = f", {len(result.elsewhere)} by another process" if result.elsewhere else ""
    log(f"{len(result.made)} generated{elsewhere}, {len(result.kept)} already complete, {len(result.failed)} failed")
