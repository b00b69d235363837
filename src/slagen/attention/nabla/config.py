"""NablaConfig: which patches are attended exactly. No torch here."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from slagen.attention.cubes import Sides
from slagen.errors import UsageError
from slagen.io.forms import shown
from slagen.settings import option

Backend = Literal["auto", "reference", "torch"]

NO_TILE = "none"


@dataclass(frozen=True, kw_only=True)
class NablaConfig:
    """Which patches of 8 x 8 tokens of a frame a patch attends to.

    Args:
        top_p: share of the pooled attention map that the patches kept of a row hold at least, above 0 and at most 1.
        sliding_tile: the patches around a patch that it attends to in any case: "11x3x3" are those within 11 frames, 3
            rows and 3 columns of patches, with it in the middle; "none" for no such.
    Raises: UsageError if a value is out of range.
    """

    top_p: float = option(
        0.4,
        "Share of the pooled attention that the kept patches must hold for each query patch, above 0 and at most 1.",
        prompt_line=True,
    )
    sliding_tile: str = option(
        "11x3x3",
        "Size of the tile that is always kept around each patch: frames x rows x columns of patches, or none.",
        metavar="TxHxW",
        prompt_line=True,
    )

    def __post_init__(self) -> None:
        valid = isinstance(self.top_p, int | float) and not isinstance(self.top_p, bool)
        if not valid or not 0 < self.top_p <= 1:
            raise UsageError(
                f"top_p is {shown(self.top_p)}, but must be a number above 0 and at most 1. Try --top-p 0.4."
            )
        if self.sliding_tile != NO_TILE and not (isinstance(self.sliding_tile, str) and self._sizes()):
            raise UsageError(
                f"sliding_tile is {shown(self.sliding_tile)}, but must be three numbers of at least 1, or none. Try "
                "--sliding-tile 11x3x3."
            )

    def _sizes(self) -> Sides | None:
        match = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})x([1-9]\d{0,4})", self.sliding_tile)
        return None if match is None else (int(match[1]), int(match[2]), int(match[3]))

    @property
    def reach(self) -> Sides | None:
        """How many patches the sliding tile goes to each side, along frames, rows and columns; None without one."""
        sizes = self._sizes()
        return None if sizes is None else (sizes[0] // 2, sizes[1] // 2, sizes[2] // 2)
