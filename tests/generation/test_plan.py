"""slagen plan, models, info, convert and merge: numbers by closed form, and the commands themselves."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from public_forms import SIZES, projections, turbo
from wan_models import build_transformer, save_pipeline

from slagen.attention import registry
from slagen.attention.cost import ModelShape
from slagen.attention.protocol import Grid
from slagen.attention.sla.config import SLAConfig
from slagen.cli.main import run
from slagen.errors import SlagenError, UsageError, WeightsError
from slagen.formats.headers import read_header
from slagen.formats.names import is_untuned
from slagen.formats.sla import SLAMetadata, write_sla
from slagen.generation import estimate as planning
from slagen.generation.config import GenerateConfig
from slagen.generation.generate import _claimed_paths
from slagen.generation.resolve import make_plan
from slagen.wan.folder import bundled_folder
from slagen.wan.presets import CUDA_DEFAULT, PRESETS, WAN_1_3B, WAN_14B


def plan(**settings):
    return planning.plan(GenerateConfig(prompt=settings.pop("prompt", "a red circle"), **settings))


def test_the_published_case():
    content = plan(model="wan2.1-t2v-1.3b", width=832, height=480, num_frames=81, sparsity=0.95)
    assert (content.tokens, content.key_blocks, content.tail_tokens, content.topk_blocks) == (
        32760,
        512,
        56,
        25,
    )
    flops = content.flops
    assert flops.dense_forward / 1e12 == pytest.approx(283.0, rel=0.01)
    assert flops.dense_attention / 1e12 == pytest.approx(197.8, rel=0.01)
    assert flops.sla_forward / 1e12 == pytest.approx(96.0, rel=0.01)
    assert content.amdahl_ceiling == pytest.approx(3.32, rel=0.01)
    assert content.forward_passes == 100
    assert any("not fine-tuned" in text for text in content.notes)


@pytest.mark.parametrize(
    ("model", "size", "dense", "limit"),
    [
        ("wan2.1-t2v-1.3b", (1280, 720), 1249.8, 6.36),
        ("wan2.1-t2v-14b", (832, 480), 1678.4, 2.10),
        ("wan2.1-t2v-14b", (1280, 720), 6523.4, 3.54),
    ],
    ids=["1.3b-720p", "14b-480p", "14b-720p"],
)
def test_flops_of_the_other_sizes(model, size, dense, limit):
    content = plan(model=model, width=size[0], height=size[1])
    assert content.flops.dense_forward / 1e12 == pytest.approx(dense, rel=0.01)
    assert content.amdahl_ceiling == pytest.approx(limit, rel=0.01)


@pytest.mark.parametrize(
    ("size", "num_frames", "tokens", "blocks", "tail"),
    [((832, 448), 77, 29120, 455, 0), ((1280, 720), 81, 75600, 1182, 16), ((832, 480), 1, 1560, 25, 24)],
    ids=["full-tail", "720p", "image"],
)
def test_tokens_and_tails(size, num_frames, tokens, blocks, tail):
    content = plan(model="turbowan2.1-t2v-1.3b-480p", width=size[0], height=size[1], num_frames=num_frames)
    assert (content.tokens, content.key_blocks, content.tail_tokens) == (tokens, blocks, tail)
    assert content.topk_blocks == blocks // 10 and content.forward_passes == 4


def test_device_and_dtype_count_in_a_plan():
    """`slagen plan` did not take them; `slagen generate` does."""
    found = plan(device="cuda:0")
    assert found.device == "cuda" and found.model == CUDA_DEFAULT
    wide = plan(device="cuda", dtype="fp32")
    assert wide.memory_gib.gpu_peak_all_resident > 1.5 * found.memory_gib.gpu_peak_all_resident


def test_parameters_are_counted_exactly():
    assert planning.transformer_parameters(WAN_1_3B) == 1_418_996_800
    assert planning.transformer_parameters(WAN_14B) == 14_288_491_584
    small = build_transformer(num_heads=2, head_dim=64, num_layers=3)
    counted = sum(p.numel() for p in small.parameters())
    sizes = planning.ModelShape(num_layers=3, num_heads=2, head_dim=64, ffn_dim=64, text_tokens=8)
    by_formula = planning.transformer_parameters(sizes, text_dim=32, channels=4)
    assert by_formula - counted == (256 - 32) * 128  # this one embeds time in 32 frequencies, Wan in 256


def test_the_bundled_model_is_planned_as_it_runs():
    content = plan()
    assert (content.tokens, content.key_blocks, content.topk_blocks) == (320, 20, 1)
    assert content.trained_sparsity == 0.95 and not content.downloads and not content.notes
    assert any("trained at sparsity 0.95" in text for text in plan(sparsity=0.8).notes)
    large = plan(width=256, height=256, num_frames=33)
    assert (large.tokens, large.key_blocks, large.topk_blocks, large.notes) == (2304, 144, 7, [])
    (note,) = plan(width=320, height=256, num_frames=33).notes
    assert "This video is 320x256 with 33 frames. Try --size 256x256 --num-frames 33" in note


def test_a_top_k_counts_as_published_and_a_sparsity_as_ours(capsys):
    """int(0.29 * 100) is 28 in floating point, and 1 - 0.71 of 100 are 29."""
    by_topk, by_sparsity = plan(num_frames=97, sla_topk=0.29), plan(num_frames=97, sparsity=0.71)
    assert (by_topk.key_blocks, by_topk.topk_blocks, by_sparsity.topk_blocks) == (100, 28, 29)
    assert by_topk.settings["sla_topk"] == 0.29 and by_sparsity.settings["sla_topk"] is None
    for option, words in (
        ("--sla-topk 0.29", "sla-topk 0.29 -> top-k 28 of 100"),
        ("--sparsity 0.71", "sparsity 0.71 -> top-k 29 of"),
    ):
        assert run(["plan", "--num-frames", "97", *option.split()]) == 0
        assert words in capsys.readouterr().out


def test_blocks_that_are_not_those_of_the_training():
    """TurboDiffusion runs 128 x 64; weights made with other blocks take them, and what was trained is told."""
    content = plan(model="turbowan2.1-t2v-1.3b-480p", block_m=128)
    assert (content.query_blocks, content.key_blocks, content.topk_blocks) == (256, 512, 51)
    (note,) = content.notes
    assert note == "the weights were trained with blocks of 64x64 tokens, but this run uses 128x64"
    assert not plan(model="turbowan2.1-t2v-1.3b-480p", block_m=64, block_n=64).notes
    content = plan(block_n=32)
    assert (content.key_blocks, content.settings["block_m"], content.settings["block_n"]) == (10, 16, 32)


def test_what_is_asked_for_is_planned():
    dense = plan(model="wan2.1-t2v-1.3b", attention="dense")
    assert dense.settings["sparsity"] is None and dense.kept_fraction == 1.0
    assert dense.topk_blocks == dense.key_blocks and not any("--allow" in text for text in dense.notes)
    (note,) = plan(model="wan2.1-t2v-1.3b").notes
    assert "needs other weights, given with --weights, or --allow-untrained" in note
    (note,) = plan(model="wan2.1-t2v-1.3b", allow_untrained=True).notes
    assert "the video will be poor" in note


def test_what_generate_refuses_a_plan_refuses_with_the_same_line(tmp_path):
    """Missing or broken weights, a video that exists and a sampler of other weights were planned all the same."""
    broken, there = tmp_path / "broken.safetensors", tmp_path / "v.mp4"
    broken.write_bytes(b"x" * 99)
    there.touch()
    sla = tmp_path / "sla.safetensors"
    shutil.copy(bundled_folder() / "sla.safetensors", sla)
    for settings in (
        {"weights": str(tmp_path / "none")}, {"weights": str(broken)}, {"sampler": "rcm"},
        {"sampler": "rcm", "weights": str(sla)}, {"output": str(there), "seed": 1},
        {"output": str(tmp_path / "w.mp4"), "num_videos": 2, "seed": 1},
    ):  # fmt: skip
        config = GenerateConfig("a red circle", model="tiny-wan", device="cpu", **settings)
        with pytest.raises(SlagenError) as planned:
            planning.plan(config, "cpu")
        with pytest.raises(SlagenError) as refused, _claimed_paths(make_plan(config)):
            pass
        assert str(planned.value) == str(refused.value)
        assert planned.value.exit_code == refused.value.exit_code in (2, 5)
    plan(output=str(there), overwrite=True)
    with pytest.raises(WeightsError, match="are distilled for rcm"):
        plan(model="turbowan2.1-t2v-1.3b-480p", sampler="unipc")


def test_weights_never_tuned_are_refused_where_their_headers_tell(tmp_path):
    """A plan noted it, and generate ended with 5. A preset's weights are not here, so that it stays a note there."""
    model = save_pipeline(tmp_path / "pipe", **SIZES)
    file = tmp_path / "wan.safetensors"
    shutil.copy(model / "transformer" / "diffusion_pytorch_model.safetensors", file)
    for settings in ({"model": str(model)}, {"weights": str(file), "model": str(model)}):
        with pytest.raises(WeightsError) as planned:
            plan(**settings)
        with pytest.raises(WeightsError) as refused:
            make_plan(GenerateConfig("a red circle", device="cpu", **settings))
        assert str(planned.value) == str(refused.value) and "not fine-tuned for SLA" in str(refused.value)
        plan(attention="dense", **settings)
        notes = plan(allow_untrained=True, **settings).notes
        assert ("the video will be poor" in " ".join(notes)) == ("weights" not in settings)
    shutil.copy(bundled_folder() / "sla.safetensors", model)
    assert plan(model=str(model)).trained_sparsity == 0.95
    names = read_header(file).keys() - {"__metadata__"}
    assert is_untuned(names) and is_untuned([f"model.diffusion_model.{name}" for name in names])
    for other in ("blocks.0.attn1.processor.proj_l.weight", "blocks.0.attn1.to_q.lora_A.weight"):
        assert not is_untuned({*names, other})
    assert not is_untuned([])


def test_what_generate_warns_of_a_plan_notes(monkeypatch):
    """Words that the bundled model does not know, and memory that this machine has not."""
    (note,) = plan(prompt="a red fox").notes
    assert note == make_plan(GenerateConfig("a red fox", model="tiny-wan", device="cpu")).warnings[0]
    assert "was not trained on 'fox'" in note and not plan(prompt="prompt").notes
    monkeypatch.setattr("slagen.generation.memory.memory_left", lambda: (0, "this machine's memory"))
    (note,) = planning.plan(GenerateConfig("a red circle"), "cpu").notes
    assert "of memory on a CPU" in note and "only 0.0 GiB of" in note


def test_a_plan_without_a_card_speaks_of_ram(monkeypatch, capsys):
    """It said "24.0 GiB on the GPU" where there was none."""
    for card, model, gpu in (
        (False, "tiny-wan", None),
        (False, "wan2.1-t2v-1.3b", "on a GPU"),
        (True, "tiny-wan", "on a GPU"),
    ):
        monkeypatch.setattr("slagen.generation.memory.has_card", lambda card=card: card)
        assert run(["plan", "--model", model]) == 0
        told = capsys.readouterr().out
        assert told.index("GiB of RAM on a CPU") < (told.index(gpu) if gpu else len(told)) and "the GPU" not in told
        assert gpu or "GPU" not in told


def test_bad_plans():
    with pytest.raises(UsageError, match="Try --model wan2.1-t2v-14b"):
        plan(model="wan2.1-t2v-14")
    with pytest.raises(UsageError, match="Try --size 832x480"):
        plan(model="wan2.1-t2v-1.3b", width=830, height=480)
    with pytest.raises(
        UsageError, match="is not a folder on this machine, and slagen plan cannot read a Hugging Face model"
    ):
        plan(model="Wan-AI/Wan2.1-T2V-1.3B-Diffusers")


def test_a_preset_is_planned_without_torch():
    code = (
        "import sys; from slagen.cli.main import run; "
        "code = run(['plan', '--model', 'wan2.1-t2v-1.3b', '--json']); "
        "assert code == 0 and not {'torch', 'diffusers', 'huggingface_hub'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tokens"] == 32760


def test_dry_run_names_the_file(capsys, tmp_path):
    options = ["--seed", "7", "--output", str(tmp_path / "x"), "--dry-run", "--json"]
    assert run(["generate", "a red circle moving right", *options]) == 0
    (name,) = json.loads(capsys.readouterr().out)["outputs"]
    assert name == str(tmp_path / "x" / "0001-a-red-circle-moving-right-s7-<hash>.mp4") and not list(tmp_path.iterdir())
    assert run(["generate", "a red circle", "--attention", "dense", "--dry-run"]) == 0
    assert "dense: every key block" in capsys.readouterr().out
    assert run(["plan", "--model", "turbowan2.1-t2v-14b-720p"]) == 0
    shown = capsys.readouterr().out
    assert "top-k 118 of 1182 key blocks" in shown and "TurboDiffusion/TurboWan2.1-T2V-14B-720P" in shown


def test_models_are_listed(capsys):
    assert run(["models", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert list(rows) == ["tiny-wan", *PRESETS]
    turbo_row = rows["turbowan2.1-t2v-1.3b-480p"]
    assert (turbo_row["sampler"], turbo_row["steps"], turbo_row["guidance_scale"]) == ("rcm", 4, 1.0)
    assert turbo_row["sla"]["sparsity"] == 0.9 and rows["tiny-wan"]["sla"]["sparsity"] == 0.95
    assert run(["models"]) == 0
    assert "turbowan2.1-t2v-1.3b-480p" in capsys.readouterr().out


def test_convert_info_and_merge_by_command(capsys, tmp_path):
    base = save_pipeline(tmp_path / "base", **SIZES)
    state = build_transformer(**SIZES).state_dict()
    file = tmp_path / "turbo.pth"
    torch.save(turbo(state, projections()), file)
    assert run(["info", str(file), "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert (about["kind"], about["layout"], about["layers"], about["width"]) == ("transformer", "wan", 2, 128)
    assert about["sampler"] == "rcm" and len(about["proj_l_norms"]) == 2 and about["trained"] and not about["faults"]
    assert run(["convert", str(file), str(tmp_path / "out"), "--model", str(base)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "model_index.json", "slagen.json", "sla.safetensors", "transformer", "vae", "text_encoder", "tokenizer",
        "scheduler",
    }  # fmt: skip
    assert run(["info", str(tmp_path / "out")]) == 0
    assert "proj_l norms by layer" in capsys.readouterr().out
    assert run(["convert", str(file), str(tmp_path / "out")]) == 2
    merged = str(tmp_path / "merged.safetensors")
    assert run(["merge", str(file), merged, "--diff-base", str(file), "--diff-target", str(file)]) == 0
    assert run(["info", str(tmp_path / "missing.pth")]) == 2
    assert "does not exist" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"steps": 8}, "the rcm sampler takes 1 to 4"), ({"flow_shift": 5.0}, "no flow shift"),
     ({"sampler": "euler"}, "distilled for rcm")],
)  # fmt: skip
def test_what_the_sampler_does_not_take_is_refused_as_generate_does(settings, message):
    with pytest.raises(SlagenError, match=message):
        plan(model="turbowan2.1-t2v-1.3b-480p", **settings)


def test_weights_of_another_sampler_bring_its_defaults(tmp_path):
    """It counted 50 guided steps of weights that generate runs in 4 without guidance."""
    metadata = SLAMetadata(SLAConfig(), "wan", "0" * 64, "all", 10, "rcm")
    file = tmp_path / "sla.safetensors"
    write_sla({"x": torch.zeros(1)}, file, metadata)
    content = plan(model="wan2.1-t2v-1.3b", weights=str(file))
    settings = content.settings
    assert (settings["steps"], settings["guidance_scale"], settings["sampler"]) == (4, 1.0, "rcm")
    assert content.forward_passes == 4


def test_a_small_plan_has_sizes_too(capsys):
    """Every number of the bundled model's was 0.0."""
    assert run(["plan", "--model", "tiny-wan", "--device", "cpu"]) == 0
    figures = re.findall(r"\d+\.\d+", capsys.readouterr().out)
    assert len(figures) > 10 and 0 not in map(float, figures)


@pytest.mark.parametrize("name", ["sla", "mean", "vsa", "nabla", "radial"])
def test_a_clip_with_nothing_to_skip_is_planned_dense_as_generate_runs_it(name):
    """Its plan had the method's cost, with the means and scores that nobody computes, and did not say it."""
    small = GenerateConfig("a", model="tiny-wan", attention=name, width=32, height=32, num_frames=1, device="cpu")
    found = planning.plan(small)
    said = f"with these settings, {name} attention has nothing to skip in 4 tokens, so this clip uses dense attention"
    assert [note for note in found.notes if "attention" in note] == [said]
    assert found.flops.sla_attention == found.flops.dense_attention and found.kept_fraction == 1
    assert said in make_plan(small).warnings


@pytest.mark.parametrize("domain", ["all", "marginal"])
def test_linear_attention_attends_to_no_block_exactly(domain, capsys):
    """Plan and report said that it kept as many blocks as sla does, and counted scores of blocks that it does not
    choose."""
    method, grid = registry.get("linear"), Grid(5, 8, 8)
    config = SLAConfig(linear_domain=domain, block_m=16, block_n=16)
    about = method.describe(config, grid)
    assert (about["critical"], about["marginal"], about["negligible"]) == (
        0,
        *((20, 0) if domain == "all" else (19, 1)),
    )
    assert about["fractions"]["critical"] == method.density(config, grid) == 0
    shape = ModelShape(1, 1, 16, 64, 8)
    states = 6 * 320 * 16**2
    scores_and_sums = 2 * 20 * 20 * 16 + 2 * 20 * 20 * 16**2
    assert method.cost(config, shape, grid) == states + (scores_and_sums if domain == "marginal" else 0)
    assert run(["plan", "--attention", "linear", "--device", "cpu"]) == 0
    assert "linear: 0.00% of all query-key pairs attended exactly" in capsys.readouterr().out
