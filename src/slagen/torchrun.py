"""What torchrun tells each process that it starts; a process that it did not start is the only one. No torch here."""

from __future__ import annotations

import os


def size() -> int:
    """The number of processes that run this command together."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def rank() -> int:
    """This process's number among them, from 0; the first one writes and prints."""
    return int(os.environ.get("RANK", "0")) if size() > 1 else 0
