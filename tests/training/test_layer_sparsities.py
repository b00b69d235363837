"""A sparsity of its own for each layer: trained with, written, used by what runs the weights, and resumed."""

import dataclasses
import json

import pytest
import torch
from finetune_runs import settings, weights
from safetensors.torch import load_file, save_file

from slagen.attention.schedule_file import LayerSchedule
from slagen.errors import UsageError, WeightsError
from slagen.formats.peek import peek
from slagen.formats.sla import SLAMetadata, read_metadata
from slagen.generation.config import GenerateConfig
from slagen.generation.estimate import plan
from slagen.generation.generate import generate
from slagen.training.config import DataConfig, FinetuneConfig
from slagen.training.finetune import finetune
from slagen.training.trainer import Trainer
from slagen.wan.folder import describe_folder
from slagen.wan.info import info
from slagen.wan.install import load_sla
from slagen.wan.processor import processors
from slagen.wan.transformer import load_transformer

pytest_plugins = ["finetune_fixtures"]
LAYERS = (0.0, 0.8)  # the first is dense, as slagen tune may leave it


def video(model, folder, **fields):
    return GenerateConfig(
        "a red circle", model=str(model), width=64, height=64, num_frames=9, steps=2, seed=1, device="cpu",
        **{"output": str(folder / "a.mp4"), "overwrite": True, "save_latents": True, **fields},
    )  # fmt: skip


@pytest.fixture(scope="module")
def tuned(toy, tmp_path_factory, plain_pictures_in_module):
    """The model, the config and the folder of a training with a schedule's file, and the sparsities of each step."""
    model, data = toy
    folder = tmp_path_factory.mktemp("layers")
    (folder / "s.json").write_text(json.dumps(LayerSchedule("sla", 2, (("0-", LAYERS),)).to_dict()))
    config = settings(
        model, folder / "out", data=data, steps=3, sparsity=None, sparsity_schedule=str(folder / "s.json"),
        anneal_from=0.5,
    )  # fmt: skip
    seen, step = [], Trainer.step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Trainer, "step",
            lambda trainer, number: seen.append([p.config.sparsity for p in processors(trainer.student)])
            or step(trainer, number),
        )  # fmt: skip
        finetune(config)
    return model, config, folder / "out", seen


@pytest.mark.slow
def test_each_layer_trains_with_its_own(tuned):
    """What is dense throughout has no projection to train; the others rise to their sparsity."""
    _, _, folder, seen = tuned
    assert seen == [[0.0, 0.5], [0.0, pytest.approx(0.7)], [0.0, 0.8]]
    metadata, tensors = read_metadata(folder), weights(folder)
    assert (metadata.layer_sparsities, metadata.config.sparsity) == (LAYERS, 0.4)
    moved = [bool(tensors[f"blocks.{i}.attn1.processor.proj_l.weight"].any()) for i in range(2)]
    assert moved == [False, True] and "blocks.0.attn1.to_q.weight" in tensors
    found = info(str(folder / "sla.safetensors"))
    assert found.trained and found.metadata["layer_sparsities"] == LAYERS


@pytest.mark.slow
def test_what_runs_the_weights_takes_them_unless_told_otherwise(tuned, tmp_path):
    model, _, folder, _ = tuned
    file, latents = str(folder / "sla.safetensors"), {}
    for name, options in {"own": {}, "named": {"sparsity_schedule": "0-:0/0.8"}, "other": {"sparsity": 0.4}}.items():
        said = []
        generate(video(model, tmp_path, weights=file, **options), said.append)
        latents[name] = load_file(tmp_path / "a.latents.safetensors")["latents"]
        report = json.loads((tmp_path / "a.json").read_text())
        assert report["settings"].get("sparsity_schedule") == (None if options.get("sparsity") else "0-:0/0.8")
        text = " ".join(str(event.text) for event in said)
        assert ("trained with sparsities from 0 to 0.8 by layer, but" in text) == (name == "other"), text
        assert ("each layer has the sparsity that it was trained with" in text) == (name == "own"), text
    assert torch.equal(latents["own"], latents["named"]) and not torch.equal(latents["own"], latents["other"])
    estimate = plan(video(model, tmp_path, weights=file))
    assert estimate.settings["sparsity_schedule"] == "0-:0/0.8" and not any("other ones" in x for x in estimate.notes)
    transformer = load_transformer(describe_folder(model, "toy"), torch.float32)
    load_sla(transformer, file)
    assert [p.config.sparsity for p in processors(transformer)] == list(LAYERS)
    transformer.save_pretrained(tmp_path / "saved" / "transformer")
    assert peek(tmp_path / "saved").layer_sparsities == LAYERS


@pytest.mark.slow
def test_a_run_goes_on_only_with_the_same_layers(tuned, tmp_path, plain_pictures):
    model, config, folder, _ = tuned
    with pytest.raises(UsageError, match=r"sparsity_schedule was '0-:0/0.8' and is now '0-:0.2/0.8'"):
        finetune(dataclasses.replace(config, sparsity_schedule="0-:0.2/0.8"))
    own = {"from_dense": False, "weights": str(folder / "sla.safetensors"), "sparsity_schedule": None, "steps": 1}
    finetune(dataclasses.replace(config, **own, output=str(tmp_path / "on"), anneal_from=None))
    assert read_metadata(tmp_path / "on").layer_sparsities == LAYERS
    with pytest.raises(UsageError, match=r"sparsities for 3 layers, but this model has 2"):
        finetune(dataclasses.replace(config, output=str(tmp_path / "no"), sparsity_schedule="0-:0.2/0.8/0.9"))
    with pytest.raises(UsageError, match=r"must be at most the final sparsity, 0.8"):
        finetune(dataclasses.replace(config, output=str(tmp_path / "no"), anneal_from=0.9))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"sparsity_schedule": "0-1:0.8,2-:0.9"}, "knows no denoising steps.*without --step-parts"),
        ({"sparsity_schedule": "50%:0.8"}, "takes one sparsity for each layer, for all steps"),
        ({"sparsity_schedule": "0-:0.8", "sparsity": 0.9}, "both set the sparsity"),
        ({"sparsity_schedule": "0-:0.8", "attention": "nabla"}, "Leave --sparsity-schedule out"),
        ({"sparsity_schedule": "0-:1.5"}, "at least 0 and below 1"),
        ({"sparsity_schedule": "none.json"}, "does not exist"),
    ],
)  # fmt: skip
def test_what_training_cannot_follow_is_refused(fields, said):
    with pytest.raises(UsageError, match=said):
        FinetuneConfig(DataConfig("videos"), **fields)


@pytest.mark.parametrize("layers", [[], [1.0], ["a"], 0.5, None])
def test_files_without_and_with_broken_ones(tuned, tmp_path, layers):
    """Those without have no key, as before; what is no list of sparsities is refused."""
    _, _, folder, _ = tuned
    metadata = read_metadata(folder)
    plain = dataclasses.replace(metadata, layer_sparsities=None).to_strings()["slagen"]
    assert "layer_sparsities" not in plain
    strings = {"slagen": json.dumps(json.loads(plain) | {"layer_sparsities": layers})}
    with pytest.raises(WeightsError, match="layer_sparsities"):
        SLAMetadata.from_strings(strings, tmp_path)


@pytest.mark.slow
def test_those_of_another_number_of_layers_do_not_load(tuned, tmp_path):
    model, _, folder, _ = tuned
    metadata = dataclasses.replace(read_metadata(folder), layer_sparsities=(0.5, 0.6, 0.7))
    save_file(weights(folder), tmp_path / "sla.safetensors", metadata=metadata.to_strings())
    with pytest.raises(WeightsError, match="sparsities for 3 layers, but this model has 2"):
        generate(video(model, tmp_path, weights=str(tmp_path / "sla.safetensors")))
