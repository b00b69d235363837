"""Checkpoints with the gates of FastVideo's VSA: loaded whole and run with --attention vsa, or refused in one line."""

import json

import pytest
import torch
from public_forms import SIZES, projections, spell
from safetensors.torch import save_file
from vsa_forms import FORMS, gates, spell_gates
from wan_models import build_pipeline, build_transformer, run

from slagen.attention import registry
from slagen.attention.vsa.config import VSAConfig
from slagen.cli.main import run as slagen
from slagen.errors import WeightsError
from slagen.formats.kinds import identify
from slagen.formats.peek import peek
from slagen.formats.transformer import read_checkpoint
from slagen.generation.config import GenerateConfig
from slagen.generation.generate import generate
from slagen.generation.resolve import make_plan
from slagen.wan.convert import convert
from slagen.wan.info import info
from slagen.wan.install import install_projections
from slagen.wan.processor import install_method, processors, remove
from slagen.wan.transformer import build_transformer as load

TRAINED = VSAConfig(sparsity=0.8, gate=True)
SIZE = {"width": 96, "height": 96, "num_frames": 9}  # 3 x 6 x 6 tokens, in 4 cubes


@pytest.fixture(scope="module")
def state():
    return {name: x.detach().bfloat16().float() for name, x in build_transformer(**SIZES).state_dict().items()}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The pipeline that the transformers belong to; its own transformer has other weights."""
    folder = tmp_path_factory.mktemp("base") / "wan"
    build_pipeline(**SIZES, seed=9).save_pretrained(folder)
    return folder


def write(path, tensors):
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


def settings(base, weights, **fields):
    return GenerateConfig(
        **{"prompt": "a red circle", "model": str(base), "weights": weights and str(weights), "attention": "vsa",
           "device": "cpu", "dtype": "fp32", "steps": 2, "seed": 1, "guidance_scale": 1.0, "sampler": "euler", **SIZE,
           **fields},
    )  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_loads_whole(form, state, tmp_path):
    pairs = gates()
    path = write(tmp_path / "x.safetensors", FORMS[form](state, pairs))
    found = peek(path)
    assert (found.kind, found.method, found.trained_with, found.sampler) == ("transformer", "vsa", TRAINED, None)
    config = json.loads(build_transformer(**SIZES).to_json_string())
    model = load(read_checkpoint(path), config, torch.float32)
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())
    install_projections(model, path, TRAINED, method=registry.get("vsa"))
    for layer, processor in enumerate(processors(model)):
        assert torch.equal(processor.to_gate_compress.weight, pairs[layer][0])
        assert torch.equal(processor.to_gate_compress.bias, pairs[layer][1])


@pytest.mark.parametrize("form", ["hub", "fastvideo"])
def test_generate_runs_it_and_reports_the_norms_of_its_gates(form, state, base, tmp_path):
    """The video is that of a model with these gates put in by hand."""
    pairs = gates()
    path = write(tmp_path / "fastwan.safetensors", FORMS[form](state, pairs))
    generate(settings(base, path, sparsity=0.5, output=str(tmp_path / "a.mp4")))
    report = json.loads((tmp_path / "a.json").read_text())
    assert report["weights"]["used"] == "vsa attention"
    assert report["weights"]["parameter_norms"] == {
        "to_gate_compress": [pytest.approx(pairs[layer][0].norm().item(), rel=1e-5) for layer in (0, 1)]
    }
    about = report["attention"]
    assert (about["mode"], about["gate"], about["critical"], about["key_blocks"]) == ("vsa", True, 2, 4)
    zero = {layer: (weight * 0, bias * 0) for layer, (weight, bias) in pairs.items()}
    without = write(tmp_path / "zero.safetensors", FORMS[form](state, zero))
    generate(settings(base, without, sparsity=0.5, output=str(tmp_path / "b.mp4")))
    assert report["latents_hash"] != json.loads((tmp_path / "b.json").read_text())["latents_hash"]


def test_it_runs_as_with_gates_put_in_by_hand(state, tmp_path):
    pairs, method = gates(), registry.get("vsa")
    pipe = build_pipeline(**SIZES)
    pipe.transformer.load_state_dict(state)
    install_method(pipe.transformer, method, VSAConfig(0.5, gate=True))
    for layer, processor in enumerate(processors(pipe.transformer)):
        for name, tensor in zip(("weight", "bias"), pairs[layer], strict=True):
            getattr(processor.to_gate_compress, name).data.copy_(tensor)
    expected = run(pipe, size=96)
    remove(pipe.transformer)
    path = write(tmp_path / "x.safetensors", FORMS["fastvideo"](state, pairs))
    install_projections(pipe, path, VSAConfig(0.5, gate=True), method=method)
    assert torch.equal(run(pipe, size=96), expected)
    remove(pipe.transformer)
    install_method(pipe.transformer, method, VSAConfig(0.5))
    assert not torch.equal(run(pipe, size=96), expected)


def test_info_says_what_it_is(state, tmp_path, capsys):
    pairs = gates()
    path = write(tmp_path / "x.safetensors", FORMS["hub"](state, pairs))
    about = info(str(path)).to_dict()
    assert (about["kind"], about["attention"], about["sla"], about["faults"]) == ("transformer", "vsa", False, [])
    assert about["trained_with"] == {"sparsity": 0.8, "gate": True}
    assert about["parameter_norms"]["to_gate_compress"] == [
        pytest.approx(pairs[layer][0].norm().item(), rel=1e-5) for layer in (0, 1)
    ]
    assert slagen(["info", str(path)]) == 0
    assert "to_gate_compress norms by layer" in capsys.readouterr().out


def test_sla_is_refused_and_vsa_named(state, base, tmp_path, capsys):
    path = write(tmp_path / "x.safetensors", FORMS["hub"](state, gates()))
    with pytest.raises(WeightsError, match="--attention vsa") as caught:
        make_plan(settings(base, path, attention="sla"))
    assert "\n" not in str(caught.value)
    asked = ["generate", "a red circle", "--model", str(base), "--weights", str(path), "--attention", "sla"]
    assert slagen([*asked, "--device", "cpu"]) == 5
    assert "--attention vsa" in " ".join(capsys.readouterr().err.split())


def test_dense_runs_it_without_the_gates_and_says_so(state, base, tmp_path):
    path = write(tmp_path / "x.safetensors", FORMS["hub"](state, gates()))
    plan = make_plan(settings(base, path, attention="dense"))
    assert any("dense attention uses the transformer weights in" in note for note in plan.notes)


def faulty(state, pairs):
    whole = FORMS["hub"](state, pairs)
    names = [name for name in whole if "gate" in name]
    yield "missing", {name: x for name, x in whole.items() if name != names[-1]}, "is missing"
    yield "reshaped", {**whole, names[0]: whole[names[0]][:64]}, "shape"
    yield "nan", {**whole, names[0]: whole[names[0]] * float("nan")}, "NaN"
    yield "integer", {**whole, names[1]: whole[names[1]].to(torch.int32)}, "int32"
    yield "twice", {**whole, **spell_gates(pairs, "attn1.")}, "different names"
    yield "unknown", {**whole, "blocks.0.to_gate_compress.extra": torch.ones(1)}, "unexpected"
    yield "sla too", {**whole, **spell(projections(), "attn1.attn_impl")}, "proj_l"


@pytest.mark.parametrize("fault", ["missing", "reshaped", "nan", "integer", "twice", "unknown", "sla too"])
def test_a_fault_in_the_gates_is_refused(fault, state, base, tmp_path):
    content, told = next((x, told) for name, x, told in faulty(state, gates()) if name == fault)
    path = write(tmp_path / "x.safetensors", content)
    with pytest.raises(WeightsError, match=told) as caught:
        generate(settings(base, path, output=str(tmp_path / "a.mp4")))
    assert "\n" not in str(caught.value) and not (tmp_path / "a.mp4").exists()


def test_convert_makes_a_folder_with_the_gates_beside(state, base, tmp_path):
    """Which runs by its own name, and makes the same video."""
    path = write(tmp_path / "x.safetensors", FORMS["fastvideo"](state, gates()))
    folder = convert(str(path), str(tmp_path / "made"), base=str(base), dtype=torch.float32)
    about = info(str(folder)).to_dict()["sla_file"]
    assert about["metadata"]["method"] == "vsa" and about["trained_with"] == {"sparsity": 0.8, "gate": True}
    generate(settings(base, path, output=str(tmp_path / "a.mp4")))
    generate(settings(folder, None, output=str(tmp_path / "b.mp4")))
    first, second = (json.loads((tmp_path / name).read_text())["latents_hash"] for name in ("a.json", "b.json"))
    assert first == second


def test_gates_of_other_models_are_not_taken_for_wan():
    assert identify(["transformer_blocks.0.attn1.to_gate_compress.weight"]) == "unknown"
    assert identify(["blocks.0.to_gate_compress.weight", "blocks.0.to_gate_compress.bias"]) != "transformer"
