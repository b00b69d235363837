"""slagen: fast video from Wan2.1 with sparse-linear attention.

The public names load what they need on first use, so that `import slagen` costs nothing.
"""

from importlib import import_module

__version__ = "0.1.0"

_HOMES = {
    "SLAConfig": "slagen.attention.sla.config",
    "GenerateConfig": "slagen.generation.config",
    "SlagenError": "slagen.errors",
    "sparse_linear_attention": "slagen.attention",
    "SparseLinearAttention": "slagen.attention",
    "apply_sla": "slagen.wan.install",
    "load_sla": "slagen.wan.install",
    "save_sla": "slagen.wan.install",
    "remove_sla": "slagen.wan.install",
    "SLAMetadata": "slagen.formats.sla",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str):  # of any type; `typing` would be imported for the word alone
    if name not in _HOMES:
        raise AttributeError(f"module 'slagen' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
