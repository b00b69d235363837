"""BatchResult: what became of every video of a batch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


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
