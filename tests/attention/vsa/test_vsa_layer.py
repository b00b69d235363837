"""Video Sparse Attention as a method: in a model, in a bench, on the command line."""

import re

import pytest
import torch
from compiling import compile_blocks, denoise
from wan_models import build_pipeline, build_transformer, run, save_pipeline

from slagen.attention import registry
from slagen.attention.call import attend
from slagen.attention.cost import ModelShape, dense_attention_flops
from slagen.attention.protocol import Grid, Inputs, Layer, StepContext
from slagen.attention.vsa.config import VSAConfig
from slagen.attention.vsa.functional import video_sparse_attention
from slagen.attention.vsa.layer import VSA
from slagen.cli.main import run as slagen
from slagen.generation.config import GenerateConfig
from slagen.generation.resolve import make_plan
from slagen.wan.processor import install_method, processors, remove

METHOD = registry.get("vsa")
GRID, LAYER = Grid(3, 5, 6), Layer(0, 1, 2, 8)


def inputs_of(grid=GRID, hidden=True, seed=3):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, grid.num_tokens, 16, generator=generator, dtype=torch.float64)
    return Inputs(LAYER, StepContext(grid=grid), hidden_states=x if hidden else None, kept={})


def draw(grid=GRID):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 2, grid.num_tokens, 8, generator=generator, dtype=torch.float64) for _ in range(3)]


def gated(config=None):
    """A module whose gate is not zero."""
    module = VSA(config or VSAConfig(0.5, gate=True), LAYER).requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return module.double()


def test_the_gate_is_a_linear_layer_on_the_hidden_states():
    """Per token, head and channel, without a bound, and the reference computes it too."""
    module, inputs, (q, k, v) = gated(), inputs_of(), draw()
    state = module.state_dict()
    assert set(state) == {"to_gate_compress.weight", "to_gate_compress.bias"}
    gate = inputs.hidden_states @ state["to_gate_compress.weight"].T + state["to_gate_compress.bias"]
    gate = torch.stack([gate[..., :8], gate[..., 8:]], 1)
    assert gate.abs().max() > 3
    expected = video_sparse_attention(q, k, v, module.config, GRID, gate, backend="reference")
    torch.testing.assert_close(module(q, k, v, inputs), expected, rtol=1e-12, atol=1e-12)
    found = METHOD.reference(module.config, q, k, v, state, inputs)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_cubes_of_another_grid_are_not_taken():
    """Those looked up as a pass began are of another number of tokens: those of the grid of this call are taken."""
    module, expected = gated(), gated()(*draw(), inputs_of())
    module.begin_pass(StepContext(grid=Grid(3, 5, 7)))
    assert torch.equal(module(*draw(), inputs_of()), expected)


def test_a_fresh_gate_is_none():
    """It starts at zero, draws no random number, and learns: its gradient is not zero."""
    torch.manual_seed(5)
    before = torch.get_rng_state()
    module = VSA(VSAConfig(0.5, gate=True), LAYER)
    assert torch.equal(torch.get_rng_state(), before)
    inputs, (q, k, v) = inputs_of(), draw()
    o = module(q, k, v, inputs)
    alone = VSA(VSAConfig(0.5), LAYER)
    assert torch.equal(o, alone(q, k, v, inputs)) and not list(alone.parameters())
    o.square().sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in module.parameters())


def test_the_gate_takes_the_dtype_of_the_hidden_states():
    module, inputs = gated().float(), inputs_of()
    exact = module.double()(*draw(), inputs)
    module.float()
    for dtype, limit in ((torch.float32, 1e-4), (torch.bfloat16, 0.3)):
        told = Inputs(LAYER, inputs.context, inputs.hidden_states.to(dtype), kept={})
        o = module(*(x.to(dtype) for x in draw()), told)
        assert o.dtype == dtype and (o.double() - exact).abs().max() < limit * exact.abs().max()


@pytest.mark.parametrize(
    ("inputs", "told"),
    [
        (inputs_of(hidden=False), "needs the hidden states of all tokens of a layer"),
        (inputs_of(Grid(3, 5, 7)), "3 x 5 x 7 has 105 tokens, but the sequence has 90"),
        (Inputs(LAYER, StepContext(), torch.zeros(1, 90, 16)), "the grid of the 90 tokens is unknown"),
    ],
    ids=["no-hidden-states", "other-grid", "no-grid"],
)
def test_refuses_in_one_line(inputs, told):
    with pytest.raises(ValueError, match=told) as caught:
        gated()(*draw(), inputs)
    assert "\n" not in str(caught.value)


def test_the_grid_may_change_between_passes():
    module = VSA(VSAConfig(0.5), LAYER)
    for grid in (GRID, Grid(5, 6, 3), GRID):  # of the same length, cut otherwise
        inputs = inputs_of(grid)
        module.begin_pass(inputs.context)
        expected = video_sparse_attention(*draw(grid), module.config, grid, backend="reference")
        torch.testing.assert_close(module(*draw(grid), inputs), expected, rtol=1e-12, atol=1e-12)


def test_counts_and_cost():
    """Of Wan's 480p clip of 81 frames: 6 x 8 x 13 cubes, a fifth of them kept, rounded up."""
    grid, config = Grid(21, 30, 52), VSAConfig(0.8)
    about = METHOD.describe(config, grid)
    assert (about["key_blocks"], about["critical"], about["gate"]) == (624, 125, False)
    assert METHOD.density(config, grid) == 125 / 624
    shape = ModelShape(30, 12, 128, 8960, 512)
    cost, dense = METHOD.cost(config, shape, grid), dense_attention_flops(shape, grid.num_tokens)
    assert cost / dense == pytest.approx(125 / 624 + 624**2 / (2 * 32760**2), rel=1e-9)
    gate = METHOD.cost(VSAConfig(0.8, gate=True), shape, grid) - cost
    assert gate == 30 * (2 * 32760 * 1536**2 + 12 * (2 * 624**2 * 128 + 2 * 32760 * 128))
    assert METHOD.applies(config, Grid(5, 4, 4)) and not METHOD.applies(config, Grid(4, 4, 4))
    assert METHOD.applies(VSAConfig(0.8, gate=True), Grid(4, 4, 4))  # the coarse branch adds to dense attention


def test_in_a_model_all_cubes_are_dense_attention():
    pipe = build_pipeline()
    dense = run(pipe, size=96)
    install_method(pipe.transformer, METHOD, VSAConfig(0.0))
    torch.testing.assert_close(run(pipe, size=96), dense, rtol=1e-3, atol=1e-4)
    remove(pipe.transformer)
    install_method(pipe.transformer, METHOD, VSAConfig(0.5))
    assert (run(pipe, size=96) - dense).abs().max() > 1e-2
    remove(pipe.transformer)
    assert torch.equal(run(pipe, size=96), dense)


def test_in_a_model_the_gate_sees_what_q_was_projected_from():
    """Its key is where slagen keeps what is learned, and its values change the output of every layer."""
    transformer = build_transformer()
    install_method(transformer, METHOD, VSAConfig(0.0, gate=True))
    names = [name for name in transformer.state_dict() if "gate" in name]
    assert names == [f"blocks.{i}.attn1.processor.to_gate_compress.{x}" for i in (0, 1) for x in ("weight", "bias")]
    assert all(METHOD.group(name) is not None for name in names)
    latents = torch.randn(1, 4, 3, 12, 10, generator=torch.Generator().manual_seed(0))
    arguments = {"timestep": torch.tensor([500]), "encoder_hidden_states": torch.zeros(1, 8, 32), "return_dict": False}
    seen, outputs = [], []
    for layer in processors(transformer):
        layer.register_forward_pre_hook(lambda module, args: seen.append(args[3].hidden_states))
    handles = [block.attn1.to_q.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
               for block in transformer.blocks]  # fmt: skip
    with torch.no_grad():
        for size in (0.0, 0.5):
            processors(transformer)[1].to_gate_compress.bias.fill_(size)
            outputs.append(transformer(latents, **arguments)[0])
    assert len(seen) == 8 and all(torch.equal(seen[i], seen[i + 1]) for i in range(0, 8, 2))
    assert not torch.equal(*outputs)
    for handle in handles:
        handle.remove()


@pytest.mark.slow
@pytest.mark.parametrize("gate", [True, False])
def test_steps_and_layers_compile_nothing_anew(gate):
    pipe = build_pipeline(num_layers=3)
    install_method(pipe.transformer, METHOD, VSAConfig(0.5, gate=gate))
    graphs, counts = compile_blocks(pipe.transformer), []
    for steps in (1, 3):
        denoise(pipe, steps, size=96)
        counts.append(len(graphs))
    assert counts[0] == counts[1] > 0


def test_a_plan_says_what_it_keeps():
    plan = make_plan(GenerateConfig("a red circle moving right", attention="vsa", sparsity=0.7, device="cpu"))
    assert plan.attention == VSAConfig(0.7) and plan.backend == "torch"
    assert (
        "sparsity 0.7 -> 3 of 8 key cubes per query cube, no coarse branch because the weights have no gate"
        in plan.notes
    )


def test_triton_is_refused_in_one_line(capsys):
    code = slagen(["plan", "a red circle", "--attention", "vsa", "--backend", "triton", "--device", "cpu"])
    told = capsys.readouterr().err
    assert code == 2 and "backend is 'triton', but must be one of auto, reference, torch for vsa" in re.sub(
        r"\s+", " ", told
    )


def test_the_command_line_shows_its_blocks(tmp_path, capsys):
    asked = ["a red circle", "--model", str(save_pipeline(tmp_path / "model")), "--size", "96x96", "--num-frames", "9"]
    asked += ["--attention", "vsa", "--sparsity", "0.6", "--device", "cpu"]
    output = ["--steps", "1", "--seed", "1", "--output", str(tmp_path / "a.mp4")]
    assert slagen(["generate", *asked, *output, "--verbose"]) == 0
    told = " ".join(capsys.readouterr().err.split())
    assert "4 key blocks of 64 tokens: 2 critical (50.0%), 0 marginal, 2 negligible; torch backend" in told
    assert slagen(["plan", *asked]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "4 query blocks of 64 tokens, 4 key blocks of 64 tokens" in told and "the last with" not in told


def test_from_python_on_tensors():
    """Without a gate nothing is learned, so that `attend` runs it."""
    expected = video_sparse_attention(*draw(), VSAConfig(0.5), GRID)
    assert torch.equal(attend("vsa", *draw(), grid=GRID, sparsity=0.5), expected)
