"""A training that is stopped, killed or faulty resumes where it was; with other settings it is refused."""

import contextlib
import dataclasses
import functools
import json
import os
import random
import signal
import threading
from pathlib import Path

import pytest
import torch
from conftest import needs
from finetune_runs import PROMPTS, settings, steps_of, validations_of, weights
from processes import start
from safetensors.torch import load_file

from slagen.cli.main import run
from slagen.errors import SlagenError, UsageError
from slagen.interrupts import stopping
from slagen.training import comparison, trainer
from slagen.training.checkpoints import read_latest
from slagen.training.data import prepare as preparing
from slagen.training.finetune import finetune
from slagen.training.log import StepRecord, read_log
from slagen.training.trainer import Trainer

pytest_plugins = ["finetune_fixtures"]
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("plain_pictures")]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_going_on_ends_where_one_run_ends(toy, tmp_path, optimizer):
    """N steps are k, an end, and N - k, bit for bit; so are the log and the error."""
    model, data = toy
    whole = finetune(settings(model, tmp_path / "whole", data=data, steps=8, optimizer=optimizer))
    for output, stop in (("parts", 3), ("parts", 5), ("parts", None)):
        told = []

        def end(event, stop=stop, told=told):
            told.append(event)
            maps = Path("/proc/self/maps")  # a checkpoint that is mapped takes room when it is gone
            if isinstance(event, StepRecord) and maps.exists():
                assert "state.safetensors" not in maps.read_text()
            if isinstance(event, StepRecord) and event.step == stop:
                os.kill(os.getpid(), signal.SIGTERM)

        config = settings(model, tmp_path / output, data=data, steps=8, optimizer=optimizer)
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
    again = finetune(settings(model, tmp_path / "parts", data=data, steps=8, optimizer=optimizer))
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
    process = begin("killed")
    process.join(300)
    assert process.exitcode == 0, (tmp_path / "killed.json.err").read_text()
    killed = json.loads((tmp_path / "killed.json").read_text())
    whole = finetune(settings(model, tmp_path / "whole", data=data, steps=steps, save_every=2))
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert whole.teacher_error_after == killed["teacher_error_after"]
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
    with pytest.raises(SlagenError, match="the gradient norm of step 3 is nan"):
        finetune(config)
    assert read_latest(tmp_path / "out").state.step == 2
    finetune(config)
    whole = finetune(dataclasses.replace(config, output=str(tmp_path / "whole")))
    one, other = weights(tmp_path / "out"), weights(whole.output)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_loss_that_is_not_finite_stops(toy, tmp_path):
    model, data = toy
    config = settings(model, tmp_path / "out", data=data, steps=8, lr=1e30, save_every=1)
    with pytest.raises(SlagenError, match=r"the loss of step \d is (nan|inf) \(clips: 'a.*the last checkpoint"):
        finetune(config)
    latest = read_latest(tmp_path / "out")
    assert latest.state.step >= 1 and load_file(latest.path / "state.safetensors")


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
    with pytest.raises(UsageError, match="must be at most the final sparsity, 0.6"):
        finetune(settings(model, tmp_path / "no", data=data, anneal_from=0.8))


def test_told_to_stop_in_a_validation(toy, tmp_path, monkeypatch):
    """It ends without the clip and without another step, and the validation is made when it goes on."""
    model, data = toy
    config = settings(model, tmp_path / "out", data=data, steps=4, validate_every=2)
    sample, asked = comparison.sample, []

    def signalled(run, *arguments):
        if run.trainer.optimizers[0].state and not asked:
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
