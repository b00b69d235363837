"""The arrangement of a clip's tokens: everyone who knows it hands it to the method."""

import dataclasses
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from compiling import compile_blocks, denoise
from wan_models import build_pipeline, save_pipeline

from slagen.attention import registry
from slagen.attention.protocol import Grid, Layer, Needs
from slagen.batch.forecast import denoising_flops
from slagen.benchmark import loop
from slagen.benchmark.config import BenchConfig
from slagen.generation.config import GenerateConfig
from slagen.generation.estimate import plan
from slagen.generation.generate import generate
from slagen.generation.resolve import make_plan
from slagen.training.setup import Setup
from slagen.wan.folder import token_grid
from slagen.wan.processor import install_method, make_processor, processors

ASKED = ("cost", "configure", "describe", "applies", "density", "note")  # of a method, with the grid at last


@pytest.fixture
def seen(monkeypatch):
    """The grids that each of SLA's callables is given."""
    grids = defaultdict(set)

    def noting(name, call):
        def noted(*arguments):
            grids[name].add(arguments[-1])
            return call(*arguments)

        return noted

    sla = registry.get("sla")
    calls = {name: noting(name, getattr(sla, name)) for name in ASKED}
    monkeypatch.setitem(registry.METHODS, "sla", dataclasses.replace(sla, needs=Needs(context=True), **calls))
    return grids


def settings(model, tmp_path):
    return GenerateConfig(
        "a red circle", model=str(model), width=64, height=96, num_frames=9, steps=1, seed=1, guidance_scale=1.0,
        dtype="fp32", device="cpu", block_m=16, block_n=16, allow_untrained=True, attention="sla",
        output=str(tmp_path / "a.mp4"),
    )  # fmt: skip


def test_a_grid_is_a_key():
    assert Grid.flat(48) == Grid(1, 1, 48) != Grid(3, 4, 4) and len({Grid(3, 4, 4), Grid(3, 4, 4)}) == 1
    assert Grid.flat(48).num_tokens == Grid(3, 4, 4).num_tokens == 48
    with pytest.raises(dataclasses.FrozenInstanceError):
        Grid.flat(1).width = 2


def test_the_grid_of_a_size():
    assert token_grid(832, 480, 81) == Grid(21, 30, 52)
    assert token_grid(64, 96, 9, patch_size=(1, 1, 2), spatial_factor=16, temporal_factor=8) == Grid(2, 6, 2)


def test_all_are_given_the_grid_of_the_clip(seen, tmp_path):
    model, grid = save_pipeline(tmp_path / "model"), Grid(3, 6, 4)
    config = settings(model, tmp_path)
    plan(config)
    assert seen == {name: {grid} for name in ("applies", "cost", "configure", "describe", "density", "note")}
    seen.clear()
    generate(config)
    assert seen == {name: {grid} for name in ASKED if name != "density"}
    seen.clear()
    denoising_flops(SimpleNamespace(plan=make_plan(config)))
    assert seen == {name: {grid} for name in ("cost", "configure", "applies", "note")}
    patches = SimpleNamespace(weights=SimpleNamespace(source=SimpleNamespace(patch_size=(1, 2, 2))))
    assert Setup.grid(patches, SimpleNamespace(shape=(4, 3, 12, 8))) == grid


@pytest.mark.slow
def test_a_bench_of_a_model_gives_its_grid(seen, tmp_path, monkeypatch):
    config = BenchConfig(
        model=str(save_pipeline(tmp_path / "model")), methods=("sla",), width=64, height=96, num_frames=9, steps=1,
        block_m=16, block_n=16,
    )  # fmt: skip
    loop.bench_model(config, torch.device("cpu"), torch.float32, lambda text: None)
    assert seen == {name: {Grid(3, 6, 4)} for name in ("configure", "applies")}


@pytest.mark.parametrize("name", registry.names())
def test_only_who_needs_the_context_looks_at_more_than_the_number_of_tokens(name):
    """Without hooks on the model a processor knows no more."""
    method = registry.get(name)
    module = method.build(method.config(), Layer(0, 1, 2, 16), "auto", None)
    block_sizes = getattr(module, "block_sizes", lambda grid: None)
    for grid in (Grid(3, 4, 4), Grid(2, 5, 8), Grid(8, 16, 16)):
        flat = Grid.flat(grid.num_tokens)
        if not method.needs.context:
            assert method.applies(module.config, grid) == method.applies(module.config, flat)
            assert block_sizes(grid) == block_sizes(flat)


def test_a_grid_that_is_needed_is_not_guessed(seen):
    processor = make_processor(registry.get("sla"), registry.get("sla").config(), Layer(0, 1, 2, 16))
    with pytest.raises(RuntimeError, match="no forward pass has begun"):
        processor._operator(*torch.zeros(3, 1, 2, 48, 16), None)


def test_steps_compile_nothing_anew_that_looks_at_the_grid():
    """Each forward pass has a grid of its own, equal to the one before."""
    method = dataclasses.replace(
        registry.get("sla"), needs=Needs(context=True), applies=lambda config, grid: grid.height * grid.width > 1
    )
    pipe = build_pipeline()
    install_method(pipe.transformer, method, method.config(block_m=16, block_n=16))
    graphs, counts = compile_blocks(pipe.transformer, fullgraph=False), []
    for steps in (1, 4):
        denoise(pipe, steps)
        counts.append(len(graphs))
    assert counts[0] == counts[1] > 0 and len(processors(pipe.transformer)) == 2
