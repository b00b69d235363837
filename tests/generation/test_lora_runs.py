"""LoRAs in generate, batch and replay: what is recorded, what is found again, and what is refused before loading."""

import dataclasses
import json
import shutil
from pathlib import Path

import lora_forms as forms
import pytest
import torch
from safetensors.torch import save_file
from wan_models import build_transformer, save_pipeline

from slagen.batch.config import BatchConfig
from slagen.batch.run import batch
from slagen.cli.main import run
from slagen.errors import UsageError, WeightsError
from slagen.generation import session
from slagen.generation.config import GenerateConfig
from slagen.generation.estimate import plan
from slagen.generation.generate import generate
from slagen.generation.lora import asked_loras, read_lora_option
from slagen.generation.provenance import read_made
from slagen.generation.replay import replay
from slagen.generation.resolve import make_plan
from slagen.generation.session import Session
from slagen.io.reading import file_hash


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return save_pipeline(tmp_path_factory.mktemp("model") / "toy")


@pytest.fixture(scope="module")
def style(tmp_path_factory):
    file = tmp_path_factory.mktemp("lora") / "style.safetensors"
    save_file({name: x.contiguous() for name, x in forms.distilled(build_transformer()).items()}, file)
    return file


def config(toy, folder, **fields):
    settings = {"attention": "dense", "width": 64, "height": 64, "num_frames": 1, "steps": 1, "seed": 1, **fields}
    return GenerateConfig("a red circle", model=str(toy), device="cpu", output=str(folder / "v.mp4"), **settings)


def test_a_video_says_which_loras_made_it_and_is_made_again(toy, style, tmp_path):
    notes = []
    asked = config(toy, tmp_path, lora=f"{style}:0.5")
    record = generate(asked, lambda event: notes.append(event.text)).videos[0].record
    plain = generate(dataclasses.replace(asked, lora=()), write=False).videos[0].record
    live = generate(dataclasses.replace(asked, lora_merge=False), write=False).videos[0].record
    assert "LoRA style.safetensors at scale 0.5: 80 tensors for 28 layers of this model" in notes
    assert len({record.latents_hash, plain.latents_hash, live.latents_hash}) == 3
    used = [{"file": "style.safetensors", "sha256": file_hash(style), "scale": 0.5}]
    for path in (tmp_path / "v.mp4", tmp_path / "v.json"):
        content = read_made(path).content
        assert content["weights"]["loras"] == used
        assert content["settings"]["lora"] == ["style.safetensors:0.5"]
        assert content["settings"]["lora_merge"] is True and live.settings["lora_merge"] is False
    with pytest.raises(UsageError, match=r"made with the LoRA style.safetensors \(SHA-256 .*which cannot be found"):
        replay(str(tmp_path / "v.json"), model=str(toy))
    shutil.copy(style, tmp_path)
    assert replay(str(tmp_path / "v.json"), model=str(toy)).same
    assert "lora" not in plain.settings and "loras" not in plain.weights.to_dict()
    save_file({"x": torch.zeros(1)}, tmp_path / "style.safetensors")
    with pytest.raises(UsageError, match="which cannot be found"):
        replay(str(tmp_path / "v.mp4"), model=str(toy))


def test_lines_of_a_batch_have_scales(toy, style, tmp_path):
    """A scale of 0 is the very job without a LoRA; another file under the same name is another job."""
    (tmp_path / "p.txt").write_text("a\na --lora-scale 0.5\na --lora-scale 0\n")

    def jobs(**fields):
        base = dataclasses.replace(config(toy, tmp_path, **fields), output=str(tmp_path / "out"))
        result = batch(BatchConfig(str(tmp_path / "p.txt"), base, cache_dir=str(tmp_path / "cache")))
        return {json.loads((tmp_path / "out" / name).with_suffix(".json").read_text())["latents_hash"]: name
                for name in result.made}, result.kept  # fmt: skip

    file = shutil.copy(style, tmp_path / "s.safetensors")
    made, kept = jobs(lora=(f"{file}:0.8",))
    assert len(made) == 3 and not kept
    asked = dataclasses.replace(config(toy, tmp_path, lora=f"{style}:0.5"), prompt="a")
    assert generate(asked, write=False).videos[0].record.latents_hash in made
    with pytest.raises(UsageError, match="p.txt:2: lora_scale is given, but no LoRA"):
        jobs()
    (tmp_path / "p.txt").write_text("a\n")
    (plain,), (scaled,) = jobs()[1], jobs(lora=(f"{file}:0.8",), lora_merge=False)[1]
    assert {plain, scaled} < {*made.values()} and plain != scaled
    save_file({name: x.contiguous() for name, x in forms.comfy(build_transformer()).items()}, file)
    assert len(jobs(lora=(f"{file}:0.8",))[0]) == 1


def test_another_attention_in_a_session_keeps_the_lora(toy, style, tmp_path):
    """Dense, SLA and dense again: as if each had been loaded by itself."""
    about = {"lora": f"{style}:0.5", "num_frames": 5}
    sla = {"attention": "sla", "allow_untrained": True, "block_m": 16, "block_n": 16}
    plans = [make_plan(config(toy, tmp_path, **about, **fields)) for fields in ({}, sla)]
    loaded = Session(plans[0], several=True)
    embeds = loaded.encode(plans[0])
    expected = [Session(one, False).denoise(one, embeds, lambda event: None)[0] for one in plans]
    assert not torch.equal(*expected)
    for index in (1, 0):
        loaded.use(plans[index])
        found, _ = loaded.denoise(plans[index], embeds, lambda event: None)
        assert torch.equal(found, expected[index])


def test_what_does_not_fit_is_refused_before_anything_is_loaded(toy, style, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(session, "load_pipeline", None)
    wide = tmp_path / "wide.safetensors"
    save_file({f"diffusion_model.blocks.0.self_attn.q.lora_{side}.weight": torch.zeros(size)
               for side, size in (("A", (4, 5120)), ("B", (5120, 4)))}, wide)  # fmt: skip
    words = [
        "generate",
        "a",
        "--attention",
        "dense",
        "--model",
        str(toy),
        "--device",
        "cpu",
        "-o",
        str(tmp_path / "v.mp4"),
    ]
    for command in (words, [*words, "--dry-run"]):
        assert run([*command, "--lora", str(wide)]) == 5
        told = capsys.readouterr().err
        assert "a LoRA for a transformer of width 5120, but toy has width 32" in told and "wan2.1-t2v-14b" in told
    assert run([*words, "--lora", str(tmp_path / "none.safetensors:2")]) == 2
    assert "none.safetensors does not exist" in capsys.readouterr().err
    with pytest.raises(WeightsError, match="is a LoRA, not a transformer. Give it with --lora"):
        generate(config(toy, tmp_path, weights=str(style)))
    found = plan(config(toy, tmp_path, lora=(str(style),)))
    assert any("80 tensors for 28 layers" in note for note in found.notes)


@pytest.mark.parametrize(
    ("text", "path", "scale"),
    [
        ("a.safetensors", "a.safetensors", 1), ("a:0.5", "a", 0.5), ("C:\\a.safetensors", "C:\\a.safetensors", 1),
        ("a:b:-2", "a:b", -2), (":3", ":3", 1), ("a:", "a:", 1), ("dir:2/a", "dir:2/a", 1),
    ],
)  # fmt: skip
def test_a_file_and_its_scale(text, path, scale):
    found = read_lora_option(text)
    assert (found.path, found.scale) == (path, scale)
    assert read_lora_option(str(found)) == found


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"lora": "a:nan"}, "the scale in 'a:nan' must be a number from -100 to 100"),
        ({"lora": "a:101"}, "from -100 to 100"), ({"lora": ("a",) * 17}, "17 LoRAs"), ({"lora": (3,)}, "FILE:SCALE"),
        ({"lora": " "}, "must name a file"), ({"lora_scale": "much"}, "lora_scale is 'much'"),
        ({"lora_scale": "1,inf"}, "from -100 to 100"),
    ],
)  # fmt: skip
def test_faulty_options(fields, words):
    with pytest.raises(UsageError, match=words):
        GenerateConfig("a", **fields)


def test_scales_of_one_video():
    assert GenerateConfig("a", lora=[Path("b") / "c.safetensors", "d:0.5"]).lora == ("b/c.safetensors", "d:0.5")
    assert [x.scale for x in asked_loras(("a:2", "b"), None)] == [2, 1]
    assert [x.scale for x in asked_loras(("a:2", "b"), "0.5")] == [0.5, 0.5]
    assert [x.scale for x in asked_loras(("a:2", "b"), "0.5,0")] == [0.5, 0]
    with pytest.raises(UsageError, match="has 2 numbers, but there are 3 LoRAs"):
        asked_loras(("a", "b", "c"), "1,2")
