"""SLA2 in a model: tuned in stages, written, described and run."""

import dataclasses

import numpy as np
import pytest
import torch
from finetune_runs import settings, steps_of, weights

from slagen.attention.sla2.config import SLA2Config
from slagen.cli.output.generate import show_report
from slagen.errors import UsageError, WeightsError
from slagen.formats.sla import read_sla
from slagen.generation.config import GenerateConfig
from slagen.generation.estimate import plan
from slagen.generation.generate import generate
from slagen.training import loop
from slagen.training.finetune import finetune
from slagen.wan.info import info

pytest_plugins = ["finetune_fixtures"]
pytestmark = pytest.mark.usefixtures("plain_pictures_in_module")
STAGES = {"stages": "router,all", "router_steps": 2, "steps": 4}


def tune(model, output, data, **fields):
    own = {"attention": "sla2", "sparsity": 0.6, "block_m": 16, "block_n": 16, "lr": 1e-3, "warmup_steps": 0}
    return finetune(settings(model, output, data=data, **{**own, **fields}))


def video(model, folder, **fields):
    return GenerateConfig(
        "a red circle", model=str(model), width=64, height=64, num_frames=9, steps=1, seed=1, device="cpu",
        **{"attention": "sla2", "output": str(folder / "a.mp4"), "overwrite": True, **fields},
    )  # fmt: skip


@pytest.fixture(scope="module")
def tuned(toy, plain_pictures_in_module, tmp_path_factory):
    """The model, its data, and the folder of a training in two stages."""
    model, data = toy
    folder = tmp_path_factory.mktemp("sla2") / "out"
    tune(model, folder, data, **STAGES, save_every=2)
    return model, data, folder


def parts(tensors, name):
    return [x for key, x in tensors.items() if f".processor.{name}." in key]


def test_the_file_has_router_and_mix(tuned):
    _, _, folder = tuned
    metadata, tensors = read_sla(folder)
    assert metadata.method == "sla2" and metadata.config == SLA2Config(0.6, block_m=16, block_n=16)
    for name in ("router_q", "router_k"):
        assert all(x.shape == (16, 16) and not torch.equal(x, torch.eye(16)) for x in parts(tensors, name))
    assert all(x.shape[1] == 1 and x.std() + (x - np.log(9)).abs().max() > 0 for x in parts(tensors, "mix"))
    about = info(str(folder)).to_dict()
    assert set(about["parameter_norms"]) == {"router_q", "router_k", "mix"}
    errors = [step.error for step in steps_of(folder)]
    assert len(errors) == 4 and all(0 < error < 2 for error in errors)


def test_each_stage_trains_its_own(toy, tmp_path):
    """The stage router leaves the model as it is; without it, the router stays the identity."""
    model, data = toy
    tune(model, tmp_path / "router", data, stages="router", steps=2)
    _, alone = read_sla(tmp_path / "router")
    assert all(".processor." in name for name in alone)
    assert not torch.equal(parts(alone, "router_q")[0], torch.eye(16))
    tune(model, tmp_path / "all", data, steps=2)
    _, whole = read_sla(tmp_path / "all")
    assert len(whole) > len(alone)
    for name in ("router_q", "router_k"):
        assert all(torch.equal(x, torch.eye(16)) for x in parts(whole, name))
    assert all((x != x.new_tensor(np.log(9))).any() for x in parts(whole, "mix"))
    tune(model, tmp_path / "next", data, steps=1, from_dense=False, weights=str(tmp_path / "router"))
    _, then = read_sla(tmp_path / "next")
    for a, b in zip(parts(then, "router_q"), parts(alone, "router_q"), strict=True):
        assert torch.equal(a, b)  # the router is frozen again


def test_it_resumes_in_either_stage(tuned, tmp_path, monkeypatch):
    """Stopped after step 1 and again after step 3, with the same weights at the end."""
    model, data, folder = tuned
    real, stops = loop._log_step, {1, 3}

    def stop(run, step, *others):
        real(run, step, *others)
        if step in stops:
            stops.remove(step)
            run.stop.set()

    monkeypatch.setattr(loop, "_log_step", stop)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            tune(model, tmp_path / "out", data, **STAGES, save_every=2)
    with pytest.raises(UsageError, match="router_steps was 2 and is now 3"):
        tune(model, tmp_path / "out", data, **{**STAGES, "router_steps": 3})
    tune(model, tmp_path / "out", data, **STAGES, save_every=2)
    before, after = weights(folder), weights(tmp_path / "out")
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())


def test_generate_and_plan_run_it(tuned, tmp_path, capsys):
    model, _, folder = tuned
    config = video(model, tmp_path, weights=str(folder))
    made = generate(config).videos[0]
    report = made.report
    show_report(made.record)
    assert (
        "3 key blocks of 16 tokens: 1 critical (33.3%), 2 marginal, 0 negligible; torch backend"
        in capsys.readouterr().err
    )
    assert report["attention"]["mode"] == "sla2" and report["attention"]["critical"] < report["attention"]["key_blocks"]
    assert report["weights"]["used"] == "sla2 attention"
    hashes = {report["latents_hash"]}
    for options in ((("mixing", "mass"),), (("smooth_keys", False),)):
        made = generate(dataclasses.replace(config, attention_options=options)).videos[0].report
        hashes.add(made["latents_hash"])
    assert len(hashes) == 3
    content = plan(dataclasses.replace(config, output="outputs"))
    assert content.to_dict()
    with pytest.raises(WeightsError, match="has no sla2 weights"):
        generate(video(model, tmp_path))
    with pytest.raises(UsageError, match="sla attention does not use sla2 attention weights"):
        generate(video(model, tmp_path, attention="sla", weights=str(folder)))
    with pytest.raises(WeightsError, match="mix.logit"):
        generate(dataclasses.replace(config, attention_options=(("mixing_blocks", 3),)))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"attention": "sla", "stages": "router"}, "sla attention has no router to train. Leave --stages out."),
        (
            {"stages": "router", "router_steps": 3},
            "--router-steps is for --stages router,all, but --stages is router. Leave",
        ),
        ({"stages": "router,all", "router_steps": 0}, "router_steps is 0, but must be a whole number from 1 to"),
        ({"stages": "all,router"}, "stages is 'all,router', but must be one of all, router,all, router."),
        ({"stages": "router", "backend": "triton"}, "the router stage has no Triton kernels. Leave --backend out"),
        ({"attention_options": (("router_tau", 10**400),)}, "but must be a finite number above 0."),
        ({"attention_options": (("router_tau", 0),)}, "router_tau is 0, but must be a finite number above 0."),
    ],
)
def test_what_cannot_be_tuned(fields, said):
    with pytest.raises(UsageError) as error:
        settings("m", "o", data="d", **{"attention": "sla2", **fields})
    assert said in str(error.value)


@pytest.mark.parametrize("fields", [{"stages": "router"}, {"stages": "router,all"}, {"train": "proj"}])
def test_a_start_with_all_blocks_kept_is_refused(fields, toy, tmp_path):
    """The linear branch and the router are not reached then; with the whole model to train, there is what learns."""
    model, data = toy
    with pytest.raises(UsageError, match="all key blocks of a clip get exact attention at first"):
        tune(model, tmp_path / "out", data, steps=2, anneal_from=0.0, **fields)
    tune(model, tmp_path / "out", data, steps=1, anneal_from=0.4, **fields)


def test_a_start_with_all_blocks_kept_trains_the_whole_model(toy, tmp_path):
    model, data = toy
    tune(model, tmp_path / "out", data, steps=2, anneal_from=0.0)
    assert len(weights(tmp_path / "out")) > 0
