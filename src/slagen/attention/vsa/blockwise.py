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
    kept = highest(cube_scores(q, k, cubes), config.num_kept(len(cubes.counts)))
    o = block_sparse_attention(q, k, v, kept, scale, cubes)
    if gate is None:
        return o
    coarse = coarse_attention(q, k, v, cubes, scale)
    coarse = from_slots(coarse[..., None, :].expand(*coarse.shape[:3], CUBE_TOKENS, -1), cubes.slots)
    return torch.addcmul(o.to(coarse.dtype), gate.to(coarse.dtype), coarse).to(q.dtype)
