"""--cache: diffusers' caches skip blocks with the installed attention inside, and the report counts what ran."""

import dataclasses
import json

import pytest
import torch

from slagen.errors import UsageError
from slagen.generation import step_cache
from slagen.generation.config import GenerateConfig
from slagen.generation.peers import why_not
from slagen.generation.report import density_section, video_report
from slagen.generation.resolve import make_plan
from slagen.generation.session import Session
from slagen.generation.stage_clock import StageClock
from slagen.generation.video_report import FORM, VideoReport
from slagen.io import forms
from slagen.wan.caches import read_cache

SMALL = {"model": "tiny-wan", "device": "cpu", "width": 64, "height": 64, "num_frames": 5, "steps": 4, "seed": 1}
RATIOS = "mag:threshold=9,ratios=1/0.99"
SKIPPED = {  # of 4 steps with 2 passes of 6 blocks each
    "first-block:threshold=0": [0, 0, 0, 0],
    "first-block:threshold=100": [0, 10, 10, 10],
    "sea:threshold=100": [0, 12, 12, 0],
    "taylorseer:disable_cache_before_step=2": [0, 0, 12, 0],
    RATIOS: [0, 12, 12, 12],
    "mag:calibrate=1": [0, 0, 0, 0],
}


@pytest.fixture(scope="module")
def made():
    """A session with SLA, its plan and embeddings, and a video without a cache."""
    plan = make_plan(GenerateConfig("a red circle moving right", guidance_scale=3.0, **SMALL))
    session = Session(plan)
    embeds = session.encode(plan)
    return session, plan, embeds, session.sample(plan, embeds, StageClock(), lambda event: None)


def report_of(sample):
    return video_report(sample, None, latents_hash="0" * 64, frames_hash="0" * 64)


@pytest.mark.parametrize("cache", SKIPPED)
def test_what_a_cache_skips_is_counted(made, cache):
    session, plan, embeds, plain = made
    cached = dataclasses.replace(plan, config=dataclasses.replace(plan.config, cache=cache))
    said = []
    sample = session.sample(cached, embeds, StageClock(), said.append)
    again, _ = session.denoise(cached, embeds, said.append)
    assert torch.equal(sample.latents, again), "it remembers the clip before"
    report, whole = report_of(sample), report_of(plain)
    assert report.cache.skipped_by_step == SKIPPED[cache]
    assert (report.cache.blocks, report.cache.skipped) == (48, sum(SKIPPED[cache]))
    assert torch.equal(sample.latents, plain.latents) == (not report.cache.skipped)
    share = 1 - report.cache.skipped / 48
    for name in ("attention_tflop", "other_tflop"):
        assert getattr(report.cost, name) == pytest.approx(share * getattr(whole.cost, name))
    assert report.cost.flops_speedup == pytest.approx(whole.cost.flops_speedup / share)
    assert [len(step.layers_ms) for step in report.steps] == [6] * 4 and len(report.layers) == 6
    for step, skipped in zip(report.steps, SKIPPED[cache], strict=True):
        assert sum(ms == 0 for ms in step.layers_ms) == skipped // 2
        assert (step.attention_ms == 0) == (skipped == 12) and step.attention_share is not None
    assert any(f"skipped {report.cache.skipped} of 48 blocks" in event.text for event in said)
    content = json.loads(json.dumps(report.to_dict()))
    forms.check(content, FORM)
    assert VideoReport.from_dict(content).cache == report.cache and "cache" not in whole.to_dict()
    assert content["settings"]["cache"] == read_cache(cache).text


def test_a_report_hands_ratios_to_the_next_run(made, tmp_path):
    session, plan, embeds, _ = made
    measuring = dataclasses.replace(plan, config=dataclasses.replace(plan.config, cache="mag:calibrate=1"))
    report = report_of(session.sample(measuring, embeds, StageClock(), lambda event: None))
    assert len(report.cache.ratios) == 4 and report.cache.ratios[0] == 1
    path = tmp_path / "report.json"
    path.write_text(json.dumps(report.to_dict()))
    assert read_cache(f"mag:ratios={path}").ratios == pytest.approx(report.cache.ratios)
    text = GenerateConfig("x", cache=f"MagCache:Threshold=0.1,ratios={path}").cache
    assert text.startswith("mag:threshold=0.1,ratios=1/") and read_cache(text).text == text
    path.write_text("{}")
    with pytest.raises(UsageError, match='it has no "cache".+mag:calibrate=1'):
        read_cache(f"mag:ratios={path}")


@pytest.mark.parametrize(
    "settings",
    [{}, {"dense_steps": "0-1", "dense_layers": "2"}, {"sparsity_schedule": "0:0.5", "dense_steps": "3"},
     {"sparsity_schedule": "0-:0.8/0.8/0.5/0.5/0.8/0.8"}],
    ids=["plain", "dense", "steps", "layers"],
)  # fmt: skip
def test_where_nothing_is_skipped_the_numbers_are_the_same(made, settings):
    """Those of attention that is counted in its passes, and those that are planned."""
    _, plan, _, _ = made
    settings = {"sparsity_schedule": None, "sparsity": 0.8} | settings
    plan = make_plan(dataclasses.replace(plan.config, **settings), plan.weights)
    ran = [[2] * 6] * 4
    for densities in ((), (0.5, 0.5, 0.5, 0.5, 0.5, 0.5)):
        flops = step_cache.attention_flops(plan, densities, ran)
        assert flops == pytest.approx(8 * plan.attention_flops(densities), rel=1e-6)
        whole, counted = density_section(densities, plan.dense), step_cache.density_section(plan, densities, ran)
        assert counted.keys() == whole.keys()
        for name, value in whole.items():
            assert counted[name] == pytest.approx(value)


def test_densities_are_of_the_passes_that_ran(made):
    """A layer that ran dense in one pass of three, one that never ran, and one that was dense whenever it ran."""
    _, plan, _, _ = made
    plan = make_plan(dataclasses.replace(plan.config, dense_steps="0"), plan.weights)
    ran = [[1, 0, 1, 0, 0, 0], [2, 0, 0, 0, 0, 0], [0] * 6, [0] * 6]
    found = step_cache.density_section(plan, [0.4, 0.4, None, None, None, None], ran)
    assert found["layer_densities"] == [pytest.approx((1 + 2 * 0.4) / 3), None, 1.0, None, None, None]
    assert found["density"] == pytest.approx((1 + 2 * 0.4 + 1) / 4)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("third-block", "must be one of first-block, mag, sea, taylorseer"),
        ("PyramidAttentionBroadcast", "one after the other, so that each would get the other's"),
        ("FasterCache:weight=1", "needs both guidance passes in one batch"),
        ("teacache", "TeaCache is not in diffusers"),
        ("first-block:treshold=1", "first-block takes threshold. Try --cache first-block:threshold=0.05"),
        ("first-block:threshold", "first-block takes threshold"),
        ("first-block:threshold=1,threshold=2", "threshold is there twice"),
        ("first-block:threshold=much", "must be a number from 0 to"),
        ("taylorseer:cache_interval=2.5", "must be a whole number from 1 to 1000"),
        ("sea:residual-order=2", "must be a whole number from 0 to 1"),
        ("mag", "mag needs its ratios"),
        ("mag:ratios=1/x", "numbers with slashes between them"),
    ],
)
def test_what_is_no_cache_is_refused(text, words):
    with pytest.raises(UsageError) as told:
        GenerateConfig("x", cache=text)
    assert words in str(told.value) and "\n" not in str(told.value)


@pytest.mark.parametrize(
    "settings", [{"compile": True}, {"measure_dense": 1}, {"attention": "rettention"}], ids=["compile", "dense", "kept"]
)
def test_what_cannot_skip_blocks_is_refused(settings):
    with pytest.raises(UsageError, match="--cache"):
        GenerateConfig("x", cache="first-block", **settings)
    assert "--cache first-block" in why_not("teacache_thresh") and "taylorseer" in why_not("feature_caching")
