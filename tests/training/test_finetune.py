"""slagen finetune: that it learns, goes on after anything, and that what it writes is what it measured."""

import contextlib
import dataclasses
import functools
import json
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import needs
from processes import run_together, start
from safetensors.torch import load_file
from train_together import train
from wan_models import build_pipeline, save_pipeline

from slagen.attention.registry import parameter_group
from slagen.attention.sla.config import SLAConfig
from slagen.cli.main import run
from slagen.errors import SlagenError, UsageError, WeightsError
from slagen.formats.sla import read_sla
from slagen.generation.config import GenerateConfig
from slagen.generation.resolve import find_weights
from slagen.interrupts import stopping
from slagen.training import comparison, loop, output_folder, page, setup, trainer
from slagen.training.checkpoints import read_latest
from slagen.training.config import DataConfig, FinetuneConfig
from slagen.training.data import dataset, encode
from slagen.training.data import prepare as preparing
from slagen.training.data.dataset import Dataset
from slagen.training.distributed import Team
from slagen.training.finetune import finetune
from slagen.training.log import StepRecord, ValidationRecord, read_log
from slagen.training.metrics import layer_errors, noise_levels, velocity_error
from slagen.training.trainer import Trainer
from slagen.wan.folder import describe_folder
from slagen.wan.install import load_sla, remove_sla
from slagen.wan.processor import install
from slagen.wan.transformer import load_transformer

pytestmark = pytest.mark.slow

PROMPTS = "a red circle --steps 1 --size 64x64 --frames 9\na circle --steps 1 --size 64x64 --frames 5\n"


@pytest.fixture(autouse=True)
def plain_pictures(request):
    """ffmpeg and matplotlib take two thirds of a run this small. Its clips are kept as arrays and its charts left
    empty, but for the tests that ask for `true_pictures`."""
    if "true_pictures" in request.fixturenames:
        yield
        return

    def keep(frames, path, fps, comment=""):
        with path.open("wb") as file:
            np.save(file, frames)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison, "write_mp4", keep)
        patch.setattr(comparison, "read_mp4", np.load)
        patch.setattr(page, "draw_chart", lambda chart: "<svg></svg>")
        patch.setattr(page, "make_thumbnail", lambda path, width: b"")
        yield


@pytest.fixture
def true_pictures():
    """That the clips of a run are videos and its curves drawn."""


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A tiny random Wan, and clips that it made itself, prepared."""
    folder = tmp_path_factory.mktemp("toy")
    pipe = build_pipeline()
    with torch.no_grad():
        for block in pipe.transformer.blocks:
            block.attn1.norm_q.weight.mul_(8)  # peaks, so that it matters which blocks are kept
    pipe.save_pretrained(model := folder / "model")
    training = {"steps": 12, "lr": 1e-3, "batch_size": 4, "micro_batch": 4, "proj_multiplier": 2.0}
    defaults = {"steps": 1, "guidance_scale": 1.0, "max_sequence_length": 8, "fps": 8, "training": training,
                "width": 64, "height": 64, "num_frames": 9}  # fmt: skip
    (model / "slagen.json").write_text(json.dumps(defaults))
    (folder / "prompts.txt").write_text(PROMPTS)
    first = finetune(settings(model, folder / "made", steps=1, self_generate=folder / "prompts.txt"))
    assert first.steps == 1
    return model, folder / "made" / "data"


def settings(model, output, *, data=None, self_generate=None, **fields):
    count = None if self_generate is None else 3
    source = DataConfig(None if data is None else str(data), self_generate and str(self_generate), count)
    fields = {"from_dense": True, "sparsity": 0.6, "block_m": 16, "block_n": 16, "device": "cpu",
              "validate_every": 1000, **fields}  # fmt: skip
    return FinetuneConfig(source, model=str(model), output=str(output), **fields)


def steps_of(folder):
    return [record for record in read_log(folder) if isinstance(record, StepRecord)]


def validations_of(folder):
    return [record for record in read_log(folder) if isinstance(record, ValidationRecord)]


def weights(folder):
    return read_sla(folder)[1]


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


def test_going_on_ends_where_one_run_ends(toy, tmp_path):
    """N steps are k, an end, and N - k, bit for bit; so are the log and the error."""
    model, data = toy
    whole = finetune(settings(model, tmp_path / "whole", data=data, steps=8))
    for output, stop in (("parts", 3), ("parts", 5), ("parts", None)):
        told = []

        def end(event, stop=stop, told=told):
            told.append(event)
            maps = Path("/proc/self/maps")  # a checkpoint that is mapped takes room when it is gone
            if isinstance(event, StepRecord) and maps.exists():
                assert "state.safetensors" not in maps.read_text()
            if isinstance(event, StepRecord) and event.step == stop:
                os.kill(os.getpid(), signal.SIGTERM)

        config = settings(model, tmp_path / output, data=data, steps=8)
        if stop is not None:
            with pytest.raises(KeyboardInterrupt):
                finetune(config, end)
            assert read_latest(tmp_path / output).state.step == stop
        else:
            result = finetune(config, end)
    assert any("resuming from step 5 of 8" in getattr(event, "text", "") for event in told)
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert (result.teacher_error_before, result.teacher_error_after) == (
        whole.teacher_error_before, whole.teacher_error_after,
    )  # fmt: skip
    losses = [[line.loss for line in steps_of(tmp_path / name)] for name in ("whole", "parts")]
    assert losses[0] == losses[1]
    again = finetune(settings(model, tmp_path / "parts", data=data, steps=8))
    assert again.teacher_error_after == whole.teacher_error_after


def test_going_on_with_an_optimizer_of_8_bits(toy, tmp_path, monkeypatch):
    bitsandbytes = needs("bitsandbytes", "slagen[adamw8bit]")
    small = functools.partial(bitsandbytes.optim.AdamW8bit, min_8bit_size=1)  # it keeps small tensors in 32 bits
    monkeypatch.setattr(trainer, "optimizer_8bit", lambda: small)
    model, data = toy
    config = settings(model, tmp_path / "whole", data=data, steps=4, optimizer="adamw8bit", train="attn")
    finetune(config)

    def end(event):
        if isinstance(event, StepRecord) and event.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    parts = dataclasses.replace(config, output=str(tmp_path / "parts"))
    with pytest.raises(KeyboardInterrupt):
        finetune(parts, end)
    path = read_latest(tmp_path / "parts").path
    assert torch.uint8 in {tensor.dtype for tensor in load_file(path / "state.safetensors").values()}
    finetune(parts)
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_killed_at_random_moments(toy, tmp_path):
    """`make soak` does this 20 times."""
    model, data = toy
    kills = int(os.environ.get("SLAGEN_SOAK_KILLS", 1)) * 4 // 5 or 1
    steps = 8 * max(1, kills // 4)
    options = ["--model", str(model), "--data", str(data), "--from-dense", "--sparsity", "0.6", "--block-m", "16",
               "--block-n", "16", "--steps", str(steps), "--save-every", "2", "--validate-every", "1000",
               "--device", "cpu", "--json"]  # fmt: skip

    def begin(folder):
        return start(run, [["finetune", *options, "--output", str(tmp_path / folder)]], tmp_path / f"{folder}.json")

    rng = random.Random(1)
    for _ in range(kills):
        process = begin("killed")
        process.join(rng.uniform(0.5, 4.0))
        process.kill()
        process.join()
    results = {}
    for folder in ("killed", "whole"):
        process = begin(folder)
        process.join(300)
        assert process.exitcode == 0, (tmp_path / f"{folder}.json.err").read_text()
        results[folder] = json.loads((tmp_path / f"{folder}.json").read_text())
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert results["whole"]["teacher_error_after"] == results["killed"]["teacher_error_after"]
    assert not list((tmp_path / "killed").rglob("*.part"))


def test_other_settings_are_refused(toy, tmp_path):
    model, data = toy
    config = settings(model, tmp_path / "out", data=data, steps=2)
    finetune(config)
    before = (tmp_path / "out" / "sla.safetensors").read_bytes()
    for change in ({"lr": 3e-3}, {"steps": 3}, {"loss": "flow"}, {"sparsity": 0.5}, {"seed": 1}):
        with pytest.raises(UsageError, match=f"{next(iter(change))} was .* Give the same settings"):
            finetune(dataclasses.replace(config, **change))
    assert (tmp_path / "out" / "sla.safetensors").read_bytes() == before
    assert finetune(dataclasses.replace(config, lr=3e-3, restart=True)).steps == 2


def test_other_data_are_refused_before_they_are_made(toy, tmp_path, monkeypatch):
    model, _ = toy
    (tmp_path / "prompts.txt").write_text(PROMPTS)
    config = settings(model, tmp_path / "out", self_generate=tmp_path / "prompts.txt", steps=1)
    finetune(config)
    before = (tmp_path / "out" / "data" / "dataset.json").read_bytes()
    monkeypatch.setattr(preparing, "prepare", lambda *_: pytest.fail("prepared"))
    assert config.data.clips_per_prompt == 3
    more = dataclasses.replace(config.data, clips_per_prompt=4)
    for other, name in ((dataclasses.replace(config, data=more), "clips_per_prompt"),
                        (dataclasses.replace(config, seed=5), "seed")):  # fmt: skip
        with pytest.raises(UsageError, match=f"{name} was .* Give the same settings"):
            finetune(other)
    assert (tmp_path / "out" / "data" / "dataset.json").read_bytes() == before


def test_a_run_without_a_checkpoint_leaves_nothing_to_the_next(toy, tmp_path, monkeypatch):
    """What it said and showed may be of other settings, which nothing compares."""
    model, data = toy
    config = settings(model, tmp_path / "out", data=data, steps=2, validate_every=1)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            finetune(config)
    (first,) = read_log(tmp_path / "out")
    finetune(dataclasses.replace(config, sparsity=0.1))
    log = validations_of(tmp_path / "out")
    assert [line.step for line in log] == [0, 1, 2] and log[0].error != first.error


def test_files_of_others_are_not_written_over(toy, tmp_path):
    model, data = toy
    for name in ("sla.safetensors", "transformer.safetensors", "transformer"):
        folder = tmp_path / name / "out"
        folder.mkdir(parents=True)
        (folder / name).write_text("mine")
        for restart in (False, True):
            with pytest.raises(UsageError, match="exists and was not written by slagen finetune"):
                finetune(settings(model, folder, data=data, steps=1, restart=restart))
        assert (folder / name).read_text() == "mine"


def test_what_cannot_train_is_refused(toy, tmp_path, monkeypatch):
    model, data = toy
    given = find_weights(GenerateConfig("-", model=str(model), attention="dense"))
    source = dataclasses.replace(given.source, weights=tmp_path / "wan.gguf")
    with monkeypatch.context() as patch:
        patch.setattr(setup, "find_weights", lambda *_: dataclasses.replace(given, source=source))
        with pytest.raises(UsageError, match="wan.gguf is quantised and cannot be trained"):
            finetune(settings(model, tmp_path / "out", data=data))
    split = Team(0, 2, torch.device("cpu"), "fsdp")
    with pytest.raises(UsageError, match="Leave --optimizer out"):
        setup.check_setup(settings(model, tmp_path, data=data, optimizer="adamw8bit"), tmp_path, split, print)
    alone = Team(0, 1, split.device, "alone")
    checked = setup.check_setup(settings(model, tmp_path, data=data), tmp_path, alone, print)
    checked = dataclasses.replace(checked, config=dataclasses.replace(checked.config, context_parallel=5))
    with pytest.raises(UsageError, match="which 5 processes cannot share evenly"):
        setup.check_tokens(checked, Dataset(data))


def changed(folder, model):
    """The names of what differs from the dense model, by kind."""
    base = load_transformer(describe_folder(model, "toy"), torch.float32).state_dict()
    tensors = weights(folder)
    kinds = {"proj": False, "attn": False, "rest": False}
    for name, tensor in tensors.items():
        if parameter_group(name) is not None:
            kinds["proj"] |= bool(tensor.any())
        elif ".lora_" not in name and not torch.equal(tensor.float(), base[name].half().float()):
            kinds["attn" if ".attn1." in name else "rest"] = True
    return {kind for kind, differs in kinds.items() if differs}


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
        assert run(command) == 5 and f"Take --attention {branch}" in capsys.readouterr().err
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


def test_other_weights_under_the_same_name_are_refused(toy, tmp_path):
    model, data = toy
    first = finetune(settings(model, tmp_path / "first", data=data, steps=2))
    again = {"from_dense": False, "data": data, "weights": str(first.weights)}
    for output, fields in ((tmp_path / "first", again), (model, {"data": data})):
        with pytest.raises(UsageError, match="where the result would overwrite them"):
            finetune(settings(model, output, **fields, steps=3))
    assert not (model / ".lock").exists()
    again["weights"] = str(tmp_path / "first")  # the folder: only the file in it counts
    config = settings(model, tmp_path / "second", **again, steps=2)
    finetune(config)
    (tmp_path / "first" / "notes.txt").write_text("new")
    finetune(config)
    finetune(settings(model, tmp_path / "first", data=data, steps=4, restart=True))
    with pytest.raises(UsageError, match="weights_hash was .* Give the same settings"):
        finetune(config)


def test_restart_takes_away_its_own_and_not_before_all_is_well(toy, tmp_path):
    model, data = toy
    config = settings(model, tmp_path / "out", data=data, steps=2, restart=True)
    foreign = [tmp_path / "out" / name for name in ("checkpoints/my-model.pt", "clips/holiday.mp4", "notes.txt")]
    finetune(dataclasses.replace(config, seed=1))
    for file in foreign:
        file.write_text("mine")
    left = [tmp_path / "out" / name for name in ("checkpoints/step-000077", "tensorboard", "clips/step-000009-0.mp4")]
    for path in left:
        path.mkdir() if path.suffix == "" else path.write_text("old")
    kept = tmp_path / "out" / "checkpoints" / "step-000002-keep"
    kept.mkdir()
    own = (tmp_path / "out" / "checkpoints").glob("step-00000?")
    before = {path.name: (path / "sha256.json").read_text() for path in own}
    with pytest.raises(UsageError):
        finetune(dataclasses.replace(config, data=DataConfig(str(tmp_path / "nowhere"))))
    assert before == {name: (tmp_path / "out" / "checkpoints" / name / "sha256.json").read_text() for name in before}
    assert finetune(config).steps == 2
    assert all(file.read_text() == "mine" for file in foreign) and kept.is_dir()
    assert not any(path.exists() for path in left)


def test_clips_of_seeds_that_overlap_are_never_in_both_sets(toy, tmp_path):
    model, _ = toy
    (tmp_path / "prompts.txt").write_text("a red circle --seed 1\na red circle --seed 2\na blue star --seed 1\n")
    finetune(settings(model, tmp_path / "out", steps=1, self_generate=tmp_path / "prompts.txt", backend="torch"))
    made = Dataset(tmp_path / "out" / "data")
    assert not {clip.latents for clip in made.training} & {clip.latents for clip in made.held_out}
    assert len(made.held_out) == 3


def test_lines_alike_make_clips_of_their_own(toy, tmp_path):
    model, _ = toy
    line = "a circle --steps 1 --size 64x64 --frames 5"
    (tmp_path / "prompts.txt").write_text(f"{line}\n{line} --num-videos 2\n")
    finetune(settings(model, tmp_path / "out", steps=1, self_generate=tmp_path / "prompts.txt"))
    data = Dataset(tmp_path / "out" / "data")
    assert (len(data.training), len(data.held_out)) == (3 + 2, 2)
    assert len({clip.latents for clip in [*data.training, *data.held_out]}) == 7


def test_a_gradient_that_is_not_finite_stops(toy, tmp_path, monkeypatch):
    """Nothing of its step is kept, so the same command goes on once the fault is gone."""
    model, data = toy
    config = settings(model, tmp_path / "out", data=data, steps=4, save_every=1)
    total = torch.nn.utils.get_total_norm
    calls = []

    def spoiled(*arguments, **options):
        calls.append(0)
        return total(*arguments, **options) * (float("nan") if len(calls) == 3 else 1)

    monkeypatch.setattr(torch.nn.utils, "get_total_norm", spoiled)
    with pytest.raises(SlagenError, match="the gradient of step 3 is nan"):
        finetune(config)
    assert read_latest(tmp_path / "out").state.step == 2
    finetune(config)
    whole = finetune(dataclasses.replace(config, output=str(tmp_path / "whole")))
    one, other = weights(tmp_path / "out"), weights(whole.output)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_validations_are_at_the_final_sparsity(toy, tmp_path):
    """Also where sparsity rises, and right after going on."""
    model, data = toy
    config = settings(model, tmp_path / "whole", data=data, steps=4, anneal_from=0.0, validate_every=1)
    finetune(config)

    def end(event):
        if isinstance(event, StepRecord) and event.step == 2:
            raise RuntimeError("the machine is gone")

    parts = dataclasses.replace(config, output=str(tmp_path / "parts"), save_every=1)
    with contextlib.suppress(RuntimeError):
        finetune(parts, end)
    finetune(parts)
    errors = [[line.error for line in validations_of(tmp_path / name)] for name in ("whole", "parts")]
    assert errors[0] == errors[1] and len(errors[0]) == 5
    with pytest.raises(UsageError, match="sparsity can only rise from there to 0.6"):
        finetune(settings(model, tmp_path / "no", data=data, anneal_from=0.8))


def test_told_to_stop_in_a_validation(toy, tmp_path, monkeypatch):
    """It ends without the clip and without another step, and the validation is made when it goes on."""
    model, data = toy
    config = settings(model, tmp_path / "out", data=data, steps=4, validate_every=2)
    sample, asked = comparison.sample, []

    def signalled(run, *arguments):
        if run.trainer.optimizer.state and not asked:
            asked.append(os.kill(os.getpid(), signal.SIGTERM))
        return sample(run, *arguments)

    monkeypatch.setattr(comparison, "sample", signalled)
    with pytest.raises(KeyboardInterrupt):
        finetune(config)
    assert asked and read_latest(tmp_path / "out").state.step == 2
    assert [line.step for line in validations_of(tmp_path / "out")] == [0]
    finetune(config)
    assert [line.step for line in validations_of(tmp_path / "out")] == [0, 2, 4]


def test_a_signal_passed_on_is_no_second_one(monkeypatch):
    """torchrun tells its processes again what all of them were told."""
    stop, said = threading.Event(), []
    now = [100.0]
    monkeypatch.setattr("slagen.interrupts.time.monotonic", lambda: now[0])
    with stopping(stop, lambda: said.append(1), repeated_s=5):
        told = signal.getsignal(signal.SIGTERM)
        for _ in range(3):
            told(signal.SIGTERM, None)
        assert stop.is_set() and said == [1]
        now[0] += 6
        with pytest.raises(KeyboardInterrupt):
            told(signal.SIGTERM, None)


def test_settings_without_effect_are_refused():
    data = DataConfig("videos")
    for fields, words in (
        ({"attention": "dense", "loss": "flow", "sparsity": 0.5}, "Leave --sparsity out"),
        ({"attention": "dense", "loss": "flow", "anneal_from": 0.5}, "Leave --anneal-from out"),
        ({"attention": "sparse", "train": "proj"}, "leaves nothing to train"),
        ({"loss": "flow", "layer_loss": 1.0}, "Leave one out"),
        ({"lora_rank": 4}, "is for --train lora"), ({"attention": "sparse", "proj_multiplier": 2.0}, "has no proj_l"),
        ({"dtype": "fp16"}, "lost in fp16"), ({"caption_dropout": 1.0}, "caption_dropout is 1.0"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=words):
            FinetuneConfig(data, **fields)


def test_a_loss_that_is_not_finite_stops(toy, tmp_path):
    model, data = toy
    config = settings(model, tmp_path / "out", data=data, steps=8, lr=1e30, save_every=1)
    with pytest.raises(SlagenError, match=r"the loss of step \d is (nan|inf), on the clips 'a.*the last checkpoint"):
        finetune(config)
    latest = read_latest(tmp_path / "out")
    assert latest.state.step >= 1 and load_file(latest.path / "state.safetensors")


def test_weights_that_are_not_finite_are_not_written(toy, tmp_path):
    model, data = toy
    with pytest.raises(SlagenError, match="the weights after step 1 produce NaN or Inf"):
        finetune(settings(model, tmp_path / "out", data=data, steps=1, lr=1e6))
    assert not (tmp_path / "out" / "sla.safetensors").exists()


def test_a_clip_that_fails_at_the_end_costs_no_weights(toy, tmp_path, monkeypatch):
    model, data = toy

    def fail(*_):
        raise SlagenError("the disk is full")

    monkeypatch.setattr(comparison, "write_mp4", fail)
    told = []
    config = settings(model, tmp_path / "out", data=data, steps=1)
    monkeypatch.setattr(loop, "validate_if_due", lambda *_: None)
    result = finetune(config, told.append)
    assert result.weights.is_file() and any(
        "the videos of the last step were not written" in getattr(e, "text", "") for e in told
    )


def test_a_disk_too_small_is_told_before_the_first_step(toy, tmp_path, monkeypatch):
    model, data = toy
    usage = output_folder.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(output_folder.shutil, "disk_usage", lambda path: usage._replace(free=10**5))
    with pytest.raises(SlagenError, match="has 9.3e-05 GiB free, but 3 checkpoints of 0.00.* GiB each must fit"):
        finetune(settings(model, tmp_path / "out", data=data))
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_two_runs_in_one_folder(toy, tmp_path):
    model, data = toy
    with output_folder.hold_folder(tmp_path / "out"), pytest.raises(SlagenError, match="is running in"):
        finetune(settings(model, tmp_path / "out", data=data))
    (tmp_path / "file").write_text("")
    with pytest.raises(SlagenError, match="is not writable") as caught:
        finetune(settings(model, tmp_path / "file", data=data))
    assert caught.value.exit_code == 1


def test_two_broken_checkpoints_do_not_cost_the_new_ones(toy, tmp_path):
    model, data = toy
    config = settings(model, tmp_path / "out", data=data, steps=6, save_every=1)
    finetune(config)
    for path in (tmp_path / "out" / "checkpoints").glob("step-*"):
        (path / "state.json").write_text("{}")

    def look(event):
        if isinstance(event, StepRecord) and event.step > 1:
            assert read_latest(tmp_path / "out").state.step == event.step - 1

    assert finetune(config, look).steps == 6


def test_a_broken_checkpoint_falls_back_to_the_one_before(toy, tmp_path):
    model, data = toy

    def end(event):
        if isinstance(event, StepRecord) and event.step == 4:
            raise RuntimeError("the machine is gone")

    config = settings(model, tmp_path / "out", data=data, steps=6, save_every=1)
    with contextlib.suppress(RuntimeError):
        finetune(config, end)
    latest = read_latest(tmp_path / "out")
    assert latest.state.step == 3
    path = latest.path
    file = path / "state.safetensors"
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)
    assert read_latest(tmp_path / "out").state.step == 2
    left = path.with_name("step-000077.part")
    left.mkdir()
    told = []
    finetune(config, told.append)
    assert [e.text for e in told if getattr(e, "kind", "") == "warning"] == [f"{path} is corrupt; skipping it"]
    assert not left.exists()
    whole = finetune(dataclasses.replace(config, output=str(tmp_path / "whole")))
    one, other = weights(tmp_path / "out"), weights(whole.output)
    assert all(torch.equal(one[name], other[name]) for name in one)


# Data


def test_data_of_another_vae_and_too_few_tokens(toy, tmp_path):
    model, data = toy
    other = save_pipeline(tmp_path / "other", seed=1)
    (other / "slagen.json").write_bytes((model / "slagen.json").read_bytes())
    with pytest.raises(WeightsError, match="encoded with another VAE"):
        finetune(settings(other, tmp_path / "out", data=data))
    with pytest.raises(UsageError, match="fewer than 2 key blocks of 128"):
        finetune(settings(model, tmp_path / "out", data=data, block_n=128))


def test_changed_shards_are_found(toy, tmp_path):
    import shutil

    model, data = toy
    copy = tmp_path / "copy"
    shutil.copytree(data, copy)
    shard = max(copy.glob("*.safetensors"), key=lambda file: file.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[-5] ^= 64
    shard.write_bytes(content)
    with pytest.raises(WeightsError, match="has changed since it was written"):
        finetune(settings(model, tmp_path / "out", data=copy, steps=6))
    shard.write_bytes(content[:-9])
    with pytest.raises(WeightsError, match=r"lacks \d+ of its \d+ tensors. Prepare it again"):
        finetune(settings(model, tmp_path / "out", data=copy))
    (copy / "dataset.json").write_text("{}")
    with pytest.raises(WeightsError, match="is not a prepared data set"):
        finetune(settings(model, tmp_path / "out", data=copy))


def test_videos_are_encoded_once(toy, tmp_path, monkeypatch, capsys):
    needs("av", "slagen[finetune]")
    from test_videos import write_video

    model, _ = toy
    raw = tmp_path / "raw"
    raw.mkdir()
    for number in range(4):
        write_video(raw / f"{number}.mp4", [60 * number, 40], [0, 2000], (64, 64))
        (raw / f"{number}.txt").write_text("a red circle")
    encoded = []
    real = encode.encode_video
    monkeypatch.setattr(encode, "encode_video", lambda vae, frames: encoded.append(frames.shape) or real(vae, frames))
    command = ["finetune", "data", str(raw), "--output", str(tmp_path / "data"), "--model", str(model), "--size",
               "64x64", "--num-frames", "9", "--device", "cpu", "--json"]  # fmt: skip
    assert run(command) == 0
    counts = json.loads(capsys.readouterr().out)
    assert (counts["training"], counts["held_out"], len(encoded)) == (3, 1, 4) and set(encoded) == {(9, 64, 64, 3)}
    assert run(command) == 0 and len(encoded) == 4
    write_video(raw / "2.mp4", [200, 20], [0, 2000], (64, 64))
    (raw / "3.txt").write_text("a circle")
    assert run(command) == 0 and len(encoded) == 5
    assert finetune(settings(model, tmp_path / "out", data=tmp_path / "data", steps=2)).steps == 2
    finetune(settings(model, tmp_path / "raw-out", data=raw, steps=1, train="proj"))  # prepares by itself
    (raw / "1.mp4").write_bytes(b"broken")
    assert run(command) == 2
    assert "1.mp4 cannot be decoded" in capsys.readouterr().err


def prepare(model, path, output, held_out=None, dtype="fp32"):
    config = DataConfig(str(path), held_out=held_out, width=64, height=64, num_frames=9)
    base = GenerateConfig("-", model=str(model), device="cpu", dtype=dtype)
    told = []
    return preparing.prepare(config, base, output, output.parent / "cache", 0, told.append), told


def test_what_a_data_set_may_be(toy, tmp_path):
    """Several captions of a video, faulty numbers of clips, folders in each other, precisions, damage."""
    needs("av", "slagen[finetune]")
    from test_videos import write_video

    model, prepared = toy
    raw, data = tmp_path / "raw", tmp_path / "data"
    raw.mkdir()
    for number in range(3):
        write_video(raw / f"{number}.mp4", [60 * number, 40], [0, 2000], (64, 64))
    lines = [{"video_path": f"{n}.mp4", "caption": c} for n in range(3) for c in ("a circle", "a star")]
    (raw / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for held_out in (3, 7):
        with pytest.raises(UsageError, match=f"has 3 clips, of which {held_out} would be held out"):
            prepare(model, raw, data, held_out)
    made, told = prepare(model, raw, data)
    assert not any("encoding" in event.text for event in prepare(model, raw, data)[1] if event.kind == "clip")
    assert (len(made.training), len(made.held_out)) == (4, 2)
    assert {clip.caption for clip in made.held_out} == {"a circle", "a star"}
    assert not {clip.latents for clip in made.training} & {clip.latents for clip in made.held_out}
    assert prepare(model, raw, data, dtype="bf16")[0].hash != made.hash  # other texts
    with pytest.raises(UsageError, match="is inside the data set"):
        prepare(model, raw, raw / "here")
    for option in ({"width": 64, "height": 64}, {"held_out": 1}):
        config = dataclasses.replace(settings(model, tmp_path / "out", data=data), data=DataConfig(str(data), **option))
        with pytest.raises(UsageError, match="is already prepared"):
            finetune(config)
    largest = max(data.glob("*.safetensors"), key=lambda file: file.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[-5] ^= 64
    largest.write_bytes(content)
    again, told = prepare(model, raw, data)
    assert any("encoding" in event.text or event.text == "text" for event in told) and again.hash == made.hash
    assert all(again.example(clip).latents.isfinite().all() for clip in [*again.training, *again.held_out])
    (raw / "1.mp4").write_bytes(b"broken")
    for path, message in ((raw, "1.mp4 cannot be decoded"), (tmp_path / "typo", "does not exist")):
        with pytest.raises(UsageError, match=message):
            prepare(model, path, data)
    assert Dataset(data).hash == made.hash  # what cannot be done changes nothing
    with pytest.raises(UsageError, match="in fp16"):
        prepare(model, raw, data, dtype="fp16")
    (data / "dataset.json").unlink()
    with pytest.raises(UsageError, match="was interrupted, prepare it again"):
        finetune(settings(model, tmp_path / "out", data=data))
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_all_faults_come_before_the_first_clip_is_encoded(toy, tmp_path, monkeypatch):
    """Damage that only decoding finds, too; and what is changed is no whole set until all is well."""
    needs("av", "slagen[finetune]")
    from test_videos import write_ramp

    model, _ = toy
    raw, data = tmp_path / "raw", tmp_path / "data"
    raw.mkdir()
    for number in range(3):
        write_ramp(raw / f"{number}.mp4", step=number + 1, size=(64, 64), g="8")
        (raw / f"{number}.txt").write_text("a circle")
    with av_damaged(raw / "1.mp4"):
        with pytest.raises(UsageError, match="the data set has one fault:\n1.mp4: "):
            prepare(model, raw, data)
        assert not list(data.glob("*.safetensors"))
    odd = raw / os.fsdecode(b"caf\xe9.mp4")
    (raw / "2.mp4").rename(odd)
    (raw / "2.txt").rename(odd.with_suffix(".txt"))
    made, _ = prepare(model, raw, data)
    assert len(made.training) == 2
    (raw / "0.txt").write_text("a star")
    monkeypatch.setattr(preparing, "write_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        prepare(model, raw, data)
    assert not dataset.is_prepared(data)
    monkeypatch.undo()
    (data / "decoded.txt").write_bytes(b"\xff\x00 damaged")
    monkeypatch.setattr(encode, "encode_video", lambda vae, frames: torch.full((16, 3, 8, 8), torch.nan))
    write_ramp(raw / "1.mp4", step=4, size=(64, 64))
    with pytest.raises(SlagenError, match="1.mp4 produced NaN or Inf when encoded"):
        prepare(model, raw, data)


@contextlib.contextmanager
def av_damaged(path):
    """The middle of a video's pictures is noise for a while."""
    content = path.read_bytes()
    start = content.index(b"mdat")
    middle = start + (len(content) - start) // 8
    path.write_bytes(content[:middle] + random.Random(0).randbytes(2000) + content[middle + 2000 :])
    yield
    path.write_bytes(content)


def test_data_of_another_negative_prompt(toy, tmp_path):
    import shutil

    model, data = toy
    other = tmp_path / "other"
    shutil.copytree(model, other)
    content = json.loads((other / "slagen.json").read_text())
    (other / "slagen.json").write_text(json.dumps({**content, "negative_prompt": "blurry"}))
    with pytest.raises(WeightsError, match="was prepared for another negative prompt"):
        finetune(settings(other, tmp_path / "out", data=data))


# The command


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


# Several processes


@pytest.fixture(scope="module")
def together(toy, tmp_path_factory):
    """What one process, two copies and two halves made of the same step."""
    model, data = toy
    folder = tmp_path_factory.mktemp("together")
    found = {}
    for kind in ("alone", "ddp", "fsdp", "context"):
        (folder / kind).mkdir()
        how = {"alone": ["auto", "1"], "context": ["fsdp", "2"]}.get(kind, [kind, "1"])
        size = 1 if kind == "alone" else 2
        said = run_together(train, [str(model), str(data), str(folder / kind), *how], folder / kind, size)
        assert said[0].splitlines()[-1].split()[:2] == [how[0].replace("auto", "alone"), str(size)]
        found[kind] = load_file(folder / kind / "kept.safetensors")
    return found


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "context"])
def test_two_processes_give_the_gradients_of_one(together, kind):
    one, two = together["alone"], together[kind]
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        if name.startswith("grad/"):
            assert (tensor - two[name]).norm() <= 1e-6 * max(1.0, tensor.norm().item()), name


@pytest.mark.parametrize("kind", ["alone", "ddp", "fsdp", "context"])
def test_checkpoints_go_on_in_every_team(together, kind):
    tensors = together[kind]
    for name, tensor in tensors.items():
        if name.startswith("weight/"):
            assert torch.equal(tensor, tensors[name.replace("weight/", "resumed/")]), name


def test_the_command_under_torchrun(toy, tmp_path):
    """One answer of two processes, and the error of one; the same in bf16, to its precision."""
    model, data = toy
    alone = finetune(settings(model, tmp_path / "alone", data=data, steps=2))
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src"), "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "slagen"]
    command = ["finetune", "--parallel", "fsdp", "--model", str(model), "--data", str(data), "--from-dense", "--json",
               "--sparsity", "0.6", "--block-m", "16", "--block-n", "16", "--steps", "2", "--validate-every", "1000",
               "--device", "cpu"]  # fmt: skip
    done = subprocess.run([*torchrun, *command, "--output", str(tmp_path / "two")], env=env, capture_output=True,
                          text=True, timeout=180)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["teacher_error_after"] == pytest.approx(alone.teacher_error_after, rel=1e-4)
    one, two = weights(tmp_path / "alone"), weights(tmp_path / "two")
    assert all(torch.allclose(one[name].float(), two[name].float(), atol=1e-3) for name in one)
    half = run_together(run, [[*command, "--dtype", "bf16", "--output", str(tmp_path / "half")]], tmp_path)
    first, second = (text.strip() for text in half)
    assert json.loads(first)["teacher_error_after"] == pytest.approx(alone.teacher_error_after, rel=0.05)
    assert second == ""


def test_the_1_3b_is_planned_to_fit_on_80_gb():
    """480p, 81 frames, one clip at a time: 32,760 tokens; the parts it is made of are counted, not measured."""
    from diffusers import WanTransformer3DModel

    from slagen.training.models import memory_plan
    from slagen.training.trainer import Recipe
    from slagen.wan.defaults import TrainingDefaults
    from slagen.wan.transformer import RANDOM_INIT, wan_config

    with torch.device("meta"):
        student = WanTransformer3DModel(**wan_config(RANDOM_INIT["wan-1.3b"]))
        teacher = WanTransformer3DModel(**wan_config(RANDOM_INIT["wan-1.3b"])).bfloat16()
    recipe = Recipe(TrainingDefaults(), "distill", 0.0, 0.01, None, "adamw", 0, torch.bfloat16)

    def gib(recipe=recipe, parts=1, recomputes=True):
        text = memory_plan(student, teacher, recipe, 32760, parts, recomputes)
        return float(text.split("estimated memory per process ")[1].split()[0])

    parameters = sum(p.numel() for p in student.parameters())
    assert (20 + 2) * parameters / 2**30 < gib() < 60  # 20 bytes a trained parameter, 2 a teacher's
    assert gib(recomputes=False) > 100 > gib(dataclasses.replace(recipe, optimizer="adamw8bit")) + 45
    assert gib(parts=8) < gib() - 15


def test_a_layers_error_is_its_own():
    """With every block kept and a zero projection there is none; with few blocks there is."""
    from wan_models import build_transformer

    from slagen.training.metrics import Example
    from slagen.wan.install import apply_sla

    teacher, student = build_transformer(), build_transformer()
    install(teacher, None)
    apply_sla(student, SLAConfig(sparsity=0.0, block_m=16, block_n=16))
    examples = [Example(torch.randn(4, 3, 8, 8), torch.randn(8, 32))]
    assert max(layer_errors(student, teacher, examples, [0.5])) < 1e-5
    remove_sla(student)
    apply_sla(student, SLAConfig(sparsity=0.9, block_m=16, block_n=16))
    assert min(layer_errors(student, teacher, examples, [0.5])) > 1e-3
