"""A method is one module and one line: a toy method runs through everything without another change."""

import copy
import dataclasses
import json
import pickle
import re
from dataclasses import dataclass
from typing import Literal, get_args, get_origin

import pytest
import torch
import torch.nn.functional as F
from compiling import compile_blocks, denoise
from fresh import import_anew
from torch import nn
from wan_models import build_pipeline, build_transformer, run, save_pipeline

from slagen.attention import registry
from slagen.attention.protocol import Grid, Layer, Method, Needs, ParameterGroup, StepContext
from slagen.benchmark.config import BenchConfig
from slagen.benchmark.run import bench
from slagen.cli.main import run as slagen
from slagen.errors import UsageError
from slagen.generation import api
from slagen.generation.config import GenerateConfig
from slagen.generation.estimate import plan
from slagen.generation.generate import generate
from slagen.generation.resolve import make_plan
from slagen.settings import option, settings_of
from slagen.wan.processor import denoising, install, install_method, make_processor, processors, remove


@dataclass(frozen=True)
class WindowConfig:
    """Each token attends to those at most `window` frames away."""

    window: int = option(1, "Frames on each side.", prompt_line=True)

    def __post_init__(self):
        if self.window < 0:
            raise UsageError(f"window is {self.window}, but must be 0 or above. Try 1.")


def mask_of(config, grid):
    frames = torch.arange(grid.num_frames).repeat_interleave(grid.height * grid.width)
    return (frames[:, None] - frames).abs() <= config.window


class Window(nn.Module):
    """Notes what it is told at each call."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.seen = []

    def forward(self, q, k, v, inputs):
        context = inputs.context
        count = inputs.memory["calls"] = inputs.memory.get("calls", 0) + 1
        channels = None if inputs.hidden_states is None else tuple(inputs.hidden_states.shape)
        time = None if context.time_embedding is None else tuple(context.time_embedding.shape)
        self.seen.append((context.step, context.num_steps, context.conditional, context.grid, channels, time, count))
        return F.scaled_dot_product_attention(q, k, v, mask_of(self.config, context.grid))


TOY = Method(
    name="window",
    summary="a toy that attends to the frames nearby",
    config=WindowConfig,
    needs=Needs(context=True),
    cost=lambda config, shape, grid: 4 * grid.num_tokens * shape.head_dim * shape.num_heads * shape.num_layers,
    build=lambda config, layer, backend, device: Window(config),
    reference=lambda config, q, k, v, parameters, inputs: F.scaled_dot_product_attention(
        q, k, v, mask_of(config, inputs.context.grid or Grid.flat(q.shape[2]))
    ),
    density=lambda config, grid: 0.5,
)


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setattr(registry, "METHODS", dict(registry.METHODS))
    registry.register(TOY)
    return TOY


def settings(model, tmp_path, **changes):
    return GenerateConfig(
        **{"prompt": "a red circle", "model": str(model), "width": 64, "height": 64, "num_frames": 9, "steps": 2,
           "seed": 1, "guidance_scale": 3.0, "dtype": "fp32", "device": "cpu", "attention": "window",
           "output": str(tmp_path / "toy.mp4"), **changes}
    )  # fmt: skip


def test_generate_and_report(toy, tmp_path):
    model = save_pipeline(tmp_path / "model")
    config = settings(model, tmp_path, attention_options=(("window", 0),))
    made = generate(config).videos[0].report
    assert made["attention"] == {"mode": "window", "tokens": 48, "window": 0, "backend": "auto"}
    assert made["settings"]["attention_options"] == {"window": 0}
    assert made["cost"]["attention_tflop"] * 1e12 == 4 * (4 * 48 * 16 * 2 * 2)
    dense = generate(settings(model, tmp_path, attention="dense", output=str(tmp_path / "dense.mp4"))).videos[0].report
    whole = settings(model, tmp_path, attention_options=(("window", 2),), output=str(tmp_path / "whole.mp4"))
    assert made["latents_hash"] != dense["latents_hash"]
    assert "attention_options" not in dense["settings"]
    assert generate(whole).videos[0].report["attention"]["window"] == 2


def test_what_a_module_is_told(toy):
    """Grid, step, pass, hidden states and time embedding; memory lasts a clip, for each layer and kind of pass."""
    pipe = build_pipeline()
    install_method(pipe.transformer, toy, WindowConfig())
    for _ in range(2):
        denoise(pipe, 2)
    grid, hidden, time = Grid(3, 4, 4), (1, 48, 32), (1, 32)
    clip = [
        (step, 2, conditional, grid, hidden, time, step + 1) for step in (0, 1) for conditional in (True, False)
    ]  # fmt: skip
    assert [processor.seen for processor in processors(pipe.transformer)] == [clip + clip] * 2
    assert pipe.transformer._slagen_installation.context.memory == {}
    remove(pipe.transformer)
    assert not pipe.transformer._forward_pre_hooks and not pipe.transformer.condition_embedder._forward_hooks


def test_outside_a_denoising_loop_nothing_is_kept(toy):
    """Only the first pass ever was conditional there, and memory lasted from clip to clip."""
    model = build_transformer()
    install_method(model, toy, WindowConfig())
    inputs = torch.zeros(1, 4, 3, 8, 8), torch.zeros(1), torch.zeros(1, 8, 32)
    for _ in range(2):
        model(*inputs)
    with denoising(model, 1):
        model(*inputs)
        kept = processors(model)[0].kept
        assert kept == {"calls": 1}
    assert kept == {}  # so that no tensor outlives its clip
    model(*inputs)
    passes = [(step, conditional, count) for step, _, conditional, *_, count in processors(model)[0].seen]
    assert passes == [(None, None, 1), (None, None, 1), (0, True, 1), (None, None, 1)]


@pytest.mark.parametrize("read", [lambda inputs: inputs.memory, lambda inputs: inputs.context.conditional])
def test_a_method_that_forgets_to_need_the_context_is_told(toy, read):
    """Its conditional and unconditional passes shared one memory."""

    class Forgetful(Window):
        def forward(self, q, k, v, inputs):
            read(inputs)
            return q

    model = build_transformer()
    fields = {"name": "forgetful", "needs": Needs(), "build": lambda config, *_: Forgetful(config)}
    install_method(model, Method(**{**vars(TOY), **fields}), WindowConfig())
    with denoising(model, 1), pytest.raises(RuntimeError, match=r"needs=Needs\(context=True\)"):
        model(torch.zeros(1, 4, 3, 8, 8), torch.zeros(1), torch.zeros(1, 8, 32))


def test_every_key_in_the_window_is_dense(toy):
    dense, window = build_pipeline(), build_pipeline()
    install(dense.transformer, None)
    install_method(window.transformer, toy, WindowConfig(2))
    torch.testing.assert_close(run(window), run(dense))


@pytest.mark.slow
def test_bench_and_plan(toy, capsys):
    config = BenchConfig(
        shapes=("1x1x64x16",), methods=("window",), lengths=(), seconds=0.001, device="cpu", sparsities=(0.5,)
    )
    (row,) = bench(config).rows
    assert row.correct and row.kind == "sparse" and row.sparsity is None and row.forward_ms.median > 0
    content = plan(GenerateConfig("a", model="wan2.1-t2v-1.3b", attention="window"))
    assert content.flops.sla_attention == 4 * content.tokens * 128 * 12 * 30
    assert content.flops_of == "window" and content.kept_fraction == 0.5 and content.key_blocks is None
    from slagen.cli.output.plan import show_plan

    show_plan(content, False)
    assert "window: 50.00% of all query-key pairs attended exactly" in " ".join(capsys.readouterr().out.split())


@pytest.mark.slow
def test_bench_of_a_model(toy, tmp_path):
    """Only dense attention and SLA were timed there; now every method named, or in no need of weights."""
    size = {"width": 64, "height": 64, "num_frames": 9, "steps": 1, "device": "cpu"}
    config = BenchConfig(
        model=str(save_pipeline(tmp_path / "model")), attention_options=(("window", 0),), block_m=16, block_n=16, **size
    )
    rows = bench(config).models
    assert [(row.attention, row.backend, row.sparsity) for row in rows] == [
        ("dense", "sdpa", None), ("sla", "torch", 0.95), ("vsa", "torch", 0.95), ("window", "auto", None)
    ]  # fmt: skip
    assert all(row.step_ms.median > 0 and row.attention_ms.median > 0 for row in rows)
    named = dataclasses.replace(config, methods=("window", "linear"))
    assert [method.name for method in named.loop_methods] == ["linear", "window"]
    with pytest.raises(
        UsageError, match="method is 'flex', but the denoising loop can be timed only with sla, .*, window, "
    ):
        dataclasses.replace(config, methods=("flex",))


def test_slagen_methods(toy, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert slagen(["methods"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"window\s+a toy that attends to the frames nearby\s+needs no training\s+options: window 1", out)
    assert " ".join(out.split()).count(
        "options: sparsity as trained, block_m as trained, block_n as trained, order as trained, selector as trained "
        "set in training (slagen finetune): negligible 0.0, linear_domain all, feature_map softmax"
    ) == 3  # fmt: skip
    assert slagen(["generate", "x", "--negligible", "0.1"]) == 2
    assert (
        "--negligible is an option for training only. Use it with slagen finetune --negligible."
        in capsys.readouterr().err
    )
    assert slagen(["methods", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert list(rows) == [*registry.METHODS, *registry.ADDITIONS] and list(registry.METHODS)[-1] == "window"
    assert rows["sla"]["needs_training"] and rows["sla"]["needs_weights"] and rows["sla"]["kind"] == "method"
    assert rows["window"]["options"] == {"window": 1} and not rows["window"]["needs_training"]
    assert rows["window"]["flags"] == {"--window": "Frames on each side."}
    assert list(rows["sla"]["flags"]) == ["--order", "--selector"]
    assert re.search(r"options: window 1\s+--window: Frames on each side\.", out)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"attention": "fast"}, "attention is 'fast', but must be one of sla, .*dense, .*window"),
        (
            {"sparsity": 0.5},
            r"not an option of window attention, but of sla and \d other methods. Leave it out, or give .* sla",
        ),
        (
            {"attention": "sla", "attention_options": (("window", 1),)},
            "window is not an option of sla attention, but of window.*. Leave it out, or give --attention window",
        ),
        ({"attention_options": (("window", -1),)}, "window is -1, but must be 0 or above"),
        ({"backend": "triton"}, "window attention has only one implementation"),
        ({"attention": "dense", "backend": "triton"}, "backend is 'triton', but must be one of auto, sdpa,"),
        ({"attention": "sla", "backend": "sdpa"}, "one of auto, reference, torch, triton for sla attention"),
    ],
)
def test_what_a_method_does_not_take(toy, tmp_path, changes, said):
    with pytest.raises(UsageError, match=said):
        settings("m", tmp_path, **changes)


@dataclass(frozen=True)
class RingsConfig:
    """Of every kind that an option may be; `window` is an option of two methods."""

    window: int = option(1, "Frames on each side.", prompt_line=True)
    form: Literal["box", "cone"] = option("box", "box or cone.", prompt_line=True)
    closed: bool = option(False, "Whether the last frame is next to the first.", prompt_line=True)
    fade: float = option(0.5, "Weight of the farthest frame.")
    sparsity: float = option(0.9, "That of generate.")
    secret: int = 3


READERS = (
    "generation.config", "generation.prompts", "batch.config", "benchmark.config", "cli.options", "cli.generate",
    "cli.batch", "cli.bench", "cli.info", "cli.app", "cli.main", "training.config", "cli.finetune",
)  # fmt: skip


@pytest.fixture
def anew(toy, monkeypatch):
    """The modules that read the registry when they are imported, where two more methods are registered."""
    registry.register(Method(**{**vars(TOY), "name": "rings", "config": RingsConfig}))
    return import_anew(monkeypatch, *READERS)


@pytest.fixture
def command(anew, monkeypatch):
    """(arguments) -> the config that the command made, or the exit code of what it refused."""
    cli, seen = anew("cli.main"), []
    monkeypatch.setattr("slagen.generation.generate.generate", lambda config, on_event: seen.append(config))
    monkeypatch.setattr("slagen.benchmark.run.bench", lambda config, on_event: seen.append(config))
    monkeypatch.setattr("slagen.cli.output.generate.show_videos", lambda *given: None)
    monkeypatch.setattr("slagen.cli.output.bench.show_bench", lambda *given: None)
    return lambda *arguments: cli.run(list(arguments)) or seen.pop()


def test_an_option_of_a_method_is_an_option_of_the_command_line(command, capsys):
    config = command("generate", "x", "--attention", "window", "--window", "2")
    assert config.attention == "window" and config.attention_options == (("window", 2),)
    config = command("generate", "x", "--attention=rings", "--closed", "--form", "cone", "--fade", "1", "--sparsity=.5")
    assert dict(config.attention_options) == {"form": "cone", "closed": True, "fade": 1.0} and config.sparsity == 0.5
    assert command("generate", "x", "--attention", "rings").attention_options == ()
    config = command("bench", "--method", "rings", "--no-closed", "--length-sweep")
    assert config.attention_options == (("closed", False),)
    assert command("bench", "--window", "3").attention_options == (("window", 3),)
    for name in ("generate", "batch", "plan", "bench"):
        with pytest.raises(IndexError):  # no config is made
            command(name, "--help")
        shown = " ".join(capsys.readouterr().out.split())
        assert shown.count("--window <int> Frames on each side. For window and rings attention.") == 1, name
        assert shown.count("--closed / --no-closed") == 1 and "--secret" not in shown, name


def test_a_method_is_in_every_help(command, capsys, monkeypatch):
    """Where it was listed by hand, it was in none."""
    monkeypatch.setenv("COLUMNS", "200")
    for name in ("generate", "batch", "plan", "finetune"):
        with pytest.raises(IndexError):
            command(name, "--help")
        assert re.search(r"--attention <sla\|.*\|window\|rings>", capsys.readouterr().out), name
    with pytest.raises(IndexError):
        command("bench", "--help")
    assert re.search(r"--method .* sla, .*window, rings, sdpa", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["generate", "x", "--window", "2"], "window is not an option of sla attention"),
        (
            ["generate", "x", "--window", "2"],
            "of window and 1 other method. Leave it out, or give --attention window.",
        ),
        (["generate", "x", "--attention", "window", "--closed"], "closed is not an option of window attention"),
        (["generate", "x", "--attention", "window", "--window", "-1"], "window is -1, but must be 0 or above"),
        (["generate", "x", "--attention", "window", "--window", "a"], "--window is 'a', but must be a whole number"),
        (["generate", "x", "--attention", "rings", "--form", "disc"], "--form is 'disc', but must be one of box, cone"),
        (["plan", "--window", "2"], "window is not an option of sla attention"),
        (
            ["bench", "--method", "sla", "--window", "2"],
            "window is an option of window and 1 other method, but of none of the methods measured",
        ),
        (
            ["bench", "--model", "tiny-wan", "--method", "sla", "--window", "2"],
            "but of none of the methods measured",
        ),
        (["bench", "--method", "window", "--window", "-1"], "window is -1, but must be 0 or above"),
    ],
    ids=" ".join,
)
def test_an_option_of_another_method_is_refused(command, capsys, arguments, said):
    assert command(*arguments) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_an_option_of_a_method_runs_from_the_command_line(anew, tmp_path, capsys):
    """The same as from Python: plan and video."""
    cli, model = anew("cli.main"), save_pipeline(tmp_path / "model")
    video = ["--model", str(model), "--size", "64x64", "--num-frames", "9", "--steps", "1"]
    chosen = ["--attention", "window", "--window", "0", "--json"]
    assert cli.run(["plan", *video, *chosen]) == 0
    assert json.loads(capsys.readouterr().out)["settings"]["window"] == 0
    more = ["--seed", "1", "--device", "cpu", "--dtype", "fp32", "--output", str(tmp_path / "toy.mp4")]
    assert cli.run(["generate", "a red circle", *video, *chosen, *more]) == 0
    told = json.loads(capsys.readouterr().out)
    assert cli.run(["plan", *video, *chosen[:-1]]) == 0
    assert "window: 50.00% of all query-key pairs attended exactly" in " ".join(capsys.readouterr().out.split())
    assert cli.run(["generate", "a red circle", *video, *chosen[:-1], *more, "--overwrite", "--verbose"]) == 0
    assert "window attention, 48 tokens" in " ".join(capsys.readouterr().err.split())
    assert told["attention"]["window"] == 0 and told["settings"]["attention_options"] == {"window": 0}


def test_an_option_of_a_method_is_an_argument_in_python(toy):
    def config(**given):
        return api._config({"prompt": "a", "output": None, "attention": "window", **given})

    assert config(window=2).attention_options == (("window", 2),)
    assert config(attention_options=(("window", 2),)).attention_options == (("window", 2),)
    with pytest.raises(UsageError, match="window is 'b', but must be a whole number"):
        config(window="b")
    with pytest.raises(UsageError, match="window is not an option of sla attention"):
        config(window=2, attention="sla")


def test_an_option_of_a_method_in_a_prompt_file(anew, tmp_path):
    prompts, config = anew("generation.prompts"), anew("generation.config")
    file = tmp_path / "p.jsonl"
    file.write_text(
        '{"prompt": "a", "window": 2, "closed": true}\n{"prompt": "b", "form": "cone", "seed": 3}\n{"prompt": "c"}'
    )
    base = config.GenerateConfig("-", attention="rings", attention_options=(("window", 5), ("fade", 0.1)))
    made = [prompts.apply(base, request) for request in prompts.read_prompts(str(file))]
    assert [dict(each.attention_options) for each in made] == [
        {"window": 2, "fade": 0.1, "closed": True}, {"window": 5, "fade": 0.1, "form": "cone"},
        {"window": 5, "fade": 0.1},
    ]  # fmt: skip
    text = tmp_path / "p.txt"
    text.write_text("a --window 2 --closed --form cone\nb --closed no --seed 4")
    first, second = prompts.read_prompts(str(text))
    assert first.fields == {"attention_options": (("window", 2), ("form", "cone"), ("closed", True))}
    assert second.fields == {"attention_options": (("closed", False),), "seed": 4}
    with pytest.raises(UsageError, match="window is not an option of sla attention"):
        prompts.apply(config.GenerateConfig("-"), first)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("a --window -1", "p.txt:1: window is -1, but must be 0 or above"),
        ("a --window x", "p.txt:1:3: --window is 'x', but must be a whole number"),
        ("a --closed perhaps", "p.txt:1:3: --closed is 'perhaps', but must be true or false"),
        ("a --form disc", "p.txt:1:3: --form is 'disc', but must be one of box, cone"),
        ("a --fade 1", "p.txt:1:3: --fade is the same for all prompts"),
        ("a --window 1 --sla-topk 0.1", "p.txt:1: sla_topk is not an option of"),
        ("a --window 1 --bits 4", "p.txt:1: window and bits are options of different attention methods"),
    ],
)
def test_an_option_of_a_method_in_a_prompt_file_is_checked(anew, tmp_path, line, said):
    bits = dataclasses.make_dataclass(
        "Bits", [("bits", int, option(8, "Of each number.", prompt_line=True))], frozen=True
    )
    registry.register(Method(**{**vars(TOY), "name": "few-bits", "config": bits}))
    file = tmp_path / "p.txt"
    file.write_text(line)
    with pytest.raises(UsageError, match=re.escape(said)):
        anew("generation.prompts").read_prompts(str(file))


def test_an_option_at_its_default_is_in_no_key(toy):
    def told(**changes):
        config = GenerateConfig("a", seed=1, model="tiny-wan", device="cpu", attention="window", **changes)
        return make_plan(config).settings

    assert told(attention_options=(("window", 1),)) == told() and "attention_options" not in told()
    assert told(attention_options=(("window", 2),)) == {**told(), "attention_options": {"window": 2}}


def test_the_sparsity_of_another_method_is_in_its_key(toy):
    """It was left out, so that a batch took 0.5 and 0.8 for the same video."""
    registry.register(Method(**{**vars(TOY), "name": "rings", "config": RingsConfig}))

    def told(**changes):
        return make_plan(
            GenerateConfig("a", seed=1, model="tiny-wan", device="cpu", attention="rings", **changes)
        ).recorded

    assert [told(sparsity=sparsity)["sparsity"] for sparsity in (None, 0.5, 0.8)] == [0.9, 0.5, 0.8]
    assert told()["sla_topk"] is None and "block_m" not in told()


@pytest.mark.parametrize("name", registry.names())
def test_options_are_of_kinds_that_the_command_line_reads(name):
    for setting in settings_of(registry.get(name).config):
        literal = get_origin(setting.kind) is Literal and all(isinstance(each, str) for each in get_args(setting.kind))
        assert literal or setting.kind in (int, float, bool, str) or not setting.about.help


def test_a_name_is_taken_once(toy):
    with pytest.raises(ValueError, match="'window' is already registered"):
        registry.register(TOY)


def test_a_shared_name_means_the_same(toy):
    """The command line took the first method's kind and help, and files the first one's parameters."""
    deep = dataclasses.make_dataclass("Deep", [("window", float, option(1.0, "Share of the frames."))], frozen=True)
    with pytest.raises(
        ValueError, match="window is already an option of window attention, with another type or help text"
    ):
        registry.register(Method(**{**vars(TOY), "name": "deep", "config": deep}))
    with pytest.raises(ValueError, match="proj_l is a parameter group of both deep and sla attention"):
        registry.register(Method(**{**vars(TOY), "name": "deep", "parameters": (ParameterGroup("proj_l"),)}))
    assert "deep" not in registry.METHODS


def test_steps_compile_nothing_anew(toy):
    """However many steps there are, also where the attention reads the step."""

    class Gated(Window):
        def forward(self, q, k, v, inputs):
            gate = 1 + inputs.context.position[0] * 0.01  # a tensor
            return F.scaled_dot_product_attention(q, k, v) * gate.to(q.dtype)

    pipe = build_pipeline()
    gated = Method(**{**vars(TOY), "name": "gated", "build": lambda config, *_: Gated(config)})
    install_method(pipe.transformer, gated, WindowConfig())
    graphs, counts = compile_blocks(pipe.transformer), []
    for steps in (1, 5):
        denoise(pipe, steps)
        counts.append(len(graphs))
    assert counts[0] == counts[1] > 0


def test_memory_compiles_no_layer_anew(toy):
    """It was kept by the layer's index, so that a model of more than 8 layers hit torch.compile's limit."""

    class Adding(Window):
        def forward(self, q, k, v, inputs):
            inputs.memory["sum"] = inputs.memory.get("sum", 0) + v
            return inputs.memory["sum"]

    model = build_transformer(num_layers=12)
    install_method(model, Method(**{**vars(TOY), "build": lambda config, *_: Adding(config)}), WindowConfig())
    graphs = compile_blocks(model)
    with torch.no_grad(), denoising(model, 3) as end_step:
        for _ in range(3):
            for _ in range(2):
                model(torch.zeros(1, 4, 3, 8, 8), torch.zeros(1), torch.zeros(1, 8, 32))
            end_step()
    assert len(graphs) == 2  # with and without a sum


def test_copies_have_their_own_context(toy):
    pipe = build_pipeline()
    install_method(pipe.transformer, toy, WindowConfig())
    twin = copy.deepcopy(pipe.transformer)
    with denoising(twin, 7):
        contexts = [processors(model)[0].context for model in (pipe.transformer, twin)]
        assert [context.num_steps for context in contexts] == [None, 7]
        assert all(processor.context is contexts[1] for processor in processors(twin))


@pytest.mark.parametrize("name", ["sla", "dense"])
def test_processors_are_pickled(name):
    method = registry.get(name)
    processor = make_processor(method, method.config(), Layer(0, 1, 2, 16), context=StepContext())
    again = pickle.loads(pickle.dumps(processor))
    assert type(again) is type(processor) and again.method is method
    assert list(again.state_dict()) == (["proj_l.weight", "proj_l.bias"] if name == "sla" else [])
