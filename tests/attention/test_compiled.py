"""Every method's layers under torch.compile: one whole graph, which all layers and steps share."""

import pytest
from compiling import compile_blocks, denoise
from wan_models import build_pipeline

from slagen.attention import registry
from slagen.wan.processor import install_method, processors

CASES = {
    **{name: (name, {}) for name in registry.names()},
    "sla2-mass": ("sla2", {"mixing": "mass"}),
    "sla2-each-block": ("sla2", {"mixing_blocks": 3, "smooth_keys": False}),
    "sla2-int8": ("sla2", {"low_bit": "int8"}),
    "sla2-cube": ("sla2", {"order": "cube"}),
}


def small(name, fields):
    """The method's config with blocks of 16, where it has a choice, so that a clip of 48 tokens has three."""
    config = registry.get(name).config
    known = {each for each in ("block_m", "block_n") if each in config.__dataclass_fields__}
    return config(**dict.fromkeys(known, 16), **fields)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "fields"), CASES.values(), ids=CASES)
def test_blocks_are_one_graph(name, fields):
    pipe = build_pipeline()
    install_method(pipe.transformer, registry.get(name), small(name, fields))
    graphs = compile_blocks(pipe.transformer)
    denoise(pipe, 2)
    assert len(graphs) == (2 if registry.get(name).memory else 1)  # those that remember begin with nothing


@pytest.mark.slow
def test_training_of_the_router_is_one_graph():
    """Blocks are kept by degrees then, which let gradients through."""
    pipe = build_pipeline()
    install_method(pipe.transformer, registry.get("sla2"), small("sla2", {}))
    for layer in processors(pipe.transformer):
        assert not layer.soft
        layer.soft = True
    graphs = compile_blocks(pipe.transformer)
    denoise(pipe, 2)
    assert len(graphs) == 1
