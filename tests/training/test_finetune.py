"""slagen finetune: that it learns, trains what is asked for, and writes what it measured."""

import dataclasses
import json
import sys

import pytest
import torch
from conftest import needs
from finetune_runs import changed, settings, steps_of, validations_of, weights
from safetensors.torch import load_file

from slagen.cli.main import run
from slagen.errors import SlagenError, UsageError, WeightsError
from slagen.formats.sla import read_sla
from slagen.training import comparison, loop
from slagen.training.data.dataset import Dataset
from slagen.training.finetune import finetune
from slagen.training.log import StepRecord
from slagen.training.metrics import noise_levels, velocity_error
from slagen.training.trainer import Trainer
from slagen.wan.folder import describe_folder
from slagen.wan.install import load_sla, remove_sla
from slagen.wan.processor import install
from slagen.wan.transformer import load_transformer

pytest_plugins = ["finetune_fixtures"]
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("plain_pictures")]


def test_it_learns_and_writes_what_it_measured(toy, tmp_path, true_pictures):
    """The error of the file, loaded as generate loads it, is the one that was told."""
    model, data = toy
    said = []
    result = finetune(settings(model, tmp_path / "out", data=data, steps=30, validate_every=10), said.append)
    assert result.teacher_error_after < 0.9 * result.teacher_error_before
    source = describe_folder(model, "toy")
    teacher, student = (load_transformer(source, torch.float32) for _ in range(2))
    install(teacher, None)
    load_sla(student, result.weights)
    prepared = Dataset(data)
    examples = [prepared.example(clip) for clip in prepared.held_out]
    levels = noise_levels(4, 1.5, 1.6)
    assert velocity_error(student, teacher, examples, levels) == pytest.approx(result.teacher_error_after, rel=1e-5)
    steps = steps_of(tmp_path / "out")
    assert [line.step for line in steps] == list(range(1, 31))
    assert all(line.loss > 0 and line.grad_norm > 0 and len(line.proj_norms) == 2 for line in steps)
    assert [line.step for line in validations_of(tmp_path / "out")] == [0, 10, 20, 30]
    html = (tmp_path / "out" / "index.html").read_text()
    assert html.count("<svg") == 5 and html.count("data:video/mp4;base64,") == 8 and "a red circle" in html
    assert sum(isinstance(event, StepRecord) for event in said) == 30
    metadata, _ = read_sla(result.weights)
    assert (metadata.steps, metadata.trained, metadata.config.sparsity) == (30, "all", 0.6)


def test_generate_takes_the_result(toy, tmp_path):
    model, data = toy
    result = finetune(settings(model, tmp_path / "out", data=data, steps=2))
    options = ["--size", "64x64", "--num-frames", "5", "--device", "cpu", "--output", str(tmp_path / "a.mp4")]
    assert run(["generate", "a red circle", "--model", str(model), "--weights", str(result.weights), *options]) == 0
    report = json.loads((tmp_path / "a.json").read_text())
    assert report["weights"]["used"] == "SLA" and report["weights"]["trained_steps"] == 2


@pytest.mark.parametrize("fraction", [0.0, 0.25])
def test_that_part_of_the_captions_is_the_negative_prompt(toy, tmp_path, monkeypatch, fraction):
    """As the unconditional pass of guidance sees it."""
    model, data = toy
    negative, seen = Dataset(data).negative_text(), []
    inputs = Trainer._inputs

    def spy(self, number, piece):
        x, noise, texts = inputs(self, number, piece)
        seen.extend(torch.equal(text, negative) for text in texts)
        return x, noise, texts

    monkeypatch.setattr(Trainer, "_inputs", spy)
    finetune(settings(model, tmp_path / "out", data=data, steps=5, micro_batch=2, caption_dropout=fraction))
    assert (len(seen), sum(seen)) == (20, 20 * fraction)


@pytest.mark.parametrize(
    "train, expected", [("all", {"proj", "attn", "rest"}), ("attn", {"proj", "attn"}), ("proj", {"proj"})]
)
def test_only_what_is_asked_for_trains(toy, tmp_path, train, expected):
    model, data = toy
    finetune(settings(model, tmp_path / "out", data=data, steps=3, train=train))
    assert changed(tmp_path / "out", model) == expected


def test_lora_is_added_to_the_weights_it_changes(toy, tmp_path):
    needs("peft", "slagen[finetune]")
    model, data = toy
    result = finetune(settings(model, tmp_path / "out", data=data, steps=6, train="lora", lora_rank=4, lr=1e-2))
    names = weights(tmp_path / "out")
    assert names["blocks.0.attn1.to_q.lora_A.weight"].shape == (4, 32) and len(names) == 2 * (4 * 2 + 2)
    source = describe_folder(model, "toy")
    teacher, student = (load_transformer(source, torch.float32) for _ in range(2))
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    install(teacher, None)
    load_sla(student, result.weights)
    prepared = Dataset(data)
    examples = [prepared.example(clip) for clip in prepared.held_out]
    error = velocity_error(student, teacher, examples, noise_levels(4, 1.5, 1.6))
    assert error == pytest.approx(result.teacher_error_after, rel=1e-4)
    assert not torch.equal(student.blocks[0].attn1.to_q.weight, before["blocks.0.attn1.to_q.weight"])
    remove_sla(student)
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())


@pytest.mark.parametrize("fields", [
    {"attention": "sparse"}, {"attention": "linear"}, {"loss": "flow"}, {"layer_loss": 1.0}, {"anneal_from": 0.2},
    {"linear_domain": "marginal", "negligible": 0.2}, {"max_grad_norm": 0.1}, {"dtype": "bf16"},
], ids=str)  # fmt: skip
def test_the_comparisons_train_too(toy, tmp_path, capsys, fields):
    model, data = toy
    result = finetune(settings(model, tmp_path / "out", data=data, steps=3, **fields))
    metadata, tensors = read_sla(result.weights)
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
    projections = [tensor for name, tensor in tensors.items() if name.endswith("proj_l.weight")]
    if fields.get("attention") == "sparse":
        assert not any(tensor.any() for tensor in projections) and metadata.trained == "all, sparse"
    if fields.get("attention") == "linear":  # it began as O^l itself
        assert all((tensor - torch.eye(16)).abs().max() < 0.1 for tensor in projections)
    if branch := fields.get("attention"):  # for which alone it is good
        command = ["generate", "a", "--model", str(model), "--weights", str(result.weights), "--size", "64x64",
                   "--num-frames", "5", "--device", "cpu", "--output", str(tmp_path / "a.mp4")]  # fmt: skip
        assert run(command) == 5 and f"Use --attention {branch}" in capsys.readouterr().err
        assert run([*command, "--attention", branch]) == 0


def test_a_dense_control_is_a_transformer(toy, tmp_path):
    model, data = toy
    fields = {"attention": "dense", "loss": "flow", "sparsity": None, "block_m": None, "block_n": None}
    result = finetune(settings(model, tmp_path / "out", data=data, steps=3, **fields))
    assert result.teacher_error_before == 0 < result.teacher_error_after
    options = ["--size", "64x64", "--num-frames", "5", "--device", "cpu", "--output", str(tmp_path / "a.mp4")]
    command = ["generate", "a", "--model", str(model), "--weights", str(result.weights), "--attention", "dense"]
    assert run([*command, *options]) == 0
    with pytest.raises(UsageError, match="Give --loss flow"):
        settings(model, tmp_path / "out", data=data, **{**fields, "loss": "distill"})
    with pytest.raises(UsageError, match="Leave --sparsity out"):
        settings(model, tmp_path / "out", data=data, attention="dense")


def test_gradient_checkpointing_changes_no_number(toy, tmp_path):
    """The block map is chosen again, and is the same."""
    model, data = toy
    for name, on in (("with", True), ("without", False)):
        finetune(settings(model, tmp_path / name, data=data, steps=3, checkpointing=on))
    one, other = weights(tmp_path / "with"), weights(tmp_path / "without")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_going_on_from_sla_weights(toy, tmp_path):
    """Without --from-dense the model's SLA weights are where it begins."""
    model, data = toy
    first = finetune(settings(model, tmp_path / "first", data=data, steps=6))
    config = settings(model, tmp_path / "second", data=data, steps=2, from_dense=False, block_m=None, block_n=None,
                      weights=str(first.weights))  # fmt: skip
    second = finetune(config)
    assert second.teacher_error_before == pytest.approx(first.teacher_error_after, rel=1e-4)
    assert read_sla(second.weights)[0].steps == 8
    with pytest.raises(UsageError, match="Leave one of them out"):
        finetune(dataclasses.replace(config, from_dense=True))
    with pytest.raises(WeightsError, match="no SLA weights to continue from. Start with --from-dense"):
        finetune(settings(model, tmp_path / "third", data=data, from_dense=False))


@pytest.mark.parametrize("train", ["attn", "proj", "lora"])
def test_going_on_keeps_what_was_trained_before(toy, tmp_path, train):
    """The file holds it all, whichever part goes on, and it is what was measured."""
    if train == "lora":
        needs("peft", "slagen[finetune]")
    model, data = toy
    path, source, prepared = None, describe_folder(model, "toy"), Dataset(data)
    for number, part in enumerate(("all", train, train)):
        before = {"from_dense": True} if path is None else {"from_dense": False, "weights": str(path)}
        result = finetune(settings(model, tmp_path / str(number), data=data, steps=6, train=part, lr=1e-2, **before))
        path = result.weights
    teacher, student = (load_transformer(source, torch.float32) for _ in range(2))
    install(teacher, None)
    load_sla(student, path)
    examples = [prepared.example(clip) for clip in prepared.held_out]
    error = velocity_error(student, teacher, examples, noise_levels(4, 1.5, 1.6))
    assert error == pytest.approx(result.teacher_error_after, rel=1e-4)
    assert changed(path, model) >= {"proj", "rest"}


def test_a_transformer_of_ones_own_lies_beside_the_result(toy, tmp_path):
    """What was trained on it is loaded without any model that has it."""
    model, data = toy
    fields = {"attention": "dense", "loss": "flow", "sparsity": None, "block_m": None, "block_n": None, "train": "attn"}
    dense = finetune(settings(model, tmp_path / "dense", data=data, steps=3, lr=1e-2, **fields))
    source = describe_folder(model, "toy")
    teacher, student = (load_transformer(source, torch.float32) for _ in range(2))
    student.load_state_dict({name: tensor.float() for name, tensor in load_file(dense.weights).items()})
    examples = [Dataset(data).example(clip) for clip in Dataset(data).held_out]
    error = velocity_error(student, teacher, examples, noise_levels(4, 1.5, 1.6))
    assert error == pytest.approx(dense.teacher_error_after, rel=1e-5)
    tuned = finetune(settings(model, tmp_path / "tuned", data=data, steps=2, weights=str(dense.weights)))
    options = ["--size", "64x64", "--num-frames", "5", "--device", "cpu", "--output", str(tmp_path / "a.mp4")]
    assert tuned.weights == tmp_path / "tuned"
    assert run(["generate", "a", "--model", str(model), "--weights", str(tuned.weights), *options]) == 0
    assert json.loads((tmp_path / "a.json").read_text())["weights"]["trained_steps"] == 2


def test_weights_that_are_not_finite_are_not_written(toy, tmp_path):
    model, data = toy
    with pytest.raises(SlagenError, match="the weights after step 1 produce NaN or Inf"):
        finetune(settings(model, tmp_path / "out", data=data, steps=1, lr=1e6))
    assert not (tmp_path / "out" / "sla.safetensors").exists()


def test_a_clip_that_fails_at_the_end_costs_no_weights(toy, tmp_path, monkeypatch):
    model, data = toy

    def fail(*_):
        raise SlagenError("the disk is full")

    monkeypatch.setattr(comparison, "write_video", fail)
    told = []
    config = settings(model, tmp_path / "out", data=data, steps=1)
    monkeypatch.setattr(loop, "validate_if_due", lambda *_: None)
    result = finetune(config, told.append)
    assert result.weights.is_file() and any(
        "the videos of the last step were not written" in getattr(e, "text", "") for e in told
    )


def test_command(toy, tmp_path, capsys, monkeypatch):
    model, data = toy
    base = [
        "finetune",
        "--model",
        str(model),
        "--data",
        str(data),
        "--device",
        "cpu",
        "--output",
        str(tmp_path / "out"),
    ]
    options = ["--from-dense", "--sparsity", "0.6", "--block-m", "16", "--block-n", "16", "--steps", "1"]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert run([*base, *options, "--tensorboard", "--json"]) == 0
    out, errors = capsys.readouterr()
    content = json.loads(out)
    assert {"steps", "teacher_error_before", "teacher_error_after", "output"} <= content.keys()
    assert errors.count("no TensorBoard files") == 1
    monkeypatch.undo()
    assert run([*base, *options]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "out" / "sla.safetensors")
    assert run([*base, *options, "--lr", "3"]) == 2
    assert run([*base, *options, "--dtype", "fp16"]) == 2
    assert run(["finetune", "--from-dense"]) == 2
    assert run([*base, "--self-generate", "x.txt"]) == 2
    assert run([*base, "--parallel", "ddp", "--restart"]) == 2
    assert "torchrun" in capsys.readouterr().err
    for name in ("bitsandbytes", "bitsandbytes.optim"):
        monkeypatch.setitem(sys.modules, name, None)
    assert run([*base, *options, "--restart", "--optimizer", "adamw8bit"]) == 4
    assert "slagen[adamw8bit]" in capsys.readouterr().err


def test_tensorboard(toy, tmp_path):
    needs("tensorboard", "slagen[tensorboard]")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model, data = toy
    finetune(settings(model, tmp_path / "out", data=data, steps=3, tensorboard=True))
    events = EventAccumulator(str(tmp_path / "out" / "tensorboard"))
    events.Reload()
    assert [entry.step for entry in events.Scalars("train/loss")] == [1, 2, 3]
    assert {"train/error", "train/grad_norm", "proj_l/00", "proj_l/01"} <= set(events.Tags()["scalars"])
