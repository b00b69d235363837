"""What `finetune` and `finetune data` print."""

from __future__ import annotations

from typing import Any

from slagen.cli.console import log, write, write_json
from slagen.io.text import counted


def show_finetune(result: Any, as_json: bool) -> None:
    """Print the result of a training: the weights' path on stdout and the rest on stderr, or JSON alone."""
    if as_json:
        write_json(result.to_dict())
        return
    before, after = result.teacher_error_before, result.teacher_error_after
    log(f"relative L2 error to the dense teacher on held-out clips: {before:.4f} before, {after:.4f} after")
    log(f"page with curves and clips: {result.page}")
    write(str(result.weights))


def show_data(data: Any, as_json: bool) -> None:
    """Print what a prepared set holds: its folder on stdout and counts on stderr, or JSON alone."""
    if as_json:
        write_json(data.to_dict())
        return
    log(f"{counted(len(data.training), 'clip')} for training, {len(data.held_out)} held out")
    write(str(data.folder))
