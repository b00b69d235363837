"""Video Sparse Attention block by block: what `reference.py` defines, in memory that grows with L, and with N^2.

The fine branch is `attention/block_sparse.py` over cubes of 64 rows, of which ragged ones are filled in part. The
coarse branch is plain PyTorch: its sequences are 64 times shorter.
"""

import torch
from torch import Tensor

from slagen.attention.block_sparse import block_sparse_attention
from slagen.attention.cubes import CUBE_TOKENS
from slagen.attention.order import CubeOrder, from_slots
from slagen.attention.sla.block_map import highest
from slagen.attention.vsa.config import VSAConfig
from slagen.attention.vsa.reference import coarse_attention, cube_scores


def blockwise_attention(
    q: Tensor, k: Tensor, v: Tensor, config: VSAConfig, cubes: CubeOrder, gate: Tensor | None, scale: float
) -> Tensor:
    """Attend cube by cube; arguments and result as in `reference_attention`. Differentiable once."""
    o = block_sparse_attention(q, k, v, kept_cubes(q, k, config, cubes), scale, cubes)
    return o if gate is None else add_coarse(o, q, k, v, cubes, gate, scale)


def kept_cubes(q: Tensor, k: Tensor, config: VSAConfig, cubes: CubeOrder) -> Tensor:
    """Mark the cubes that each cube attends to exactly: (B, H, L, D) twice -> (B, H, N, N) bool."""
    return highest(cube_scores(q, k, cubes), config.num_kept(len(cubes.counts)))


def add_coarse(o: Tensor, q: Tensor, k: Tensor, v: Tensor, cubes: CubeOrder, gate: Tensor, scale: float) -> Tensor:
    """The fine branch's o, and the coarse branch times the gate, (B, H, L, D) each."""
    coarse = coarse_attention(q, k, v, cubes, scale)
    coarse = from_slots(coarse[..., None, :].expand(*coarse.shape[:3], CUBE_TOKENS, -1), cubes.slots)
    return torch.addcmul(o.to(coarse.dtype), gate.to(coarse.dtype), coarse).to(q.dtype)
