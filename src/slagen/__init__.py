"""slagen: video from Wan2.1 with sparse-linear attention.

The public names load what they need on first use, so that `import slagen` costs nothing.
"""

from importlib import import_module

TYPE_CHECKING = False  # type checkers take it for true; `typing` would be imported for the word alone
if TYPE_CHECKING:
    from slagen.attention import SparseLinearAttention as SparseLinearAttention
    from slagen.attention import sparse_linear_attention as sparse_linear_attention
    from slagen.attention.call import attend as attend
    from slagen.attention.registry import methods as methods
    from slagen.attention.sla.config import SLAConfig as SLAConfig
    from slagen.batch.config import BatchConfig as BatchConfig
    from slagen.benchmark.config import BenchConfig as BenchConfig
    from slagen.errors import SlagenError as SlagenError
    from slagen.formats.sla import SLAMetadata as SLAMetadata
    from slagen.generation.api import generate as generate
    from slagen.generation.config import GenerateConfig as GenerateConfig
    from slagen.generation.result import GenerateResult as GenerateResult
    from slagen.training.config import DataConfig as DataConfig
    from slagen.training.config import FinetuneConfig as FinetuneConfig
    from slagen.wan.install import apply_sla as apply_sla
    from slagen.wan.install import load_sla as load_sla
    from slagen.wan.install import remove_sla as remove_sla
    from slagen.wan.install import save_sla as save_sla

__version__ = "0.1.0"

_HOMES = {
    "SLAConfig": "slagen.attention.sla.config",
    "generate": "slagen.generation.api",
    "GenerateResult": "slagen.generation.result",
    "GenerateConfig": "slagen.generation.config",
    "BatchConfig": "slagen.batch.config",
    "BenchConfig": "slagen.benchmark.config",
    "DataConfig": "slagen.training.config",
    "FinetuneConfig": "slagen.training.config",
    "SlagenError": "slagen.errors",
    "attend": "slagen.attention.call",
    "methods": "slagen.attention.registry",
    "sparse_linear_attention": "slagen.attention",
    "SparseLinearAttention": "slagen.attention",
    "apply_sla": "slagen.wan.install",
    "load_sla": "slagen.wan.install",
    "save_sla": "slagen.wan.install",
    "remove_sla": "slagen.wan.install",
    "SLAMetadata": "slagen.formats.sla",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str):  # of any type
    if name not in _HOMES:
        raise AttributeError(f"module 'slagen' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
