"""The training loop: steps, log, checkpoints and validations, until the last step or a signal."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from slagen.events import Event
from slagen.training.output_folder import TENSORBOARD


@contextmanager
def tensorboard_writer(folder: Path, wanted: bool, step: int, tell: Callable[[Event], None]) -> Iterator[Any]:
    """A writer of event files after a step, or None; where TensorBoard is not installed, one line says so."""
    if not wanted:
        yield None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        tell(Event("warning", "no TensorBoard files: it is not installed (pip install 'slagen[tensorboard]')"))
        yield None
        return
    with SummaryWriter(folder / TENSORBOARD, purge_step=step + 1) as board:
        yield board
