"""What SLA2 costs in FLOPs. No torch here."""

from __future__ import annotations

from slagen.attention.cost import ModelShape
from slagen.attention.sla.cost import sla_attention_flops
from slagen.attention.sla2.config import SLA2Config


def sla2_attention_flops(config: SLA2Config, shape: ModelShape, num_tokens: int) -> int:
    """FLOPs of SLA2 in one forward pass: SLA's over the complement without its projection, the router, the mix.

    Blocks are kept whole; with degrees, as while the router is trained, it costs more than dense attention.
    """
    query_blocks, key_blocks = config.sla.num_blocks(num_tokens)
    dim = shape.head_dim
    router = 2 * (query_blocks + key_blocks) * dim**2
    mix = 3 * num_tokens * dim + (2 * num_tokens * key_blocks * dim if config.mixing == "mass" else 0)
    others = router + mix - 2 * num_tokens * dim**2  # SLA's proj_l
    return sla_attention_flops(shape, num_tokens, config.sla) + others * shape.num_heads * shape.num_layers
