"""Scores of blocks that stand in the place of the pooled ones: of sub-blocks, and random.

    subblock   s_ij = log sum_ab exp(scale q_ia . k_jb)     over the means of four parts of blocks i and j
    random     a hash of the head's seed, i and j, evenly distributed

Parts of a partial block that have no token are left out, and a partial part is its mean by its true count. Scores are
in float32 (float64 for float64 input); a nan ranks with infinity. No gradient passes through them. Random ones are the
same on every device and backend.

Source of "subblock": SGLang, pull request 34148, where each side has four means too.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from slagen.attention.mean.config import MeanConfig
from slagen.attention.protocol import Inputs, Layer
from slagen.attention.selectors import PARTS
from slagen.attention.sla.block_map import block_means
from slagen.attention.sla.config import SLAConfig

HEADS = 2**16  # more than any layer has


def selector_scores(
    config: SLAConfig | MeanConfig, q: Tensor, k: Tensor, seeds: Tensor | None, scale: float
) -> Tensor | None:
    """The scores by which a config's selector ranks key blocks; None for "pooled", which every backend has.

    Args:
        q, k: (B, H, L, D), in the order that blocks are cut from.
        seeds: of "random", as `head_seeds`; None takes those of layer 0.
        scale: factor on q @ k^T before softmax.
    Returns: (B, H, M, N) float32, or float64.
    """
    if config.selector == "pooled":
        return None
    if config.selector == "subblock":
        return subblock_scores(q.detach(), k.detach(), config.block_m, config.block_n, scale)
    batch, num_heads, length, _ = q.shape
    seeds = torch.arange(num_heads, device=q.device) if seeds is None else seeds
    return random_scores(seeds, *config.num_blocks(length)).expand(batch, -1, -1, -1)


def subblock_scores(q: Tensor, k: Tensor, block_m: int, block_n: int, scale: float) -> Tensor:
    """The log-sum-exp at the head of this file, a pair of parts at a time: (B, H, L, D) twice -> (B, H, M, N)."""
    (rows, no_row), (columns, no_column) = _parts(q, block_m), _parts(k, block_n)
    scores = (rows[..., 0, :] * scale) @ columns[..., 0, :].mT  # every block has a first part
    for a in range(PARTS):
        for b in range(PARTS):
            if a or b:
                s = (rows[..., a, :] * scale) @ columns[..., b, :].mT
                s = s.masked_fill(no_row[:, a, None] | no_column[:, b], -torch.inf)
                scores = torch.logaddexp(scores, s)
    return scores.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)


def _parts(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """The means of the parts of each block, (B, H, M, PARTS, D), and which have no token, (M, PARTS) bool."""
    means = block_means(x, block // PARTS)
    count, lacking = means.shape[2], -means.shape[2] % PARTS
    means = F.pad(means, (0, 0, 0, lacking)).unflatten(2, (-1, PARTS))
    places = torch.arange(count + lacking, device=x.device)
    return means, (places >= count).view(-1, PARTS)


def head_seeds(layer: Layer, device: torch.device | str | None) -> Tensor:
    """The seeds of a layer's heads, (H,) int64: no two layers or heads share one."""
    return torch.arange(layer.num_heads, device=device) + layer.index * HEADS


def seeds_of(inputs: Inputs | None, q: Tensor) -> Tensor | None:
    """The seeds of the layer that a module is called in; None where nobody says."""
    return None if inputs is None else head_seeds(inputs.layer, q.device)


def random_scores(seeds: Tensor, num_rows: int, num_columns: int) -> Tensor:
    """Scores that depend on seed, row and column alone: (H,) int64 -> (H, M, N) float32, whole numbers below 2**24."""
    rows = _mixed(_mixed(seeds)[:, None] + torch.arange(num_rows, device=seeds.device))
    return (_mixed(rows[..., None] + torch.arange(num_columns, device=seeds.device)) >> 8).float()


def _mixed(x: Tensor) -> Tensor:
    """A hash of whole numbers below 2**33 into those below 2**32; no product exceeds int64."""
    for _ in range(2):
        x = ((x >> 16) ^ x) * 0x45D9F3B & 0xFFFFFFFF
    return (x >> 16) ^ x
