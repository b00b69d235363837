"""RettentionConfig: the window, and how long what a dense step showed is used. No torch here."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Literal

from slagen.attention.protocol import Grid
from slagen.errors import UsageError
from slagen.io.forms import shown
from slagen.settings import option

Backend = Literal["auto", "reference", "torch"]
MAX_REFRESH = 1000  # steps: no sampler has more


@dataclass(frozen=True)
class RettentionConfig:
    """Which tokens are attended exactly, and in which steps all of them are.

    Args:
        window_fraction: of the places in a frame, in [0, 1]: those around its own that a token attends to, in every
            frame. Its own place always is one of them.
        refresh_steps: every so many steps run dense and are remembered.
        ratio_growth: what is added, at each step between, to the share of the softmax that the window is taken to
            hold.
    Raises: UsageError if a value is out of range.
    """

    window_fraction: float = option(
        0.031,
        "Fraction of the positions in each frame that a token attends to, around its own position.",
        prompt_line=True,
    )
    refresh_steps: int = option(
        5, "Run every N-th step with dense attention; the steps in between reuse its result.", prompt_line=True
    )
    ratio_growth: float = option(
        0.04,
        "Increase of the window's assumed share of the softmax with each step since the last dense step.",
        prompt_line=True,
    )

    def __post_init__(self) -> None:
        for name, most, example in (("window_fraction", 1.0, "0.031"), ("ratio_growth", sys.float_info.max, "0.04")):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= most:
                bound = "from 0 to 1" if most == 1 else "a finite number of at least 0"
                raise UsageError(
                    f"{name} is {shown(value)}, but must be {bound}. Try --{name.replace('_', '-')} {example}."
                )
        steps = self.refresh_steps
        if type(steps) is not int or not 1 <= steps <= MAX_REFRESH:
            raise UsageError(
                f"refresh_steps is {shown(steps)}, but must be a whole number from 1 to {MAX_REFRESH}. "
                "Try --refresh-steps 5."
            )

    def reach(self, grid: Grid) -> int:
        """How many places on each side of its own a token attends to, in every frame."""
        return round(self.window_fraction * grid.height * grid.width) // 2

    def pairs(self, grid: Grid) -> int:
        """The query-key pairs of the window, of the grid's L^2."""
        places = grid.height * grid.width
        reach = min(self.reach(grid), places - 1)
        return grid.num_frames**2 * (places * (2 * reach + 1) - reach * (reach + 1))
