"""What a training gives back: the weights that it writes, their error, and the page."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class FinetuneResult:
    """What a training came to.

    Args:
        output: the folder. weights: what `slagen generate --weights` takes: the file, or the folder where the
            transformer that was trained is no model's own and so lies beside it.
        teacher_error_before, teacher_error_after: relative L2 error of the velocity to the dense teacher's, on clips
            that were never trained on, without guidance; after: of the very weights that were written.
        steps: of the optimiser, in all. seconds: of training, in all. page: curves and clips.
        rank: of the process that says so, under torchrun.
    """

    output: Path
    weights: Path
    steps: int
    teacher_error_before: float
    teacher_error_after: float
    seconds: float
    page: Path
    rank: int = 0
