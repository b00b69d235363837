"""Video Sparse Attention as a layer of a transformer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from slagen.attention.block_maps import BlockMap
from slagen.attention.block_sparse import block_sparse_attention
from slagen.attention.cubes import CUBE_TOKENS
from slagen.attention.order import CubesOfPass, cubes_of
from slagen.attention.parts import selected
from slagen.attention.protocol import Attend, Inputs, Layer
from slagen.attention.sla.module import ZeroLinear
from slagen.attention.vsa.blockwise import add_coarse, kept_cubes
from slagen.attention.vsa.config import VSAConfig
from slagen.attention.vsa.functional import video_sparse_attention


class GateLinear(ZeroLinear):
    """The gate of the coarse branch, computed in the dtype of the hidden states whatever its own is."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, channels) -> (B, L, channels)."""
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class VSA(CubesOfPass):
    """Video Sparse Attention in one layer.

    `to_gate_compress` (channels x channels, with bias, float32), named as in FastVideo's checkpoints, starts at zero,
    so that a fresh module is the fine branch alone. Where the config has no gate, there is none, nor its memory.

    Args:
        layer: it stands in. backend: as in `video_sparse_attention`. device: where the gate is made.
    """

    def __init__(
        self, config: VSAConfig, layer: Layer, backend: str = "auto", device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.config, self.backend = config, backend
        channels = layer.num_heads * layer.head_dim
        self.to_gate_compress = None
        if config.gate:
            self.to_gate_compress = GateLinear(channels, channels, dtype=torch.float32, device=device)
        self.follow_cubes(device)

    def kept_blocks(self, q: Tensor, k: Tensor, inputs: Inputs) -> BlockMap:
        """Which cubes are attended exactly, of q, k (B, H, L, D)."""
        cubes = cubes_of(self.cubes_in(inputs, q), q)
        kept = kept_cubes(q, k, self.config, cubes)
        return BlockMap(kept.to(torch.int8), cubes.slots // CUBE_TOKENS, cubes.slots // CUBE_TOKENS)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs) -> Tensor:
        """Attend: q, k, v (B, H, L, D) -> o (B, H, L, D) in q's dtype.

        Raises: ValueError where the grid is unknown or not one of L tokens, or a gate lacks the hidden states.
        """
        cubes = self.cubes_in(inputs, q)
        gate = self._gate(inputs, q)
        return video_sparse_attention(q, k, v, self.config, cubes, gate, backend=self.backend)  # type: ignore[arg-type]

    def _gate(self, inputs: Inputs, q: Tensor) -> Tensor | None:
        """The gate (B, H, L, D) of the coarse branch; None without one. Raises ValueError for lack of hidden states."""
        if self.to_gate_compress is None:
            return None
        return self.to_gate_compress(_hidden_states(inputs)).unflatten(2, (q.shape[1], -1)).transpose(1, 2)

    def parts(self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs) -> dict[str, Attend]:
        """What a forward pass consists of, as `Method.parts`."""
        cubes, scale = cubes_of(self.cubes_in(inputs, q), q), q.shape[3] ** -0.5

        def select(q: Tensor, k: Tensor) -> Tensor:
            return kept_cubes(q, k, self.config, cubes)

        def attend(q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> Tensor:
            return block_sparse_attention(q, k, v, kept, scale, cubes)

        parts, gate = selected(select, attend, q, k, v), self._gate(inputs, q)
        if gate is None:
            return parts
        o = parts["fused"](q, k, v)
        coarse = {"coarse": lambda q, k, v: add_coarse(o, q, k, v, cubes, gate, scale)}
        return {**parts, "gate": lambda q, k, v: self._gate(inputs, q), **coarse}


def _hidden_states(inputs: Inputs) -> Tensor:
    if inputs.hidden_states is None:
        raise ValueError(
            "the gate of vsa attention needs the hidden states of all tokens of a layer, but they are missing or split "
            "among processes. Run it inside a model, on one device."
        )
    return inputs.hidden_states
