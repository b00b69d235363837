"""The second run with a known prompt loads no text encoder; damaged, deleted and foreign files only cost its time."""

import dataclasses
import os
import shutil
import types

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from wan_models import save_pipeline

from slagen.cli.main import run
from slagen.generation import prompt_cache
from slagen.generation.config import GenerateConfig, cache_folder
from slagen.generation.generate import generate
from slagen.generation.prompt_cache import PromptCache
from slagen.generation.resolve import make_plan

KNOWN = "the prompt is known, so the text encoder is not loaded; --no-cache loads it"


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return save_pipeline(tmp_path_factory.mktemp("model") / "toy")


def config(model, tmp_path, **fields):
    return GenerateConfig(
        fields.pop("prompt", "a red circle"), model=str(model), attention="dense", width=64, height=64, num_frames=1,
        steps=1, seed=1, device="cpu", cache_dir=str(tmp_path / "cache"), **fields,
    )  # fmt: skip


def made(asked):
    said = []
    record = generate(asked, lambda event: said.append(event), write=False).videos[0].record
    return record, [event.text for event in said], [event.text for event in said if event.kind == "stage"]


def test_the_second_run_opens_no_text_encoder(toy, tmp_path, monkeypatch):
    model = shutil.copytree(toy, tmp_path / "toy")
    first, told, stages = made(config(model, tmp_path))
    assert KNOWN not in told and "text" in stages and "cached_prompt" not in first.weights.to_dict()
    monkeypatch.setattr("slagen.wan.loading.load_text_encoder", lambda *_: pytest.fail("it was loaded"))
    again, told, stages = made(config(model, tmp_path))
    assert KNOWN in told and "text" not in stages and again.weights.to_dict()["cached_prompt"] is True
    assert again.latents_hash == first.latents_hash
    for other in ({"prompt": "a circle"}, {"negative_prompt": "red"}, {"dtype": "bf16"}, {"no_cache": True}):
        with pytest.raises(pytest.fail.Exception, match="it was loaded"):
            made(config(model, tmp_path, **other))
    monkeypatch.undo()
    weights = model / "text_encoder" / "model.safetensors"
    with safe_open(weights, framework="pt") as handle:
        tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (no mapping)
    save_file({name: x + 0.1 for name, x in tensors.items()}, weights, metadata={"format": "pt"})
    changed, told, _ = made(config(model, tmp_path))
    assert KNOWN not in told and changed.latents_hash != first.latents_hash


@pytest.mark.parametrize("damage", ["flipped", "header", "folder", "gone"])
def test_damaged_files_are_encoded_anew_and_told(damage, toy, tmp_path):
    first = made(config(toy, tmp_path))[0]
    file = max((tmp_path / "cache" / "prompts").glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    if damage == "flipped":
        data[-3] ^= 1
        file.write_bytes(data)
    elif damage == "header":
        file.write_bytes(data.replace(b'"F32"', b'"I32"'))
    else:
        file.unlink()
    if damage == "folder":
        file.mkdir()
    again, told, _ = made(config(toy, tmp_path))
    assert KNOWN not in told and again.latents_hash == first.latents_hash
    assert [text for text in told if "is damaged" in text] == (
        [] if damage == "gone" else [f"{file} is damaged, so the prompt is encoded again"]
    )
    if damage != "folder":
        assert KNOWN in made(config(toy, tmp_path))[1]


class Encoder:
    """In place of a session: what it encodes is random."""

    pipe = types.SimpleNamespace(_execution_device=torch.device("cpu"))

    def encode(self, plan):
        return {"prompt_embeds": torch.randn(1, 8, 32), "negative_prompt_embeds": torch.zeros(1, 8, 32)}


def test_known_prompts_serve_what_measures_too(toy, tmp_path, monkeypatch, capsys):
    """compare and attention take the prompts of generate, and the other way round."""
    options = ["--model", str(toy), "--device", "cpu", "--size", "128x128", "--num-frames", "1", "--steps", "1"]
    options += ["--seed", "1", "--cache-dir", str(tmp_path / "cache")]
    rows = ["--methods", "mean", "--sparsity", "0.5", "--no-controls", "--repeats", "1", "--output"]
    made(config(toy, tmp_path))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na red\n")
    assert run(["compare", "--prompts", str(prompts), *options, *rows, str(tmp_path / "first")]) == 0
    monkeypatch.setattr("slagen.wan.loading.load_text_encoder", lambda *_: pytest.fail("it was loaded"))
    capsys.readouterr()
    assert run(["compare", "--prompts", str(prompts), *options, *rows, str(tmp_path / "again")]) == 0
    assert "all prompts are known" in capsys.readouterr().err
    picture = ["--attention", "mean", "--block-m", "16", "--block-n", "16", "--output", str(tmp_path / "map.png")]
    assert run(["attention", "a red", *options, *picture]) == 0
    assert KNOWN in capsys.readouterr().err


def test_what_was_used_last_stays_within_the_limit(toy, tmp_path, monkeypatch):
    folder = tmp_path / "cache" / "prompts"
    plans = {name: make_plan(config(toy, tmp_path, prompt=name)) for name in ("a", "a red", "red circle", "circle")}
    cache = lambda name: PromptCache([plans[name]], lambda event: None)  # noqa: E731
    for age, name in enumerate(["a", "a red", "red circle"]):
        before = set(folder.glob("*"))
        cache(name).embeds(Encoder(), plans[name])
        for file in set(folder.glob("*")) - before:
            os.utime(file, (1000 + age, 1000 + age))
    assert len(list(folder.glob("*.safetensors"))) == 4  # three, and the empty negative one
    assert cache("a").known  # which makes it new
    size = max(file.stat().st_size for file in folder.glob("*.safetensors"))
    monkeypatch.setattr(prompt_cache, "MAX_BYTES", 3 * size)
    cache("circle").embeds(Encoder(), plans["circle"])
    assert [name for name in plans if cache(name).known] == ["a", "circle"]
    assert len(list(folder.glob("*.safetensors"))) == 3


def test_a_cache_that_cannot_be_written_or_is_not_wanted_changes_nothing(toy, tmp_path):
    (tmp_path / "cache").write_text("no folder")
    asked = config(toy, tmp_path)
    record = made(asked)[0]
    assert made(dataclasses.replace(asked, no_cache=True))[0].latents_hash == record.latents_hash
    assert (tmp_path / "cache").read_text() == "no folder"
    assert cache_folder(dataclasses.replace(asked, cache_dir=None)) != tmp_path / "cache"
