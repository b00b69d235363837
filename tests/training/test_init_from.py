"""`slagen finetune --init-from mean`: proj_l begins where SLA comes nearest to what `mean` gives."""

import os
import signal

import pytest
import torch
import torch.nn.functional as F
from finetune_runs import settings, weights

from slagen.attention.mean.functional import block_mean_attention
from slagen.attention.protocol import Grid, Layer
from slagen.attention.sla.config import SLAConfig
from slagen.attention.sla.functional import sparse_linear_attention
from slagen.attention.sla.layer import SLA
from slagen.errors import UsageError
from slagen.events import Event
from slagen.training import finetune as task
from slagen.training.checkpoints import read_latest
from slagen.training.finetune import finetune
from slagen.training.init_from import RIDGE, Fit, add_layer, mean_of
from slagen.training.log import StepRecord
from slagen.training.models import build_models
from slagen.training.setup import Setup

pytest_plugins = ["finetune_fixtures"]


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_fit_is_the_ridge_regression():
    """As least squares of the same rows with those of the penalty below them; in parts or at once."""
    x, y = drawn(2, 50, 6), drawn(2, 50, 6, seed=1)
    fit = Fit(6, torch.device("cpu"))
    for part in (slice(0, 20), slice(20, 50)):
        fit.add(x[:, part], y[:, part], y[:, part] + 1)
    rows, targets = F.pad(x.flatten(0, 1), (0, 1), value=1.0), y.flatten(0, 1)
    penalty = torch.zeros(6, 7, dtype=torch.float64)
    penalty.diagonal().fill_((RIDGE * x.square().sum((0, 1)).mean()) ** 0.5)
    expected = torch.linalg.lstsq(
        torch.cat([rows, penalty]), torch.cat([targets, torch.zeros(6, 6, dtype=torch.float64)])
    ).solution
    weight, bias = fit.solve()
    torch.testing.assert_close(torch.cat([weight.mT, bias[None]]), expected)
    left = (targets - F.linear(x.flatten(0, 1), weight, bias)).norm()
    scale = (targets + 1).norm()
    assert fit.errors(weight, bias) == pytest.approx((float(targets.norm() / scale), float(left / scale)))


def test_an_output_that_a_projection_gives_is_found():
    x, weight, bias = drawn(1, 400, 5), drawn(5, 5, seed=2), drawn(5, seed=3)
    fit = Fit(5, torch.device("cpu"))
    y = F.linear(x, weight, bias)
    fit.add(x, y, y)
    found = fit.solve()
    torch.testing.assert_close(found[0], weight, rtol=0.01, atol=0.01)
    torch.testing.assert_close(found[1], bias, rtol=0.01, atol=0.01)
    assert fit.errors(*found)[1] < 0.01 < fit.errors(*found)[0] <= 1


@pytest.mark.parametrize("order", ["raster", "cube"])
@pytest.mark.parametrize("domain", ["all", "marginal"])
def test_a_layer_comes_as_near_as_it_can(order, domain):
    """With the fitted weights, SLA's own output is at the error that the sums foretell, below that of proj_l zero."""
    grid, config = Grid(2, 8, 8), SLAConfig(0.6, block_m=16, block_n=16, order=order, linear_domain=domain)
    layer = SLA(Layer(0, 1, 2, 16), config, "torch", "both", None)
    q, k, v = (drawn(1, 2, 128, 16, seed=seed).float() for seed in range(3))
    fit = Fit(16, torch.device("cpu"))
    add_layer(fit, layer, config, q, k, v, grid)
    target = block_mean_attention(q, k, v, mean_of(config), grid=grid).double()
    weight, bias = fit.solve()
    errors = [
        float((sparse_linear_attention(q, k, v, config, w, b, grid=grid).double() - target).norm() / target.norm())
        for w, b in ((torch.zeros(16, 16), torch.zeros(16)), (weight.float(), bias.float()))
    ]
    assert fit.errors(weight, bias) == pytest.approx(errors, rel=1e-4) and errors[1] < errors[0]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"from_dense": False}, "init_from replaces trained SLA weights"),
        ({"attention": "mean"}, "which mean attention does not have. Leave --init-from out"),
        ({"attention": "sparse"}, "which sparse attention does not have"),
        ({"attention": "sla2"}, "which sla2 attention does not have"),
        ({"attention": "dense", "loss": "flow", "sparsity": None, "block_m": None, "block_n": None}, "dense attention"),
        ({"init_from": "sol"}, "init_from is 'sol', but must be mean. Try --init-from mean."),
        ({"context_parallel": 2}, "runs in a single process only. Start slagen without torchrun."),
    ],
)
def test_where_it_has_no_meaning_it_is_refused(fields, said):
    with pytest.raises(UsageError, match=said):
        settings("toy", "out", data="data", **{"init_from": "mean", **fields})


def ended(config, stop=None):
    """Run a training, or until a step, and return its result and the notes."""
    notes = []

    def hear(event):
        if isinstance(event, Event) and event.kind == "note":
            notes.append(event.text)
        if isinstance(event, StepRecord) and event.step == stop:
            os.kill(os.getpid(), signal.SIGTERM)

    if stop is None:
        return finetune(config, hear), notes
    with pytest.raises(KeyboardInterrupt):
        finetune(config, hear)
    return None, notes


@pytest.mark.slow
@pytest.mark.usefixtures("plain_pictures")
def test_a_training_begins_there_and_resumes(toy, tmp_path, monkeypatch):
    """proj_l before the first step is no longer zero, and alike in every start; a run that goes on is not fitted anew,
    and ends where one run ends; without the option it is refused."""
    model, data = toy
    started = []

    def build(setup: Setup):
        started.append(build_models(setup))
        return started[-1]

    def fitted(*arguments):
        fit(*arguments)
        fits.append([block.attn1.processor.proj_l.weight.clone() for block in started[-1].student.blocks])

    fit, fits = task.fit_to_mean, []
    monkeypatch.setattr(task, "build_models", build)
    monkeypatch.setattr(task, "fit_to_mean", fitted)
    fields = {"data": data, "steps": 4, "init_from": "mean"}
    whole, notes = ended(settings(model, tmp_path / "whole", **fields))
    assert any("proj_l starts from a fit to the method mean on" in note for note in notes)
    ended(settings(model, tmp_path / "parts", **fields), stop=2)
    assert read_latest(tmp_path / "parts").state.step == 2
    assert len(fits) == 2 and all(map(torch.equal, *fits)) and all(weight.any() for weight in fits[0])
    with pytest.raises(UsageError, match="init_from was 'mean' and is now None"):
        finetune(settings(model, tmp_path / "parts", data=data, steps=4))
    result, notes = ended(settings(model, tmp_path / "parts", **fields))
    assert len(fits) == 2 and not any("fitted" in note for note in notes)
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert result.teacher_error_before == whole.teacher_error_before
    plain = finetune(settings(model, tmp_path / "plain", data=data, steps=1))
    assert plain.teacher_error_before != whole.teacher_error_before
