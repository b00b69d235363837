"""The parts of a forward pass that `slagen bench` times alone: their names, and that the last makes the whole."""

import dataclasses

import pytest
import torch

from slagen.attention import registry
from slagen.attention.delta.method import with_delta
from slagen.attention.protocol import Grid
from slagen.attention.sla.config import SLAConfig
from slagen.benchmark.methods import Setting, begin_pass, build_module

GRID = Grid(3, 6, 10)
GATE = {"gate": True}
CASES = {
    "mean": ("mean", {}, ["block_map", "fused"]),
    "mean-cube": ("mean", {"order": "cube"}, ["order", "block_map", "fused"]),
    "sol": ("sol", {}, ["block_map", "fused"]),
    "sla": ("sla", {}, ["block_map", "state", "projection", "fused"]),
    "sla-cube": ("sla", {"order": "cube"}, ["order", "block_map", "state", "projection", "fused"]),
    "sla2": ("sla2", {}, ["router", "fused", "mix"]),
    "sla2-mass-cube": ("sla2", {"mixing": "mass", "order": "cube"}, ["order", "router", "fused", "mix"]),
    "vsa": ("vsa", {}, ["block_map", "fused"]),
    "vsa-gate": ("vsa", GATE, ["block_map", "fused", "gate", "coarse"]),
    "radial": ("radial", {}, ["fused"]),
    "nabla": ("nabla", {"top_p": 0.5}, ["block_map", "fused"]),
}


def built(method, own):
    """A module with random parameters, q, k and v of a grid, and the inputs of a call."""
    setting = Setting(
        SLAConfig(sparsity=0.6, block_m=32, block_n=32), torch.eye(16), torch.zeros(16), "torch", torch.device("cpu"),
        torch.float32, 2, own, GRID,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, GRID.num_tokens, 16, generator=generator)
    module, inputs = build_module(method, setting, q)
    begin_pass(module, inputs)
    return module, (q, k, v), inputs


@pytest.mark.parametrize(("name", "own", "names"), CASES.values(), ids=CASES)
@torch.inference_mode()
def test_parts_make_the_whole(name, own, names):
    """In raster order the last part, given the first inputs again, is the output, but for SLA's stood-in projection."""
    method = registry.get(name)
    if own == GATE:  # which weights alone bring
        method = dataclasses.replace(method, configure=lambda config, *_: method.in_training(config))
    module, tensors, inputs = built(method, own)
    parts = method.parts(module, *tensors, inputs)
    assert list(parts) == names
    found = [part(*tensors) for part in parts.values()]
    if own.get("order") != "cube" and name != "sla":
        torch.testing.assert_close(found[-1], module(*tensors, inputs))
    if "order" in parts:
        assert torch.equal(found[0], tensors[0])


@pytest.mark.parametrize("name", ["sol", "sparse"])
@torch.inference_mode()
def test_the_correction_is_a_part(name):
    """Beside those of the method that it corrects, if there are any."""
    method = with_delta(registry.get(name), 8)
    module, tensors, inputs = built(method, {})
    parts = method.parts(module, *tensors, inputs)
    assert list(parts) == [*(["block_map", "fused"] if name == "sol" else []), "correction"]
    assert torch.equal(parts["correction"](*tensors)[:, :, ::8], exact_rows(*tensors))


def exact_rows(q, k, v):
    return torch.nn.functional.scaled_dot_product_attention(q[:, :, ::8], k, v)


def test_every_method_that_the_bench_can_time_alone_has_parts():
    """Dense attention is one part; a method that remembers is timed in a denoising loop; SLA's branches are its own."""
    without = {name for name in registry.names() if registry.get(name).parts is None}
    assert without == {"dense", "rettention", "sparse", "linear"}
