"""What a method is told in a bench: the grid of a model's shape, and, where it needs them, hidden states and time."""

import dataclasses
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from slagen.attention import registry
from slagen.attention.protocol import Grid, Method, Needs
from slagen.benchmark.config import SHAPES, BenchConfig, grid_of, parse_shape
from slagen.benchmark.operator import SHORT_GRID
from slagen.benchmark.run import bench


@dataclass(frozen=True)
class GatedConfig:
    """Nothing to choose."""


class Gated(nn.Module):
    """Scales what it attends by its inputs, and notes them."""

    config = GatedConfig()

    def __init__(self, seen):
        super().__init__()
        self.seen, self.passes = seen, []

    def begin_pass(self, context):
        self.passes.append(context.grid)

    def forward(self, q, k, v, inputs):
        context, hidden = inputs.context, inputs.hidden_states
        sizes = [None if x is None else (*x.shape, x.dtype) for x in (hidden, context.time_embedding)]
        self.seen.append((context.grid, *sizes, self.passes[-1:], q.dtype))
        return attend(q, k, v, inputs)


def attend(q, k, v, inputs):
    o = F.scaled_dot_product_attention(q, k, v)
    hidden, time = inputs.hidden_states, inputs.context.time_embedding
    o = o if hidden is None else o * hidden.unflatten(2, (q.shape[1], -1)).transpose(1, 2)
    return o if time is None else o * time.unflatten(1, (q.shape[1], 1, -1))


def parts(module, q, k, v, inputs):
    return {"all": lambda q, k, v: module(q, k, v, inputs)}


@pytest.fixture
def measured(monkeypatch):
    """(needs) -> the bench's rows, and what the module saw."""
    monkeypatch.setattr(registry, "METHODS", dict(registry.METHODS))

    def run(needs):
        seen = []
        registry.METHODS["gated"] = Method(
            name="gated", summary="scaled by its inputs", config=GatedConfig, needs=needs, parts=parts,
            cost=lambda config, shape, grid: 0, build=lambda config, layer, backend, device: Gated(seen),
            reference=lambda config, q, k, v, parameters, inputs: attend(q, k, v, inputs),
        )  # fmt: skip
        config = BenchConfig(
            shapes=("tiny-wan",), methods=("gated",), lengths=(64,), seconds=0.001, device="cpu", backward=True,
            sparsities=(0.9,),
        )  # fmt: skip
        return bench(config).rows, seen

    return run


def test_what_is_needed_is_there(measured):
    """The same in the reference, in float64, or the error would show."""
    rows, seen = measured(Needs(context=True, hidden_states=True))
    assert [row.shape for row in rows] == ["1x4x320x64", "1x4x64x64"]
    assert all(row.correct and row.error < 1e-5 and row.backward_ms and row.parts_ms["all"] > 0 for row in rows)
    assert set(map(repr, seen)) == {
        repr((grid, (1, grid.num_tokens, channels, torch.float32), (1, channels, torch.float32), [grid], torch.float32))
        for grid, channels in ((Grid(5, 8, 8), 256), (Grid(4, 4, 4), 256), (SHORT_GRID, 128))
    }


def test_what_is_not_needed_is_not(measured):
    rows, seen = measured(Needs())
    assert all(row.correct for row in rows)
    assert set(map(repr, seen)) == {repr((None, None, None, [], torch.float32))}


def test_the_grids_of_shapes():
    assert {name: parse_shape(name)[2] for name in SHAPES} == {
        "wan-1.3b-480p": 32760, "wan-1.3b-720p": 75600, "wan-14b-480p": 32760, "wan-14b-720p": 75600, "tiny-wan": 320
    }  # fmt: skip
    assert grid_of("wan-14b-720p", 75600) == Grid(21, 45, 80)
    assert grid_of("wan-14b-720p", 1024) == Grid(4, 16, 16) and grid_of("1x2x333x16", 333) == Grid(3, 3, 37)


def test_a_call_is_arranged_as_it_is_told(monkeypatch):
    """`configure` is given the grid too."""
    seen = []
    sla = registry.get("sla")

    def configure(config, options, grid):
        seen.append(grid)
        return sla.configure(config, options, grid)

    monkeypatch.setitem(registry.METHODS, "sla", dataclasses.replace(sla, configure=configure))
    bench(BenchConfig(("tiny-wan",), methods=("sla",), lengths=(), seconds=0.001, device="cpu", sparsities=(0.9,)))
    assert set(seen) == {Grid(5, 8, 8), SHORT_GRID}
