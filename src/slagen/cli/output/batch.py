"""What `batch` prints."""

from __future__ import annotations

from typing import Any

from slagen.cli.console import log, log_as, write, write_json


def show_batch(result: Any, as_json: bool) -> None:
    """Print what `batch` made: one path a line on stdout and counts on stderr, or JSON alone on stdout."""
    if as_json:
        content = {**vars(result), "folder": str(result.folder), "page": result.page and str(result.page)}
        content["failed"] = [{"video": name, "reason": reason} for name, reason in result.failed]
        write_json(content)
        return
    for name in result.made:
        write(str(result.folder / name))
    for name, reason in result.failed:
        log_as("failed", "bold red", f"{name}: {reason}")
    if result.page is not None:
        log(f"contact sheet: {result.page}")
    elsewhere = f", {len(result.elsewhere)} by another process" if result.elsewhere else ""
    log(f"{len(result.made)} generated{elsewhere}, {len(result.kept)} already complete, {len(result.failed)} failed")
