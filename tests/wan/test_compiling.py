"""--compile: blocks as one graph with SLA inside, compiled anew for a new shape alone, and what is told of it."""

import dataclasses

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed

from slagen.cli.main import run
from slagen.errors import EnvironmentProblem, UsageError
from slagen.generation.config import GenerateConfig
from slagen.generation.generate import generate
from slagen.generation.resolve import make_plan
from slagen.generation.session import Session
from slagen.generation.stage_clock import StageClock
from slagen.wan import compiling

SMALL = {"model": "tiny-wan", "device": "cpu", "width": 64, "height": 64, "num_frames": 5, "steps": 2, "seed": 1}


pytestmark = pytest.mark.slow  # it imports PyTorch's compiler


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that blocks are traced to. They run as they are, without generated code."""
    found = []

    def backend(module, example):
        found.append(module)
        return module.forward

    monkeypatch.setattr(compiling, "BACKEND", backend)
    torch._dynamo.reset()
    return found


def test_the_bundled_model_is_traced_with_sla_inside(graphs):
    """Traced operations are the same ones, so that the latents have the same bits; what it took is told apart."""
    config = GenerateConfig("a red circle moving right", compile=True, num_videos=2, **SMALL)
    made = [video.record for video in generate(config, write=False).videos]
    plain = generate(dataclasses.replace(config, compile=False), write=False).videos
    assert [video.latents_hash for video in made] == [video.record.latents_hash for video in plain]
    assert len(graphs) == 1
    assert "slagen.blockwise_forward.default" in {str(node.target) for node in graphs[0].graph.nodes}
    first, second = made
    assert first.settings["compile"] is True and "compile" not in plain[0].record.settings
    step = first.steps[0].to_dict()
    assert step["compile_ms"] == pytest.approx(first.stages_s["compile"] * 1e3) and step["attention_ms"] is None
    assert step["latency_ms"] < step["compile_ms"] and "compile_ms" not in first.steps[1].to_dict()
    assert (first.timing.level, first.layers, "compile" in second.stages_s) == ("step", [], False)
    assert "compiled" in first.timing.attention_means and "compiled" not in plain[0].record.timing.attention_means
    assert first.stages_s["total"] == pytest.approx(first.wall_s, rel=0.03)


def test_only_a_shape_and_dense_steps_compile_anew(graphs):
    """Not a prompt, a step, a pass, or a sparsity that keeps as many blocks."""
    base = make_plan(GenerateConfig("a red circle moving right", compile=True, guidance_scale=3.0, **SMALL))

    def after(**changes):
        plan = make_plan(dataclasses.replace(base.config, **changes), base.weights)
        session.sample(plan, session.encode(plan), StageClock(), lambda event: None)
        return len(graphs)

    session = Session(base)
    assert [after(), after(prompt="a blue square", seed=2), after(steps=3)] == [1, 1, 1]
    assert after(width=96) == 2
    assert after(dense_steps="0") == 3
    assert [after(), after(width=96, prompt="a red circle")] == [3, 3]


def test_what_is_no_graph_is_refused_with_the_reason(graphs):
    def breaks(x):
        torch._dynamo.graph_break("a reason of its own")
        return x

    told = pytest.raises(UsageError, match=r"^odd attention cannot be compiled: .+\. Leave --compile out\.$")
    with told, compiling.compiling("odd attention", lambda ms: None):
        torch.compile(breaks, backend="eager", fullgraph=True)(torch.ones(1))


@pytest.mark.parametrize(
    ("error", "found", "text"),
    [
        (
            RuntimeError("no compiler\nmore"),
            EnvironmentProblem,
            r"^torch.compile failed: no compiler\. Leave",
        ),
        (torch.OutOfMemoryError("full"), torch.OutOfMemoryError, "full"),
    ],
)
def test_what_a_compiler_says_is_one_line(error, found, text):
    with pytest.raises(found, match=text), compiling.compiling("SLA", lambda ms: None):
        raise BackendCompilerFailed("inductor", error, None)


def test_without_a_compiler_nothing_is_loaded(monkeypatch, capsys):
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler
    from torch.utils import _triton

    def missing():
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", missing)
    monkeypatch.setattr("slagen.generation.session.load_pipeline", None)
    assert run(["generate", "x", "--model", "tiny-wan", "--device", "cpu", "--compile", "--output", "x.mp4"]) == 4
    assert "--compile needs a C++ compiler, and none was found" in " ".join(capsys.readouterr().err.split())
    monkeypatch.setattr(_triton, "has_triton_package", lambda: False)
    with pytest.raises(EnvironmentProblem, match="--compile needs Triton"):
        compiling.check_compiler(torch.device("cuda"))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"offload": "group"}, "whole blocks on the GPU, but --offload group"),
        ({"lora": ("s:1",), "lora_merge": False}, "a LoRA that is not merged anew"),
        ({"timing": "part"}, "^--timing part times attention"),
        ({"measure_dense": 1}, "^--measure-dense times attention"),
    ],
    ids=["offload", "lora", "timing", "measure-dense"],
)
def test_what_compiled_blocks_cannot_do_is_refused(settings, text):
    with pytest.raises(UsageError, match=text):
        GenerateConfig("x", compile=True, **settings)
