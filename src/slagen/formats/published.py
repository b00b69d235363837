"""Facts about published weights that their files do not hold. No torch."""

from typing import Literal

from slagen.attention.sla.config import SLAConfig
from slagen.attention.vsa.config import VSAConfig

# TurboDiffusion's training.
TURBO_SLA = SLAConfig(sparsity=0.9, linear_domain="all", feature_map="softmax", block_m=64, block_n=64)
FASTWAN_VSA = VSAConfig(sparsity=0.8, gate=True)  # FastVideo's training of FastWan2.1
_MODEL_OF_WIDTH = {1536: "wan2.1-t2v-1.3b", 5120: "wan2.1-t2v-14b"}


def preset_of_width(width: int) -> str | None:
    """The preset of Wan2.1's own transformer whose layers have a width."""
    return _MODEL_OF_WIDTH.get(width)


Sampler = Literal["unipc", "euler", "dpm++", "rcm"]
