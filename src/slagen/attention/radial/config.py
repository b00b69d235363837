"""RadialConfig: how far each frame sees into each other one. No torch here."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass

from slagen.attention.sla.config import BLOCK_SIZES, check_choice
from slagen.errors import UsageError
from slagen.io.forms import shown
from slagen.settings import option


@dataclass(frozen=True, kw_only=True)
class RadialConfig:
    """How the band of tokens that are attended to narrows with the distance between frames.

    Args:
        decay_factor: on the width of the band between frames that are two or more apart, above 0. At 0.2, the default,
            as in the authors' script for Wan2.1.
        block_m, block_n: query rows and key columns in a block: 16, 32, 64 or 128. The authors' are 128.
    Raises: UsageError if a value is out of range.
    """

    decay_factor: float = option(
        0.2,
        "Factor above 0 that scales the width of the attended band of tokens between frames two or more apart.",
        prompt_line=True,
    )
    block_m: int = 128
    block_n: int = 128

    def __post_init__(self) -> None:
        valid = isinstance(self.decay_factor, int | float) and not isinstance(self.decay_factor, bool)
        if not valid or not 0 < self.decay_factor <= sys.float_info.max:  # whole numbers beyond it are no floats
            raise UsageError(
                f"decay_factor is {shown(self.decay_factor)}, but must be a finite number above 0. Try "
                "--decay-factor 0.2."
            )
        check_choice("block_m", self.block_m, BLOCK_SIZES)
        check_choice("block_n", self.block_n, BLOCK_SIZES)

    def num_blocks(self, length: int) -> tuple[int, int]:
        """The numbers of query and key blocks (M, N) that cover `length` tokens; the last ones may be partial."""
        return math.ceil(length / self.block_m), math.ceil(length / self.block_n)

    def reach(self, distance: int, frame_tokens: int) -> int | None:
        """How many tokens to each side of its own place in the frame a query sees in a frame so many frames away.

        Args:
            frame_tokens: in each frame.
        Returns: None where it sees nothing of that frame; `frame_tokens` is all of it.
        """
        if distance == 0:
            return frame_tokens
        length = 2.0 ** (frame_tokens.bit_length() - distance.bit_length())
        if length < self.block_n and distance % int(self.block_n / length) != 0:
            return None
        if distance == 1:
            return frame_tokens // 2
        return max(self.block_n, int(min(length * self.decay_factor, float(frame_tokens))))
