"""generate() on a random pipeline, and the bundled model as a user starts it."""

import itertools
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from processes import start
from safetensors.torch import load_file
from wan_models import save_pipeline

from slagen import machine
from slagen.cli.main import run
from slagen.errors import EnvironmentProblem, SlagenError, UsageError, WeightsError
from slagen.generation.config import GenerateConfig
from slagen.generation.generate import generate
from slagen.generation.resolve import make_plan
from slagen.generation.video_report import FORM, VideoReport
from slagen.io.documents import read_json
from slagen.machine import pick_device
from slagen.video import read_mp4

BASE = {
    "prompt": "a red circle",
    "width": 64,
    "height": 64,
    "num_frames": 9,
    "steps": 2,
    "seed": 3,
    "allow_untrained": True,
    "device": "cpu",
}


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return str(save_pipeline(tmp_path_factory.mktemp("toy") / "pipe", num_heads=2, head_dim=16))


def toy_config(toy, tmp_path, **changes):
    # 3 x 8 x 8 tokens at 128 pixels: three key blocks of 64
    return GenerateConfig(
        **{**BASE, "width": 128, "height": 128, "model": toy, "output": str(tmp_path / "out"), **changes}
    )


def test_a_video_and_its_report(toy, tmp_path):
    events = []
    result = generate(toy_config(toy, tmp_path, save_latents=True, sparsity=0.5), events.append)
    (video,) = result.videos
    assert read_mp4(video.path).shape == (9, 128, 128, 3)
    loading = [f"loading the {part}" for part in ("transformer", "VAE", "text encoder")]
    assert [(event.text, event.done, event.num_steps) for event in events if event.kind == "part"] == [
        *((text, done, 3) for done, text in enumerate(loading)),
        *(("", frame, 3) for frame in (1, 2, 3)),  # each latent frame that is decoded
    ]
    report = json.loads(video.report_path.read_text())
    assert report == video.report and report["schema_version"] == 1
    assert report["settings"]["seed"] == 3 and report["settings"]["sparsity"] == 0.5
    assert report["attention"]["tokens"] == 192
    assert (report["attention"]["key_blocks"], report["attention"]["critical"]) == (3, 1)
    assert sum(report["attention"]["fractions"].values()) == pytest.approx(1)
    assert [s["step"] for s in report["steps"]] == [0, 1] and len(report["layers"]) == 2
    for step in report["steps"]:
        assert step["attention_ms"] == pytest.approx(
            step["attention_conditional_ms"] + step["attention_unconditional_ms"]
        )
        assert 0 < step["attention_share"] < 1
    assert set(report["stages_s"]) == {"start", "prepare", "load", "text", "denoise", "decode", "write", "total"}
    assert report["timing"]["overhead_share"] < 0.5
    assert report["weights"]["used"] == "base with untrained SLA"
    assert load_file(video.latents_path)["latents"].shape == (1, 4, 3, 16, 16)
    assert [e.text for e in events if e.kind == "stage"] == ["load", "text", "denoise", "decode", "write"]
    assert sum(e.kind == "step" for e in events) == 2
    assert not list(video.path.parent.glob("*.part"))


def test_the_stages_account_for_all_the_time(toy, tmp_path, monkeypatch):
    """Every look at the clock is a second later; the last look is that of the time they are to account for."""
    looks = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(looks)))
    monkeypatch.setattr(machine, "process_age_s", lambda: 1000.0)
    first, second = (video.report for video in generate(toy_config(toy, tmp_path, num_videos=2)).videos)
    for report in (first, second):
        *stages, total = report["stages_s"].values()
        assert sum(stages) == total == report["wall_s"] - 1
    assert first["stages_s"]["start"] == first["since_process_start_s"] == 1000
    assert all(seconds > 0 for seconds in first["stages_s"].values())
    assert not any(second["stages_s"][name] for name in ("start", "prepare", "load", "text"))


def test_the_age_of_the_process_is_what_the_system_says():
    """The one here began before this test, and another one after it."""
    began = time.monotonic()
    code = "from slagen.machine import process_age_s; print(process_age_s())"
    age = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert 0 < age <= time.monotonic() - began + 0.02  # a tick of either clock
    assert machine.process_age_s() > age


@pytest.fixture
def process(monkeypatch):
    """The memory of the process as its system tells it: what is held, the most so far, whether that is forgotten."""
    told = SimpleNamespace(held=1.0, most=1.0, forgets=True)

    def hold(gib):
        told.held, told.most = gib, max(told.most, gib)

    def forget(self, peak):
        told.most = told.held if told.forgets else told.most
        self.unknown = None if told.forgets else "it is not allowed here"
        return told.forgets

    told.hold = hold
    monkeypatch.setattr(machine.PeakMemory, "_read", lambda self: told.most)
    monkeypatch.setattr(machine.PeakMemory, "_forget", forget)
    return told


def test_the_most_memory_between_two_looks(process):
    memory = machine.PeakMemory(torch.device("cpu"))
    for peak in (5.0, 2.0):
        process.hold(peak)
        process.hold(1.5)
        assert memory.take() == peak
    assert memory.take() == 1.5


def test_a_peak_that_cannot_be_forgotten_is_known_where_it_exceeds_all_before(process):
    process.forgets = False
    memory, found = machine.PeakMemory(torch.device("cpu")), []
    for gib in (5.0, 2.0, 5.0, 6.0):
        process.hold(gib)
        found.append(memory.take())
    assert found == [5.0, None, None, 6.0]
    assert memory.unknown == "it is not allowed here"


def test_the_most_memory_of_each_stage_is_in_the_report(toy, tmp_path, process):
    report = generate(toy_config(toy, tmp_path, report=True)).videos[0].report
    stages = ["load", "text", "denoise", "decode", "write"]
    assert report["stage_memory"] == {"of": "process", "peak_gib": dict.fromkeys(stages, 1.0), "unknown": None}
    process.forgets = False
    video = generate(toy_config(toy, tmp_path / "again", report=True)).videos[0]
    assert set(video.report["stage_memory"]["peak_gib"].values()) == {None}
    page = video.path.with_suffix(".html").read_text()
    assert VideoReport.from_dict(read_json(video.report_path, FORM)) == video.record
    assert page.count("(memory not known)") == 5 and "Some of it is not known: it is not allowed here." in page


def test_seeds_count_up_and_repeat(toy, tmp_path):
    first = generate(toy_config(toy, tmp_path, num_videos=2)).videos
    assert [v.report["settings"]["seed"] for v in first] == [3, 4]
    assert first[0].report["latents_hash"] != first[1].report["latents_hash"]
    again = generate(toy_config(toy, tmp_path / "again", seed=4)).videos[0]
    assert again.report["latents_hash"] == first[1].report["latents_hash"]


def test_nothing_is_overwritten_unless_asked(toy, tmp_path):
    (tmp_path / "out.mp4").write_text("mine")
    config = toy_config(toy, tmp_path, output=str(tmp_path / "out.mp4"))
    with pytest.raises(UsageError, match="--overwrite"):
        generate(config)
    assert (tmp_path / "out.mp4").read_text() == "mine"
    generate(toy_config(toy, tmp_path, output=str(tmp_path / "out.mp4"), overwrite=True))
    assert read_mp4(tmp_path / "out.mp4").shape[0] == 9


def test_dense_runs_the_base(toy, tmp_path):
    report = generate(toy_config(toy, tmp_path, attention="dense")).videos[0].report
    assert report["weights"]["used"] == "base" and "critical" not in report["attention"]
    assert report["cost"]["attention_flops_saved"] == 0
    kept = generate(toy_config(toy, tmp_path, sparsity=0.0)).videos[0].report
    assert kept["attention"]["critical"] == kept["attention"]["key_blocks"]


@pytest.mark.parametrize("attention", ["sparse", "linear"])
def test_one_branch_alone(toy, tmp_path, attention):
    report = generate(toy_config(toy, tmp_path, attention=attention)).videos[0].report
    assert report["attention"]["mode"] == attention


def test_a_clip_of_one_block_runs_dense_and_says_so(toy, tmp_path):
    plan = make_plan(toy_config(toy, tmp_path, width=64, height=64))
    assert plan.num_tokens == 48 and plan.method.name == "dense"
    assert "uses dense attention" in plan.warnings[0]


def test_latents_that_are_not_finite_write_nothing(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "slagen.generation.session.run_denoising", lambda *a: (torch.full((1, 4, 3, 16, 16), torch.nan), None)
    )
    with pytest.raises(SlagenError, match="contain NaN or Inf"):
        generate(toy_config(toy, tmp_path))
    assert not list((tmp_path / "out").iterdir())


def test_a_full_disk_leaves_nothing_behind(toy, tmp_path, monkeypatch):
    """The probe that found the disk full stayed there as an empty file."""
    write = Path.write_bytes

    def full(path, content):
        write(path, b"")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(SlagenError, match="No space left"):
        generate(toy_config(toy, tmp_path))
    assert not list((tmp_path / "out").iterdir())


def test_an_interrupt_leaves_no_file(toy, tmp_path):
    def stop(event):
        if event.kind == "stage" and event.text == "write":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(toy_config(toy, tmp_path), stop)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"width": 100}, UsageError, "multiples of 16 pixels. Try --size 96x128"),
        ({"output": "/dev/null/out"}, SlagenError, "is not writable"),
        ({"allow_untrained": False}, WeightsError, "--allow-untrained"),
        ({"weights": "/none"}, WeightsError, "does not exist"),
        ({"model": "nothing"}, UsageError, "not a preset, a folder or a Hugging Face id"),
        ({"device": "tpu"}, UsageError, "Try --device auto"),
        ({"output": "a.mp4", "num_videos": 2}, UsageError, "is a single file"),
    ],
    ids=["size", "output", "untrained", "weights", "model", "device", "one-file"],
)
def test_what_cannot_work_is_refused(toy, tmp_path, changes, error, words):
    with pytest.raises(error, match=words):
        generate(toy_config(toy, tmp_path, **changes))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_that_is_not_there():
    with pytest.raises(EnvironmentProblem, match="sees 0 CUDA devices"):
        pick_device("cuda")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt": "  "}, "prompt is empty"),
        ({"num_frames": 80}, "Try --num-frames 81"),
        ({"sparsity": float("nan")}, "sparsity is nan"),
        ({"sparsity": 1.0}, "sparsity is 1.0"),
        ({"sparsity": 0.9, "sla_topk": 0.1}, "Give one of them"),
        ({"sla_topk": 0.0}, "Try --sla-topk"),
        ({"steps": 0}, "at least 1"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"seed": -5}, "seed is -5"),
        ({"attention": "dense", "sparsity": 0.5}, "has no sparsity"),
        ({"sampler": "ddim"}, "must be one of unipc"),
        ({"sigma_max": 0.0}, "Try --sigma-max 80"),
        ({"num_frames": float("inf")}, "whole number"),
    ],
)
def test_settings_that_cannot_work(changes, words):
    with pytest.raises(UsageError, match=words):
        GenerateConfig(**{"prompt": "x", **changes})


@pytest.mark.slow
def test_the_bundled_model_shows_what_the_prompt_says(tmp_path, monkeypatch, capsys):
    """A red circle that moves right on black; a short one has the same latents in this process and another."""
    from checker import check

    monkeypatch.chdir(tmp_path)
    command = [
        "generate",
        "a red circle moving right",
        "--seed",
        "0",
        "--device",
        "cpu",
        "--model",
        "tiny-wan",
        "--json",
    ]
    short = [*command, "--steps", "2", "--num-frames", "5", "--output", "short.mp4"]
    process = start(run, [short], tmp_path / "told")
    process.join(1800)
    assert process.exitcode == 0, (tmp_path / "told.err").read_text()
    assert run([*short, "--overwrite"]) == 0
    one, other = (json.loads(said) for said in ((tmp_path / "told").read_text(), capsys.readouterr().out))
    assert one["latents_hash"] == other["latents_hash"]
    assert run([*command, "--output", "a.mp4"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["weights"]["used"] == "SLA" and report["settings"]["sparsity"] == 0.95
    assert report["timing"]["overhead_share"] > 0  # what the timing cost is told; how much depends on the host
    verdict = check(read_mp4(tmp_path / "a.mp4"))
    assert (verdict.colour, verdict.shape, verdict.motion, verdict.background) == ("red", "circle", "right", "black")


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is chosen where there is no GPU")
def test_the_triton_backend_makes_the_same_step(tmp_path, capsys):
    """One step in Triton's interpreter: the latents are the torch backend's to rounding, and the report names each."""
    pytest.importorskip("triton", reason="needs Triton, which is for Linux")
    latents, prompt = {}, "a red circle moving right"
    for backend in ("torch", "triton"):
        options = ["--seed", "0", "--steps", "1", "--guidance-scale", "1", "--dtype", "float32", "--device", "cpu"]
        options += ["--model", "tiny-wan", "--num-frames", "5", "--size", "64x64", "--save-latents", "--json"]
        options += ["--output", str(tmp_path / f"{backend}.mp4")]
        assert run(["generate", prompt, "--backend", backend, *options]) == 0
        assert json.loads(capsys.readouterr().out)["attention"]["backend"] == backend
        (latents[backend],) = load_file(next(tmp_path.glob(f"{backend}*.safetensors"))).values()
    torch.testing.assert_close(latents["triton"], latents["torch"], rtol=0, atol=1e-4)


def test_words_the_bundled_model_does_not_know_are_named(tmp_path):
    plan = make_plan(
        GenerateConfig("a furry red dog moving right", model="tiny-wan", device="cpu", output=str(tmp_path))
    )
    assert "'furry', 'dog'" in plan.warnings[0] and "a red circle" in plan.warnings[0]
    assert make_plan(GenerateConfig("A Red circle, moving right.", model="tiny-wan", device="cpu")).warnings == []


def test_the_bundled_model_is_small_and_whole():
    from slagen.wan.folder import bundled_folder

    folder = bundled_folder()
    assert sum(f.stat().st_size for f in Path(folder).rglob("*")) <= 30 * 2**20
    config = json.loads((folder / "transformer" / "config.json").read_text())
    assert config["num_attention_heads"] % 2 == 0 and config["attention_head_dim"] in (32, 64)


def test_a_size_the_bundled_model_was_not_trained_at_is_told_once(toy, tmp_path):
    """A 256x256 clip was a grid of dots, and one of 5 frames began broken, without a word."""
    small, large = "Try --size 128x128 --num-frames 17", "Try --size 256x256 --num-frames 33"
    for changes, advice in (
        (dict(width=256, height=256), large), (dict(num_frames=5), small), (dict(width=112, height=128), small),
        (dict(width=512, height=256, num_frames=33), large),
    ):  # fmt: skip
        (text,) = make_plan(GenerateConfig("a red circle moving right", model="tiny-wan", **changes)).warnings
        assert "trained only at 128x128 with 17 frames, 192x192 with 33 frames, 256x256 with 33 frames, and" in text
        assert text.endswith(advice)
    for side, num_frames in ((128, 17), (192, 33), (256, 33)):
        fits = GenerateConfig("a red circle", model="tiny-wan", width=side, height=side, num_frames=num_frames)
        assert make_plan(fits).warnings == []
    model = Path(shutil.copytree(toy, tmp_path / "sized"))
    sizes = [dict(width=width, height=64, num_frames=9) for width in (64, 256)]
    (model / "slagen.json").write_text(json.dumps({"trained_sizes": sizes}))
    events = []
    generate(toy_config(str(model), tmp_path, width=192, height=64), events.append)
    (text,) = [event.text for event in events if event.kind == "warning"]
    assert "This video is 192x64 with 9 frames. Try --size 256x64 --num-frames 9" in text


SETTINGS = """prompt negative_prompt model weights vae allow_untrained attention backend sparsity sla_topk size
    num_frames fps steps guidance_scale sampler flow_shift sigma_max ode seed num_videos dtype device timing output
    save_latents overwrite"""


def test_settings_that_are_not_given_are_not_in_a_batchs_keys(toy, tmp_path):
    """A job's key hashes the settings. One more of them at its default would make every batch anew."""
    plain = make_plan(toy_config(toy, tmp_path)).settings
    assert list(plain) == SETTINGS.split()
    assert make_plan(toy_config(toy, tmp_path, block_m=64, block_n=64)).settings == plain
    assert (plain["sparsity"], plain["sla_topk"]) == (0.95, 0.05)
    by_topk = make_plan(toy_config(toy, tmp_path, sla_topk=0.05))
    assert by_topk.settings == plain
    told = make_plan(toy_config(toy, tmp_path)).recorded
    assert (told["sparsity"], told["sla_topk"], by_topk.recorded["sla_topk"]) == (0.95, None, 0.05)
    other = make_plan(toy_config(toy, tmp_path, block_m=128)).settings
    assert other == {**plain, "block_m": 128}


def test_trained_weights_run_with_other_blocks(tmp_path):
    """They load, and what they were trained with is told; the same number of blocks in all is kept."""
    events = []
    config = GenerateConfig("a red circle", steps=1, seed=1, device="cpu", block_m=32, sla_topk=0.1, timing="off",
                            output=str(tmp_path / "x.mp4"))  # fmt: skip
    (video,) = generate(config, events.append).videos
    told = [event.text for event in events if event.kind in ("note", "warning")]
    assert "the weights were trained with blocks of 16x16 tokens, but this run uses 32x16" in told
    assert "sla-topk 0.1 -> 2 of 20 key blocks per query block, tokens in cube order" in told
    assert (video.report["attention"]["query_blocks"], video.report["attention"]["critical"]) == (10, 2)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"block_m": 48}, "block_m is 48, but must be one of 16, 32, 64, 128"),
        ({"block_n": True}, "block_n is True, but must be one of"),
        ({"block_n": 64, "attention": "dense"}, "Leave --block-m and --block-n out"),
    ],
    ids=["size", "type", "dense"],
)
def test_blocks_that_cannot_be(changes, words):
    with pytest.raises(UsageError, match=words):
        GenerateConfig("x", **changes)
