"""Re-ttention as a layer of a transformer, which remembers its last dense step."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from slagen.attention.cubes import check_tokens
from slagen.attention.kept_pairs import PairCounter
from slagen.attention.protocol import Inputs, StepContext
from slagen.attention.rettention import reference, windowed
from slagen.attention.rettention.config import RettentionConfig


class Rettention(PairCounter):
    """Re-ttention in one layer. It has no parameters; outside a denoising loop it is dense attention.

    What it remembers in `Inputs.memory`: "residual", (B, H, L, D) in q's dtype, and "ratio", (B, H, L, 1) float32.

    Args:
        backend: "reference" or "torch", which is "auto". device: where it will run; None is the CPU.
    """

    def __init__(
        self, config: RettentionConfig, backend: str = "auto", device: torch.device | str | None = None
    ) -> None:
        super().__init__(device)
        self.config, self.backend = config, backend
        self.in_loop, self.refreshing = False, True

    def begin_pass(self, context: StepContext) -> None:
        """Decide outside compiled code, which then has one variant for dense steps and one for those between."""
        self.in_loop = context.step is not None
        self.refreshing = context.step is None or context.step % self.config.refresh_steps == 0

    def forward(self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs) -> Tensor:
        """Attend: q, k, v (B, H, L, D) -> o (B, H, L, D) in q's dtype.

        Raises: ValueError for a grid of other tokens.
        """
        if not self.in_loop:
            return F.scaled_dot_product_attention(q, k, v)
        grid, memory = check_tokens(inputs.context.grid, q.shape[2]), inputs.memory
        reach, total = self.config.reach(grid), grid.num_tokens**2
        how = reference if self.backend == "reference" else windowed
        at = grid if self.backend == "reference" else grid.num_frames
        self.pairs[1].add_(total)
        with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
            if self.refreshing or "residual" not in memory:
                self.pairs[0].add_(total)
                o, memory["residual"], memory["ratio"] = how.dense_step(q, k, v, at, reach)  # type: ignore[arg-type]
                return o
            self.pairs[0].add_(self.config.pairs(grid))
            ratio = memory["ratio"]
            memory["ratio"] = ratio + self.config.ratio_growth
            o = ratio.clamp(max=1) * how.window_step(q, k, v, at, reach) + memory["residual"]  # type: ignore[arg-type]
            return o.to(q.dtype)
