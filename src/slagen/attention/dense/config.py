"""What dense attention can be set to: nothing but its backend. No torch here."""

from dataclasses import dataclass

from slagen.attention.protocol import Backend


@dataclass(frozen=True)
class DenseConfig:
    """Dense attention has nothing to set."""


BACKENDS = (
    Backend("auto"),
    Backend("sdpa"),
    Backend("sdpa-flash"),
    Backend("sdpa-cudnn"),
    Backend("sdpa-efficient"),
    Backend("sdpa-math"),
    Backend("flash-attn", package="flash_attn"),
    Backend("sage", package="sageattention", backward=False, error_limit=0.1),  # INT8
    Backend("flashinfer", package="flashinfer", backward=False),
)
