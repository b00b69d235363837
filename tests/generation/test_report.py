"""Costs and times in the report, against numbers worked out elsewhere."""

import itertools
import json
from types import SimpleNamespace

import pytest
import torch

from slagen import timing
from slagen.attention.cost import ModelShape, dense_attention_flops, other_flops
from slagen.attention.sla.config import SLAConfig
from slagen.attention.sla.cost import block_counts, sla_attention_flops
from slagen.attention.sla.functional import sparse_linear_attention
from slagen.generation.report import (
    cost_section,
    layer_section,
    step_section,
    timing_section,
)
from slagen.generation.report_page import PARTS, _split
from slagen.generation.video_report import FORM, ReportedStep, VideoReport
from slagen.io import forms
from slagen.io.files import write_json
from slagen.timing import SpanClock, StepRecorder, StepTimes

WAN_1_3B = ModelShape(num_layers=30, num_heads=12, head_dim=128, ffn_dim=8960, text_tokens=512)


def test_flops_of_wan_1_3b_at_480p():
    """197.8 TFLOP of dense attention in a forward of 283.0, counted by PyTorch's FlopCounterMode on meta tensors."""
    dense, other = dense_attention_flops(WAN_1_3B, 32760), other_flops(WAN_1_3B, 32760)
    assert dense / 1e12 == pytest.approx(197.8, abs=0.05)
    assert (dense + other) / 1e12 == pytest.approx(283.0, abs=0.1)


def test_sla_flops_and_amdahl():
    config = SLAConfig(sparsity=0.95)
    assert block_counts(config, 32760) == {
        "query_blocks": 512, "key_blocks": 512, "critical": 25, "negligible": 0, "marginal": 487,
    }  # fmt: skip
    flops = sla_attention_flops(WAN_1_3B, 32760, config)
    assert flops / 1e12 == pytest.approx(10.8, abs=0.1)
    cost = cost_section(WAN_1_3B, 32760, 100, flops, [])
    assert cost.amdahl_ceiling == pytest.approx(3.32, abs=0.01)
    assert cost.flops_speedup == pytest.approx(2.95, abs=0.02)
    assert cost.dense_attention_tflop == pytest.approx(19780, rel=1e-3)
    assert cost.achieved_share_of_ceiling == pytest.approx(2.95 / 3.32, abs=0.01)
    assert cost.measured_attention_share is None and cost.remaining_time_ceiling is None


@pytest.mark.parametrize("domain", ["all", "marginal"])
def test_branches_cost_less_than_both(domain):
    config = SLAConfig(linear_domain=domain)
    both = sla_attention_flops(WAN_1_3B, 32760, config)
    sparse = sla_attention_flops(WAN_1_3B, 32760, config, linear=False)
    linear = sla_attention_flops(WAN_1_3B, 32760, config, sparse=False)
    assert max(sparse, linear) < both
    # Over all tokens the linear branch needs no block map; over the marginal ones both need the same.
    assert both == sparse + linear if domain == "all" else both < sparse + linear


@pytest.fixture
def clock(monkeypatch):
    """The seconds that `time.perf_counter` tells."""
    told = SimpleNamespace(now=0.0)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: told.now)
    return told


def test_the_recorder_adds_up(clock):
    recorder = StepRecorder("cpu", "layer")
    recorder.begin_step()
    for _ in range(2):
        recorder.begin_pass()
        for layer in range(3):
            with recorder.attention(layer):
                clock.now += 0.002
            clock.now += 0.001
    step = recorder.end_step(999.0)
    assert step.attention_ms == pytest.approx([6.0, 6.0]) and step.latency_ms == pytest.approx(18.0)
    assert step.layers_ms == pytest.approx([4.0, 4.0, 4.0]) and step.num_spans == 6
    row = step_section([step])[0]
    assert row.attention_conditional_ms + row.attention_unconditional_ms == pytest.approx(row.attention_ms)
    assert [row.layer for row in layer_section(recorder.steps)] == [0, 1, 2]


@pytest.mark.parametrize(("level", "layers", "timed"), [("step", 0, True), ("off", 0, False)])
def test_coarser_timing(level, layers, timed):
    recorder = StepRecorder("cpu", level)
    recorder.begin_step()
    recorder.begin_pass()
    with recorder.attention(0):
        pass
    step = recorder.end_step(1.0)
    assert len(step.layers_ms) == layers
    assert (step.latency_ms is not None) == timed and (step.attention_share is not None) == timed
    assert step_section([step])[0].timestep == 1.0
    assert layer_section([step]) == []
    assert (timing_section(level, [step], 0.001).spans > 0) == timed


def test_parts_of_attention_add_up(clock):
    """Over layers and passes; what runs with dense attention beside it counts for none of them."""
    recorder = StepRecorder("cpu", "part")
    recorder.begin_step()
    for _ in range(2):
        recorder.begin_pass()
        for layer in range(3):
            with recorder.attention(layer):
                with timing.part("block_map"):
                    clock.now += 0.002
                with timing.part("sparse"):
                    clock.now += 0.003
                clock.now += 0.001
        with recorder.dense_pass(), recorder.attention(0), timing.part("sparse"):
            clock.now += 1.0
    with timing.part("sparse"):
        clock.now += 1.0
    step = recorder.end_step(999.0)
    assert step.parts_ms == {"block_map": pytest.approx(12), "sparse": pytest.approx(18)}
    assert step.attention_ms == pytest.approx([18.0, 18.0]) and step.layers_ms == pytest.approx([12.0] * 3)
    assert step.num_spans == 18 and step.dense.dense_attention_ms == pytest.approx(2000)
    row = step_section([step])[0]
    assert row.parts_ms == step.parts_ms and _split(row)[0] == ("block_map", row.parts_ms["block_map"])
    assert dict(_split(row))["inside"] == pytest.approx(6) and dict(_split(row))["rest"] == pytest.approx(1000)


@pytest.mark.parametrize("domain", ["all", "marginal"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_sla_says_what_its_parts_are(backend, domain):
    q, k, v, weight = *torch.randn(3, 1, 1, 40, 16), torch.randn(16, 16)
    config = SLAConfig(sparsity=0.5, block_m=16, block_n=16, linear_domain=domain)
    recorder = StepRecorder("cpu", "part")
    recorder.begin_step()
    recorder.begin_pass()
    with recorder.attention(0):
        o = sparse_linear_attention(q, k, v, config, weight, backend=backend)
    found = recorder.end_step(1.0)
    attends = {"torch": {"sparse", "linear"}, "triton": {"fused"}}[backend]
    assert set(found.parts_ms) == {"block_map", "state", "projection", *attends} == set(found.parts_ms) & set(PARTS)
    assert 0 < sum(found.parts_ms.values()) <= sum(found.attention_ms)
    assert torch.equal(o, sparse_linear_attention(q, k, v, config, weight, backend=backend))


def test_the_cost_of_a_span_is_two_looks_at_the_clock(monkeypatch):
    """And those around all spans, which count among so many for nothing."""
    looks = itertools.count()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(looks) * 1e-6)
    assert SpanClock("cpu").cost_ms() == pytest.approx(0.002, rel=1e-3)


def test_overhead_is_spans_times_their_cost():
    step = StepTimes(0, 1.0, latency_ms=100.0, attention_ms=[10.0], num_spans=9)
    assert timing_section("layer", [step], 0.1).overhead_share == pytest.approx(10 * 0.1 / 100)


def test_json_is_written_whole(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_report_is_read_as_it_was_written(report_of_a_video):
    """Names, order and values; a file that lacks one is refused before that."""
    content = report_of_a_video
    forms.check(content, FORM)
    read = VideoReport.from_dict(content)
    assert json.dumps(read.to_dict()) == json.dumps(content)
    assert read.attention.blocks.critical == content["attention"]["critical"]
    for name in content:
        with pytest.raises(forms.Fault, match=f'has no "{name}"'):
            forms.check({key: value for key, value in content.items() if key != name}, FORM)


@pytest.fixture
def report_of_a_video():
    """As `generate` wrote one, on a card, with SLA weights of their own."""
    block = {"query_blocks": 3, "key_blocks": 3, "critical": 1, "negligible": 0, "marginal": 2}
    step = ReportedStep(0, 999.0, 10.5, 3.0, 2.0, 1.0, 0.3)
    return {
        "schema_version": 1, "created": "2026-11-30T00:00:00+00:00",
        "video": {"file": "a.mp4", "frames": 9, "width": 64, "height": 48, "fps": 8, "duration_s": 1.125,
                  "frames_hash": "f" * 64, "sha256": "a" * 64},
        "settings": {"prompt": "a circle", "model": "toy", "vae": None, "sparsity": 0.5, "size": "64x48",
                     "num_frames": 9, "fps": 8, "seed": 3},
        "versions": {"torch": "2.11"},
        "device": {"type": "cuda", "name": "card", "memory_gib": 80.0, "capability": "9.0", "cuda": None, "cpu": "c",
                   "cores": None, "threads": 1, "platform": "Linux"},
        "weights": {"model": "toy", "model_file": None, "model_hash": "m" * 64, "sla_file": "sla.safetensors",
                    "sla_hash": "b" * 64, "used": "SLA", "trained": "all", "trained_steps": 2,
                    "trained_sparsity": 0.5},
        "latents_hash": "1" * 64,
        "attention": {"mode": "sla", "tokens": 192, "sparsity": 0.5, "block_n": 64, **block,
                      "fractions": {"critical": 1 / 3}, "backend": "triton"},
        "stages_s": {"load": 1, "total": 1.5}, "since_process_start_s": 3.5, "peak_memory_gib": 1.0,
        "steps": [step.to_dict()], "layers": [{"layer": 0, "attention_ms": 3.0}],
        "cost": vars(cost_section(WAN_1_3B, 192, 1, 10**9, [])),
        "timing": vars(timing_section("layer", [], 0.1)),
    }  # fmt: skip
