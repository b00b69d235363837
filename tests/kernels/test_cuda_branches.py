"""What only a card reaches, run without one: clocks, memory, devices, processes, errors.

`cuda_branches.py` lists every such place with its test, and says how to add one. The kernels' own are in
test_cuda_kernels.py, those of scripts/gpu.py in test_gpu_script.py.
"""

import dataclasses
import json
import math
from types import SimpleNamespace

import cuda_branches
import pytest
import torch
import torch.distributed as dist
from fake_cuda import CARD, FakeCard, fake_card

from slagen import machine, timing
from slagen.attention.dense.kernels import dense_kernel
from slagen.attention.protocol import Unavailable
from slagen.benchmark import clock, loop, methods, operator, other_libraries
from slagen.benchmark import run as bench
from slagen.benchmark.config import BenchConfig
from slagen.benchmark.registry import all_methods
from slagen.benchmark.rows import BenchMachine, BenchRow
from slagen.benchmark.tables import BenchResult
from slagen.cli.main import run
from slagen.device import Device
from slagen.doctor import checks as doctor
from slagen.doctor import selftest
from slagen.errors import EnvironmentProblem, SlagenError, UsageError
from slagen.generation import decode, generate, memory, resolve, session
from slagen.generation.config import GenerateConfig
from slagen.training import distributed as parallel
from slagen.training import finetune, setup
from slagen.training.config import FinetuneConfig
from slagen.training.models import recomputes
from slagen.wan import loading, models, processor
from slagen.wan.defaults import ModelDefaults
from slagen.wan.folder import BUNDLED
from slagen.wan.presets import CUDA_DEFAULT, PRESETS

if torch.cuda.is_available():
    pytest.skip("needs a machine without CUDA, where a fake takes its place", allow_module_level=True)

CPU = torch.device("cpu")
GPU = torch.device("cuda")
MACHINE = BenchMachine(
    Device(type="cuda", name="card", cpu="c", cores=1, threads=1, platform="p"), {}, 1.0, 1.0, "2026-11-30"
)


@pytest.fixture
def card(monkeypatch) -> FakeCard:
    return fake_card(monkeypatch)


# The list


def test_every_place_has_a_test():
    found = {(where, text) for where, text in cuda_branches.places()}
    listed = {
        (where, text) for where, tests in cuda_branches.BRANCHES.items() for texts in tests.values() for text in texts
    }
    missing = "".join(f"\n{where}: {text}" for where, text in sorted(found - listed))
    gone = "".join(f"\n{where}: {text}" for where, text in sorted(listed - found))
    assert not missing, f"write a test for each of these and name it in cuda_branches.py:{missing}"
    assert not gone, f"cuda_branches.py lists what the code no longer has:{gone}"


def test_every_named_test_is_there():
    for tests in cuda_branches.BRANCHES.values():
        for test in tests:
            file, name = test.split("::") if "::" in test else ("test_cuda_branches.py", test)
            (path,) = (cuda_branches.ROOT / "tests").rglob(file)
            text = path.read_text()
            assert f"\ndef {name}(" in text, f"{file} has no {name}"


@pytest.mark.parametrize(
    "line",
    [
        "if x.is_cuda: y()",
        "if device.type == 'cuda': y()",
        "z = 1 if q.device.type != 'cpu' else 2",
        "torch.cuda.synchronize()",
        "kind.startswith('cuda')",
        "getattr(torch, 'cuda')",
        "x = x.cuda()",
        "try: f()\nexcept torch.OutOfMemoryError: y()",
        "start('nccl')",
        "n = driver.get_device_properties(0)",
    ],
)
def test_the_list_sees(line):
    """What is a place, and what only looks like one."""
    body = "\n".join(f"    {part}" for part in line.splitlines())
    found = cuda_branches.find(f"def f():\n    'On cuda.'\n    note('needs a cuda device')\n{body}")
    assert len(found) == 1 and next(iter(found))[0] == "f"


def test_a_test_that_misses_its_place_fails(monkeypatch):
    monkeypatch.setattr(cuda_branches, "BRANCHES", {"machine.py::pick_dtype": {"some": ("device.type != 'cuda'",)}})
    with cuda_branches.reached("test_cuda_branches.py::some"):
        machine.pick_dtype("auto", CPU)
    failure = pytest.raises(pytest.fail.Exception, match="pick_dtype .*in line")
    with failure, cuda_branches.reached("test_cuda_branches.py::some"):
        machine.pick_dtype("fp32", CPU)


# Devices, clocks and memory


def test_device_and_dtype(card):
    assert machine.pick_device("auto").type == "cuda" and machine.pick_device("cuda:0") == CARD
    with pytest.raises(EnvironmentProblem, match="'cuda:1', but PyTorch .* sees 1 CUDA device[.]"):
        machine.pick_device("cuda:1")
    with pytest.raises(UsageError, match="Try --device auto"):
        machine.pick_device("mps")
    assert machine.pick_dtype("auto", CARD) is torch.bfloat16
    card.capability = (7, 5)
    assert machine.pick_dtype("auto", CARD) is torch.float16


def test_reports_name_the_card(card):
    about = machine.describe_device(CARD).to_dict()
    assert list(about) == ["type", "name", "memory_gib", "capability", "cuda", "cpu", "cores", "threads", "platform"]
    assert about["type"] == "cuda" and about["name"] == "Fake H100" and about["capability"] == "9.0"
    assert about["memory_gib"] == 80 and "cuda" in about and about["cores"]
    card.peak_bytes = 3 * 2**30
    assert machine.peak_memory_gib(CARD) == 3


def test_peaks_of_a_card(card):
    """Each stage begins with what is held; before CUDA has begun there is nothing to forget."""
    memory = machine.PeakMemory(CARD)
    assert memory.owner == "card" and card.calls == []
    for gib in (3, 2):
        card.peak_bytes = gib * 2**30
        assert memory.take() == gib
    assert [name for name, *_ in card.calls] == ["reset_peak_memory_stats"] * 2
    assert memory.most() == 3 and memory.unknown is None


def test_spans_on_a_card(card):
    """Read once, after the device has reached the last mark; events are used again."""
    recorder = timing.StepRecorder("cuda", "layer")
    card.step_ms = 2.0
    made = []
    event = torch.cuda.Event
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "Event", lambda **options: made.append(1) or event(**options))
        recorder.begin_step()
        for _ in range(2):
            recorder.begin_pass()
            for layer in range(3):
                with recorder.attention(layer):
                    card.clock_ms += 5.0
            step = recorder.end_step(1.0)
        assert step.latency_ms == 3 * 9 + 2 and step.attention_ms == [21.0] and step.layers_ms == [7.0] * 3
        assert len(made) == 8  # those of one step
    kept = timing.StepRecorder("cuda", "layer", keep=True)
    kept.begin_step()
    kept.begin_pass()
    card.clock_ms += 1.0
    with kept.attention(0):
        card.clock_ms += 5.0
    kept.end_step(1.0)
    (layer, step) = kept.spans
    assert layer.key == (0, 0) and step.key == "step" and step.start_ms < layer.start_ms
    assert layer.start_ms + layer.ms <= step.start_ms + step.ms
    assert timing.SpanClock("cuda").cost_ms() > 0
    assert timing.SpanClock("cuda").read() == []


def test_memory_is_given_back(card):
    session.free_memory()
    assert card.calls == [("empty_cache",)]


# Models and processes


def test_the_model_of_a_card(card, monkeypatch):
    """Where none is named: one that a card runs; nothing on a card is said of a bundled model."""
    asked = []
    monkeypatch.setattr(models, "fetch_weights", lambda weights, **options: asked.append(weights))
    monkeypatch.setattr(models, "fetch_pipeline", lambda base, **options: models.bundled_folder())
    source = models.resolve_model(None, "cuda")
    assert source.name == CUDA_DEFAULT and asked == [PRESETS[CUDA_DEFAULT].weights]
    assert models.resolve_model(None, "cpu").name == BUNDLED
    bundled = models.resolve_model(None, "cpu")
    monkeypatch.setattr(resolve, "resolve_model", lambda *args, **options: bundled)
    assert resolve.find_weights(GenerateConfig("-", device="cuda")).notes == ()
    assert "no CUDA device" in resolve.find_weights(GenerateConfig("-", device="cpu")).notes[0]
    assert setup.default_model(None, "auto") == setup.DEFAULT_ON_CUDA == "wan2.1-t2v-1.3b"
    assert setup.default_model(None, "cpu") is None


def test_a_plan_for_a_card_that_is_not_here(capsys):
    assert run(["generate", "a red fox", "--dry-run", "--device", "cuda:3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == CUDA_DEFAULT
    assert run(["generate", "a red fox", "--dry-run", "--device", "cpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == BUNDLED


def test_each_process_takes_its_card(card, monkeypatch):
    started = []
    monkeypatch.setattr(dist, "is_torchelastic_launched", lambda: True)
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(dist, "rendezvous", lambda url, timeout: iter([(dist.HashStore(), 11, 16)]))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **options: started.append(backend))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: started.append("ended"))
    monkeypatch.setattr(dist, "get_node_local_rank", lambda default: 3)
    monkeypatch.setattr(dist, "get_rank", lambda: 11)
    monkeypatch.setattr(dist, "get_world_size", lambda: 16)
    wrapped = []
    monkeypatch.setattr(torch.nn.parallel, "DistributedDataParallel", lambda module, **options: wrapped.append(options))
    card.count = 4
    with parallel.join(GPU, "auto") as team:
        assert team == parallel.Team(11, 16, torch.device("cuda", 3), "ddp")
        assert started == ["nccl"] and card.calls == [("set_device", torch.device("cuda", 3))]
        team.share(torch.nn.Linear(2, 2), torch.float32)
    with parallel.join(CPU, "auto") as team:
        team.share(torch.nn.Linear(2, 2), torch.float32)
    assert started == ["nccl", "ended", "gloo", "ended"] and len(card.calls) == 1
    assert [options["device_ids"] for options in wrapped] == [[3], None]


def test_more_processes_than_cards(card, monkeypatch):
    """A raw CUDA error came of it, after a process had been waited for."""
    monkeypatch.setattr(dist, "is_torchelastic_launched", lambda: True)
    monkeypatch.setattr(dist, "init_process_group", lambda *given, **options: pytest.fail("the others were waited for"))
    card.count = 2
    for environment in ({"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "3"}, {"LOCAL_RANK": "2"}):
        monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        message = "started 3 processes on this machine, and each .* PyTorch sees 2 CUDA devices.*--nproc-per-node 2"
        with pytest.raises(EnvironmentProblem, match=message), parallel.join(GPU, "auto"):
            pass


def out_of_memory(*args, **options):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def test_decode_out_of_memory(monkeypatch, tmp_path):
    monkeypatch.setattr(decode, "decode_into", out_of_memory)
    told = SimpleNamespace(settings={"fps": 8}, stages_s={})
    with pytest.raises(SlagenError, match="the GPU ran out of memory. Try --device cpu"):
        decode._write(told, torch.zeros(1), None, torch.device("cpu"), tmp_path, tmp_path, False, None, False, print)


def test_a_card_is_found_without_torch(monkeypatch):
    monkeypatch.setattr(memory.Path, "exists", lambda path: False)
    for found in ("/usr/bin/nvidia-smi", None):
        monkeypatch.setattr(memory.shutil, "which", lambda name, found=found: found)
        assert memory.has_card() == (found is not None)


def test_generate_out_of_memory(monkeypatch):
    monkeypatch.setattr(generate, "_run", out_of_memory)
    with pytest.raises(SlagenError, match="out of memory at 128x128, 17 frames. Try a lower --num-frames"):
        generate.generate(GenerateConfig("a red circle", model=BUNDLED, device="cpu"))


@pytest.mark.parametrize("said", ["CUDA error: device-side assert", "Triton Error [CUDA]: unspecified launch failure"])
def test_a_card_that_fails_is_no_bug(said, capsys, monkeypatch):
    """A driver that fails in the midst of a run is the environment's."""

    def fail(config, on_event):
        raise RuntimeError(f"{said}\nFor debugging consider passing CUDA_LAUNCH_BLOCKING=1")

    monkeypatch.setattr(generate, "generate", fail)
    assert run(["generate", "a red circle"]) == 4
    assert capsys.readouterr().err.startswith(
        f"error: the GPU failed: {said}. Test the GPU with slagen doctor --selftest"
    )


def test_finetune_out_of_memory(monkeypatch, tmp_path):
    monkeypatch.setattr(finetune, "check_setup", lambda *args: None)
    monkeypatch.setattr(finetune, "_run", out_of_memory)
    with pytest.raises(SlagenError, match="out of memory. Try --micro-batch 1"):
        finetune.finetune(FinetuneConfig(data=str(tmp_path), output=str(tmp_path / "out"), device="cpu"))


def test_a_card_recomputes_activations():
    assert recomputes(None, GPU) is True and recomputes(None, CPU) is False
    assert recomputes(False, GPU) is False and recomputes(True, CPU) is True


# doctor


def test_doctor_names_every_card(card, monkeypatch):
    card.count = 2
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    found = {finding.name: finding for finding in doctor._gpu()}
    assert list(found) == ["gpu 0", "gpu 1", "cuda"] and {f.status for f in found.values()} == {"ok"}
    assert found["gpu 1"].found == "Fake H100, compute capability 9.0, 80 GiB, 227 KiB of shared memory, supports bf16"
    assert found["cuda"].found.startswith("12.8, driver ")
    doctor.check_gpu(doctor._gpu())
    card.capability = (7, 5)
    assert doctor._gpu()[0].status == "note" and "--dtype fp16" in doctor._gpu()[0].fix
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert doctor._gpu()[0].found == "none: PyTorch sees no CUDA device"
    monkeypatch.setattr(torch.version, "cuda", None)
    assert doctor._gpu()[0].found == "none: this PyTorch is built without CUDA"
    with pytest.raises(EnvironmentProblem, match="--require-gpu needs a usable GPU"):
        doctor.check_gpu(doctor._gpu())


def test_driver(monkeypatch):
    """nvidia-smi that fails writes nothing to stdout."""
    monkeypatch.setattr(doctor.shutil, "which", lambda name: name)
    for said, driver in (("575.51\n575.51\n", "575.51"), ("", "unknown (nvidia-smi printed nothing)")):
        monkeypatch.setattr(
            doctor.subprocess, "run", lambda command, said=said, **options: SimpleNamespace(stdout=said)
        )
        assert doctor._driver() == driver


def test_doctor_tries_the_kernels_of_every_card(card, monkeypatch):
    """Each in its own dtype: it tried the first alone, and asked the current one for both."""
    tried = []
    monkeypatch.setattr(
        doctor, "prove", lambda q, config: tried.append((q.is_cuda, q.dtype, config.linear_domain)) or (None, [])
    )
    card.count, card.capabilities = 2, {1: (7, 5)}
    found = doctor._kernels()
    assert [(finding.name, finding.status) for finding in found] == [("kernels 0", "ok"), ("kernels 1", "ok")]
    assert tried == [
        (True, dtype, domain) for dtype in (torch.bfloat16, torch.float16) for domain in ("all", "marginal")
    ]
    card.count = 0
    assert [finding.name for finding in doctor._kernels()] == ["kernels"]
    assert tried[4:] == [(False, torch.float32, "all"), (False, torch.float32, "marginal")]


def test_doctor_tells_of_smaller_tiles_and_of_wrong_ones(card, monkeypatch):
    """Where a smaller tile fits, a call goes on with it."""
    monkeypatch.setattr(doctor, "prove", lambda q, config: (None, [f"attend on cuda:0: {config.linear_domain}"]))
    (finding,) = doctor._kernels()
    assert finding.status == "note" and "agree with the reference" in finding.found
    assert finding.found.endswith("some had to use smaller tiles: attend on cuda:0: all; attend on cuda:0: marginal")
    monkeypatch.setattr(doctor, "prove", lambda q, config: ("dq is wrong", []))
    (finding,) = doctor._kernels()
    assert finding.status == "problem" and "dq is wrong" in finding.found and "--backend torch" in finding.fix


def test_doctor_goes_on_where_a_card_is_full_or_lost(card, monkeypatch):
    def fail(*given):
        raise RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable\nCompile with ...")

    monkeypatch.setattr(doctor, "prove", fail)
    card.count = 2
    assert [(finding.name, finding.status, finding.found) for finding in doctor._kernels()] == [
        (f"kernels {index}", "problem", "CUDA error: all CUDA-capable devices are busy or unavailable")
        for index in range(2)
    ]


# bench


def row_of(method, shape):
    """The row of one method on the card."""
    config = BenchConfig(shapes=(shape,), sparsities=(0.5,), lengths=(), seconds=0.001, device="cuda")
    result = BenchResult(MACHINE)
    operator.bench_shape(config, shape, [method], CARD, torch.float32, result, print)
    return result.rows[0]


def test_a_row_on_a_card(card, monkeypatch):
    """The backward is timed there; inputs are enough to leave the second-level cache."""
    sdpa = next(method for method in all_methods() if method.name == "sdpa")
    row = row_of(sdpa, "1x1x64x16")
    assert row.reason is None and row.forward_ms.median == row.backward_ms.median == card.step_ms
    assert row.training_forward_ms.median == card.step_ms
    assert len(clock.draw_inputs((1, 1, 64, 16), CARD, torch.float32)) == math.ceil(2 * 50 * 2**20 / (3 * 64 * 16 * 4))
    assert len(clock.draw_inputs((1, 1, 2**20, 16), CARD, torch.float32)) == 1
    assert len(clock.draw_inputs((1, 1, 64, 16), CPU, torch.float32)) == 1
    row = row_of(methods.Contender("other", "dense", out_of_memory), "1x1x64x16")
    assert row.reason == "out of memory on this device" and row.forward_ms is None


def test_flex_gets_tiles_on_a_card():
    setting = methods.Setting(BenchConfig().sla(0.5), torch.eye(128), torch.zeros(128), "auto", GPU, torch.bfloat16)
    tiles = other_libraries._flex_tiles(setting)
    assert (tiles["fwd_BLOCK_M"], tiles["fwd_BLOCK_N"]) == (64, 64)
    assert other_libraries._flex_tiles(dataclasses.replace(setting, device=CPU)) is None


def test_dense_backends_need_a_card(card):
    q = torch.randn(1, 1, 8, 16, device="cuda")
    attend = dense_kernel("sdpa-math", CARD)
    expected = torch.nn.functional.scaled_dot_product_attention(q, q, q)
    torch.testing.assert_close(attend(q, q, q).cpu(), expected.cpu())
    with pytest.raises(Unavailable, match="no CUDA device"):
        dense_kernel("sdpa-math", CPU)


def test_selftest_benches_wan_on_a_card(monkeypatch):
    asked = []
    row = BenchRow("sla", "sla", "triton", "1x12x4096x128", "bfloat16", 0.95, correct=True, speedup=2.0)
    monkeypatch.setattr(bench, "bench", lambda config: asked.append(config) or BenchResult(MACHINE, [row]))
    for device in (GPU, CPU):
        assert selftest._bench(device, []) == "speed-up of SLA over dense attention: 2.00x at 1x12x4096x128"
    assert asked[0].shapes == ("wan-1.3b-480p",) and asked[0].device == "auto"
    assert asked[1].shapes == ("1x2x4096x64",) and asked[1].device == "cpu"


def test_ceilings_of_a_card(monkeypatch):
    """Large enough for a card; made on the device "meta" here, which holds no memory."""
    sizes = []
    for name in ("randn", "empty"):
        make = getattr(torch, name)
        monkeypatch.setattr(
            torch, name, lambda *size, make=make, **options: make(*size, **{**options, "device": "meta"})
        )
    monkeypatch.setattr(clock, "median_ms", lambda attend, inputs, *rest: sizes.append(inputs[0][0].shape) or 2.0)
    found = clock.measure_ceilings(GPU, torch.bfloat16)
    assert sizes == [(8192, 8192), (2**28,)]
    assert found == (2 * 8192**3 / 2e9, 2 * 2**30 / 2e6)


def test_models_run_with_the_dense_backends_of_a_card(card, monkeypatch):
    config = SimpleNamespace(attention_head_dim=16, num_layers=2, patch_size=(1, 2, 2))
    pipe = SimpleNamespace(
        transformer=SimpleNamespace(config=config), vae_scale_factor_spatial=8, vae_scale_factor_temporal=4
    )
    source = SimpleNamespace(name="toy", defaults=ModelDefaults(), spatial_grid=16, takes_image=False)
    monkeypatch.setattr(loop, "_place", lambda *args: None)
    monkeypatch.setattr(models, "resolve_model", lambda *args, **options: source)
    monkeypatch.setattr(loading, "load_pipeline", lambda *args, **options: pipe)
    for name in ("install_method", "remove"):
        monkeypatch.setattr(processor, name, lambda *args, **options: None)
    monkeypatch.setattr(loop, "time_loop", lambda *args: loop.LoopTimes(clock.spread([2.0]), None, None, 1.0))
    rows = loop.bench_model(BenchConfig(model="toy", sparsities=(0.9,)), CARD, torch.float32, print)
    assert {row.attention: row.backend for row in rows if row.attention != "dense"} == {"sla": "triton", "vsa": "torch"}
    assert [row.backend for row in rows if row.attention == "dense"] == ["sdpa-flash", "sdpa-cudnn"]
