"""A method that learns is one module and one line too: a toy gate is tuned, written, described, run and resumed."""

import dataclasses
import json
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from diffusers import WanPipeline
from finetune_runs import settings, steps_of, weights
from safetensors.torch import load_file, save_file
from torch import nn
from wan_models import build_pipeline, run

import slagen
from slagen.attention import registry
from slagen.attention.learned import matrix_norms
from slagen.attention.protocol import Backend, Method, Needs, ParameterGroup
from slagen.cli.main import run as command
from slagen.errors import UsageError, WeightsError
from slagen.formats.layouts import learned
from slagen.formats.sla import read_metadata, read_sla, weights_hash
from slagen.generation.config import GenerateConfig
from slagen.generation.estimate import plan
from slagen.generation.generate import generate
from slagen.generation.replay import replay
from slagen.settings import option
from slagen.training import loop, page
from slagen.training.finetune import finetune
from slagen.wan.convert import convert
from slagen.wan.folder import bundled_folder
from slagen.wan.info import info
from slagen.wan.install import load_weights, save_sla
from slagen.wan.processor import install_method, remove

pytest_plugins = ["finetune_fixtures"]


@dataclass(frozen=True)
class GateConfig:
    """Attention to every `stride`-th token, and a learned part of the mean of all values."""

    stride: int = option(2, "Distance of the tokens attended to.")

    def __post_init__(self):
        if self.stride < 1:
            raise UsageError(f"stride is {self.stride}, but must be at least 1. Try 2.")


class Gate(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.config = config
        self.gate = nn.Linear(layer.head_dim, layer.head_dim)
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)
        self.share = nn.Parameter(torch.zeros(1, layer.num_heads, 1, 1))

    def forward(self, q, k, v, inputs):
        step = self.config.stride
        kept = F.scaled_dot_product_attention(q, k[:, :, ::step], v[:, :, ::step])
        mean = v.mean(2, keepdim=True).expand_as(v)
        return kept + self.gate(mean.float()).to(q.dtype) + (self.share * mean.float()).to(q.dtype)


GATE = Method(
    name="gate",
    summary="a toy that attends to some tokens and learns what to add of the rest",
    config=GateConfig,
    needs=Needs(training=True, weights=True, all_heads=True),
    cost=lambda config, shape, grid: shape.num_layers * grid.num_tokens,
    build=lambda config, layer, backend, device: Gate(config, layer).to(device or "cpu"),
    reference=lambda config, q, k, v, parameters, inputs: F.scaled_dot_product_attention(q, k, v),
    parameters=(ParameterGroup("gate", identity=True), ParameterGroup("share")),
)
# The same without anything to learn: every other token is left out, of any weights.
PLAIN = dataclasses.replace(
    GATE, name="stride", config=dataclasses.make_dataclass("Stride", [("pace", int, 2)], frozen=True), parameters=(),
    needs=Needs(), build=lambda config, *_: Plain(config),
)  # fmt: skip


class Plain(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config

    def forward(self, q, k, v, inputs):
        return F.scaled_dot_product_attention(q, k[:, :, :: self.config.pace], v[:, :, :: self.config.pace])


@pytest.fixture(scope="module", autouse=True)
def methods(plain_pictures_in_module):
    """Both are registered."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "METHODS", dict(registry.METHODS))
        registry.register(GATE)
        registry.register(PLAIN)
        yield


def tune(model, output, data, **fields):
    fields = {"attention": "gate", "sparsity": None, "block_m": None, "block_n": None, "steps": 4, **fields}
    return finetune(settings(model, output, data=data, **fields))


def video(model, folder, **fields):
    return GenerateConfig(
        "a red circle", model=str(model), width=64, height=64, num_frames=9, steps=1, seed=1, device="cpu",
        **{"attention": "gate", "output": str(folder / "a.mp4"), "overwrite": True, **fields},
    )  # fmt: skip


@pytest.fixture(scope="module")
def tuned(toy, tmp_path_factory):
    """The model, and the folder that a tuning of the gate left."""
    model, data = toy
    folder = tmp_path_factory.mktemp("gate")
    result = tune(model, folder / "out", data, attention_options=(("stride", 3),), validate_every=2)
    assert result.steps == 4 and len(steps_of(folder / "out")[-1].proj_norms) == 2
    assert (folder / "out" / "clips" / "step-000002-0.mp4").exists()
    return model, data, folder / "out"


def test_the_file_says_whose_it_is(tuned, capsys):
    model, _, folder = tuned
    metadata, tensors = read_sla(folder)
    assert (metadata.method, metadata.config, metadata.trained, metadata.steps) == ("gate", GateConfig(3), "all", 4)
    own = {name.split("processor.")[1] for name in tensors if ".processor." in name}
    assert own == {"gate.weight", "gate.bias", "share"} and tensors["blocks.1.attn1.processor.share"].any()
    assert tensors["blocks.0.attn1.processor.gate.weight"].dtype == torch.float32
    assert torch.linalg.matrix_norm(tensors["blocks.0.attn1.processor.gate.weight"] - torch.eye(16)) < 0.5  # identity
    about = info(str(folder)).to_dict()
    assert about["metadata"]["method"] == "gate" and about["trained_with"] == {"stride": 3} and about["trained"]
    assert about["layers"] == 2 and [len(norms) for norms in about["parameter_norms"].values()] == [2, 2]
    assert "proj_l_norms" not in about
    assert command(["info", str(folder)]) == 0
    assert "gate norms by layer" in capsys.readouterr().out
    result = json.loads((folder / "result.json").read_text())
    assert result["settings"]["stride"] == 3 and result["settings"]["attention"] == "gate"
    assert "gate, stride 3" in (folder / page.PAGE).read_text()


def test_generate_plan_and_replay_run_it(tuned, tmp_path):
    model, _, folder = tuned
    config = video(model, tmp_path, weights=str(folder))
    made = generate(config).videos[0].report
    assert made["attention"]["mode"] == "gate" and made["attention"]["stride"] == 3
    assert made["weights"]["used"] == "gate attention" and made["weights"]["trained_steps"] == 4
    other = generate(dataclasses.replace(config, attention_options=(("stride", 1),)))
    assert other.videos[0].report["latents_hash"] != made["latents_hash"]
    untrained = generate(video(model, tmp_path, allow_untrained=True, attention_options=(("stride", 3),)))
    assert untrained.videos[0].report["latents_hash"] != made["latents_hash"]
    assert untrained.videos[0].report["weights"]["used"] == "base with untrained gate attention"
    content = plan(dataclasses.replace(config, attention_options=(("stride", 1),), output="outputs"))
    assert "the weights were trained with stride 3, but this run uses 1" in content.notes
    generate(config)
    assert replay(str(tmp_path / "a.mp4"), model=str(model), weights=str(folder / "sla.safetensors")).same


def test_weights_of_another_method_are_refused(tuned, tmp_path):
    """In one line that says whose they are and what to type."""
    model, _, folder = tuned
    for attention in ("sla", "dense", "stride"):
        with pytest.raises(UsageError) as refused:
            generate(video(model, tmp_path, attention=attention, weights=str(folder)))
        assert str(refused.value) == (
            f"{attention} attention does not use gate attention weights. Leave --weights out, or give --attention gate."
        )
    with pytest.raises(UsageError, match="gate attention does not use SLA weights. .* or give --attention sla"):
        generate(video("tiny-wan", tmp_path, weights=str(bundled_folder() / "sla.safetensors")))
    with pytest.raises(
        WeightsError, match="holds SLA weights, .* not work with gate attention. Give --attention sla, or other"
    ):
        generate(video("tiny-wan", tmp_path))
    with pytest.raises(WeightsError, match="has no gate weights, .* finetune --attention gate --from-den"):
        generate(video(model, tmp_path))
    pipe = build_pipeline()
    with pytest.raises(WeightsError, match="holds gate attention weights, which do not work with SLA"):
        slagen.load_sla(pipe, folder)
    with pytest.raises(WeightsError, match="holds gate attention weights, .* Give --attention gate"):
        plan(video("tiny-wan", tmp_path, attention="sla", weights=str(folder), output="outputs"))


def test_it_resumes_and_goes_on(tuned, tmp_path, monkeypatch):
    """A run that stops after 2 of 4 steps ends with the same weights; and one can begin with another's result."""
    model, data, folder = tuned
    before = weights(folder)
    real = loop._log_step

    def stop_after_two(run, step, *others):
        real(run, step, *others)
        if step == 2:
            run.stop.set()

    monkeypatch.setattr(loop, "_log_step", stop_after_two)
    options = {"attention_options": (("stride", 3),), "save_every": 2}
    with pytest.raises(KeyboardInterrupt):
        tune(model, tmp_path / "out", data, **options)
    monkeypatch.setattr(loop, "_log_step", real)
    with pytest.raises(UsageError, match="stride was 3 and is now 4"):
        tune(model, tmp_path / "out", data, attention_options=(("stride", 4),))
    tune(model, tmp_path / "out", data, **options)
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(tmp_path / "out").items())
    more = {"weights": str(folder), "from_dense": False, "steps": 1, "train": "proj"}
    tune(model, tmp_path / "more", data, **more)
    metadata = read_metadata(tmp_path / "more")
    assert metadata.steps == 5 and metadata.config == GateConfig(3) and metadata.trained == "proj"
    with pytest.raises(UsageError, match="does not use gate attention weights"):
        tune(model, tmp_path / "more", data, **{**more, "attention": "sla"})


def test_a_method_that_learns_nothing_is_tuned_with_all_of_the_model(toy, tmp_path):
    model, data = toy
    tune(model, tmp_path / "out", data, attention="stride", from_dense=False, steps=2)
    metadata, tensors = read_sla(tmp_path / "out")
    assert metadata.method == "stride" and not any(".processor." in name for name in tensors) and len(tensors) > 40
    base = generate(video(model, tmp_path, attention="stride")).videos[0].report
    made = generate(video(model, tmp_path, attention="stride", weights=str(tmp_path / "out"))).videos[0].report
    assert base["latents_hash"] != made["latents_hash"] and base["weights"]["used"].startswith("base")
    assert info(str(tmp_path / "out")).trained


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"attention": "forward"}, "forward attention has no backward pass, so it cannot be fine-tuned"),
        ({"attention": "forward", "backend": "fast"}, "forward attention has no .* pass on the fast backend. Try"),
        ({"attention": "gate", "sparsity": 0.5}, "sparsity is not an option of gate attention. Leave --sparsity out"),
        ({"attention": "gate", "anneal_from": 0.5}, "anneal_from is not an option of gate attention"),
        ({"attention": "sla", "attention_options": (("stride", 2),)}, "stride is not an option of sla attention"),
        ({"attention": "gate", "attention_options": (("stride", 0),)}, "stride is 0, but must be at least 1"),
        ({"attention": "gate", "backend": "triton"}, "gate attention has only one implementation"),
        ({"attention": "stride", "train": "proj"}, "leaves nothing to train"),
    ],
)
def test_what_cannot_be_tuned(fields, said, monkeypatch):
    backends = (Backend("auto", backward=False), Backend("fast", backward=False))
    if "backend" in fields:
        backends = (Backend("slow"), *backends)
    monkeypatch.setattr(registry, "METHODS", dict(registry.METHODS))
    config = dataclasses.make_dataclass("Forward", [], frozen=True)
    registry.register(dataclasses.replace(PLAIN, name="forward", config=config, backends=backends))
    with pytest.raises(UsageError, match=said):
        settings("m", "o", data="d", **{"sparsity": None, "block_m": None, "block_n": None, **fields})


def test_files_that_do_not_hold(tuned, tmp_path):
    _, _, folder = tuned
    tensors, told = load_file(folder / "sla.safetensors"), read_metadata(folder)
    fields = json.loads(told.to_strings()["slagen"])
    for change, said in (
        (
            {"method": "unheard"},
            r"for unheard attention, which this version of slagen does not have\. Upgrade slagen\.$",
        ),
        ({"method": "z" * 5000}, r"for z{40,90}\.\.\.z{10,50} attention"),
        ({"method": "dense", "config": {}}, r"dense attention has no weights of its own\)"),
        ({"config": {"stride": "a"}}, '"stride" is text, but must be a whole number'),
        ({"config": {"stride": 0}}, "stride is 0"),
        ({"config": {"width": 1}}, "gate attention has no setting width; its settings are stride"),
    ):
        file = tmp_path / "sla.safetensors"
        save_file(tensors, file, metadata={"slagen": json.dumps({**fields, **change})})
        with pytest.raises(WeightsError, match=said):
            read_metadata(file)


def test_a_model_saved_by_diffusers_keeps_them(tuned, tmp_path):
    """What a pipeline learned is saved with it, runs from there, and goes into the folder that `convert` writes."""
    model, _, folder = tuned
    pipe = WanPipeline.from_pretrained(model)
    metadata = load_weights(pipe, folder, GATE)
    expected = run(pipe)
    pipe.save_pretrained(tmp_path / "saved")
    about = info(str(tmp_path / "saved")).to_dict()["transformer"]
    assert about["trained_with"] == {"stride": 3} and len(about["parameter_norms"]["gate"]) == 2 and not about["sla"]
    fresh = WanPipeline.from_pretrained(model)
    load_weights(fresh, folder, GATE)
    torch.testing.assert_close(run(fresh), expected)
    assert save_sla(fresh, tmp_path / "again") and read_sla(tmp_path / "again")[0] == metadata
    remove(fresh.transformer)
    assert weights_hash(fresh.transformer) == metadata.base_hash
    made = generate(video(tmp_path / "saved", tmp_path)).videos[0].report
    assert made["weights"]["used"] == "gate attention" and made["attention"]["stride"] == 3
    with pytest.raises(WeightsError, match="holds gate attention weights, which do not work with SLA"):
        generate(video(tmp_path / "saved", tmp_path, attention="sla"))
    dense = generate(video(tmp_path / "saved", tmp_path, attention="dense")).videos[0].report
    assert dense["weights"]["used"] == "base"
    convert(str(tmp_path / "saved"), str(tmp_path / "whole"), base=str(model))
    assert read_metadata(tmp_path / "whole").method == "gate"
    assert generate(video(tmp_path / "whole", tmp_path)).videos[0].report["weights"]["used"] == "gate attention"


def test_norms_of_large_numbers_and_of_names_without_a_layer():
    """They are finite, as JSON must be, where float32's sum of squares is not."""
    large = torch.full((64, 64), 3e38)
    odd = {"x.processor.gate.weight": large, f"blocks.{'9' * 5000}.attn1.processor.gate.weight": large}
    found = matrix_norms({"blocks.0.attn1.processor.gate.weight": large, **odd})
    assert found == {"gate": [pytest.approx(64 * 3e38)]}
    two = {f"blocks.0.attn1.processor.gate.{name}": torch.tensor(x) for name, x in (("a", 3.0), ("b", 4.0))}
    assert matrix_norms(two) == {"gate": [5.0]}
    assert learned(next(reversed(odd))) is None


def test_saving_needs_the_base_where_it_was_trained(tmp_path):
    """The trained tensors were taken for the base, and nobody could load the file."""
    pipe = build_pipeline()
    install_method(pipe.transformer, registry.get("sla"), slagen.SLAConfig(0.5))
    with torch.no_grad():
        for block in pipe.transformer.blocks:
            block.attn1.processor.proj_l.weight.add_(1)
    assert slagen.load_sla(build_pipeline(), save_sla(pipe, tmp_path / "a")).trained == "proj_l"
    base = {name: x.clone() for name, x in pipe.transformer.state_dict().items() if ".processor." not in name}
    with torch.no_grad():
        pipe.transformer.proj_out.weight.add_(1)
    with pytest.raises(UsageError, match="1 tensor of the model changed .* such as proj_out.weight, .* as base"):
        save_sla(pipe, tmp_path / "b")
    assert slagen.load_sla(build_pipeline(), save_sla(pipe, tmp_path / "b", base=base)).trained == "all"
