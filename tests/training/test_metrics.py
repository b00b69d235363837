"""Errors to the dense teacher."""

import pytest
import torch

from slagen.attention.sla.config import SLAConfig
from slagen.training.metrics import layer_errors
from slagen.wan.install import remove_sla
from slagen.wan.processor import install

pytestmark = pytest.mark.slow


def test_a_layers_error_is_its_own():
    """With every block kept and a zero projection there is none; with few blocks there is."""
    from wan_models import build_transformer

    from slagen.training.metrics import Example
    from slagen.wan.install import apply_sla

    teacher, student = build_transformer(), build_transformer()
    install(teacher, None)
    apply_sla(student, SLAConfig(sparsity=0.0, block_m=16, block_n=16))
    examples = [Example(torch.randn(4, 3, 8, 8), torch.randn(8, 32))]
    assert max(layer_errors(student, teacher, examples, [0.5])) < 1e-5
    remove_sla(student)
    apply_sla(student, SLAConfig(sparsity=0.9, block_m=16, block_n=16))
    assert min(layer_errors(student, teacher, examples, [0.5])) > 1e-3
