"""Prepared data sets: encoded or generated once, checked, and refused where they are damaged or another model's."""

import contextlib
import dataclasses
import json
import os
import random

import pytest
import torch
from conftest import needs
from finetune_runs import settings

from slagen.cli.main import run
from slagen.errors import SlagenError, UsageError, WeightsError
from slagen.generation.config import GenerateConfig
from slagen.training.config import DataConfig
from slagen.training.data import dataset, encode
from slagen.training.data import prepare as preparing
from slagen.training.data.dataset import Dataset
from slagen.training.finetune import finetune

pytest_plugins = ["finetune_fixtures"]
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("plain_pictures")]


def test_clips_of_seeds_that_overlap_are_never_in_both_sets(toy, tmp_path):
    model, _ = toy
    (tmp_path / "prompts.txt").write_text("a red circle --seed 1\na red circle --seed 2\na blue star --seed 1\n")
    finetune(settings(model, tmp_path / "out", steps=1, self_generate=tmp_path / "prompts.txt", backend="torch"))
    made = Dataset(tmp_path / "out" / "data")
    assert not {clip.latents for clip in made.training} & {clip.latents for clip in made.held_out}
    assert len(made.held_out) == 3


def test_lines_alike_make_clips_of_their_own(toy, tmp_path):
    model, _ = toy
    line = "a circle --steps 1 --size 64x64 --frames 5"
    (tmp_path / "prompts.txt").write_text(f"{line}\n{line} --num-videos 2\n")
    finetune(settings(model, tmp_path / "out", steps=1, self_generate=tmp_path / "prompts.txt"))
    data = Dataset(tmp_path / "out" / "data")
    assert (len(data.training), len(data.held_out)) == (3 + 2, 2)
    assert len({clip.latents for clip in [*data.training, *data.held_out]}) == 7


def test_changed_shards_are_found(toy, tmp_path):
    import shutil

    model, data = toy
    copy = tmp_path / "copy"
    shutil.copytree(data, copy)
    shard = max(copy.glob("*.safetensors"), key=lambda file: file.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[-5] ^= 64
    shard.write_bytes(content)
    with pytest.raises(WeightsError, match="has changed since it was written"):
        finetune(settings(model, tmp_path / "out", data=copy, steps=6))
    shard.write_bytes(content[:-9])
    with pytest.raises(WeightsError, match=r"lacks \d+ of its \d+ tensors. Prepare it again"):
        finetune(settings(model, tmp_path / "out", data=copy))
    (copy / "dataset.json").write_text("{}")
    with pytest.raises(WeightsError, match="is not a valid data set"):
        finetune(settings(model, tmp_path / "out", data=copy))


def test_videos_are_encoded_once(toy, tmp_path, monkeypatch, capsys):
    needs("av", "slagen[finetune]")
    from test_videos import write_video

    model, _ = toy
    raw = tmp_path / "raw"
    raw.mkdir()
    for number in range(4):
        write_video(raw / f"{number}.mp4", [60 * number, 40], [0, 2000], (64, 64))
        (raw / f"{number}.txt").write_text("a red circle")
    encoded = []
    real = encode.encode_video
    monkeypatch.setattr(encode, "encode_video", lambda vae, frames: encoded.append(frames.shape) or real(vae, frames))
    command = ["finetune", "data", str(raw), "--output", str(tmp_path / "data"), "--model", str(model), "--size",
               "64x64", "--num-frames", "9", "--device", "cpu", "--json"]  # fmt: skip
    assert run(command) == 0
    counts = json.loads(capsys.readouterr().out)
    assert (counts["training"], counts["held_out"], len(encoded)) == (3, 1, 4) and set(encoded) == {(9, 64, 64, 3)}
    assert run(command) == 0 and len(encoded) == 4
    write_video(raw / "2.mp4", [200, 20], [0, 2000], (64, 64))
    (raw / "3.txt").write_text("a circle")
    assert run(command) == 0 and len(encoded) == 5
    assert finetune(settings(model, tmp_path / "out", data=tmp_path / "data", steps=2)).steps == 2
    finetune(settings(model, tmp_path / "raw-out", data=raw, steps=1, train="proj"))  # prepares by itself
    (raw / "1.mp4").write_bytes(b"broken")
    assert run(command) == 2
    assert "1.mp4 cannot be decoded" in capsys.readouterr().err


def test_one_data_set_trains_several_sizes(toy, tmp_path, capsys):
    """As the bundled model's own: videos keep their size, and a batch may have clips of both."""
    needs("av", "slagen[finetune]")
    from test_videos import write_video

    model, _ = toy
    raw = tmp_path / "raw"
    raw.mkdir()
    for number, size in enumerate([(64, 64), (64, 64), (96, 96), (96, 96), (128, 128)]):
        write_video(raw / f"{number}.mp4", [60 * number, 40], [0, 2000], size)
        (raw / f"{number}.txt").write_text("a red circle")
    command = ["finetune", "data", str(raw), "--output", str(tmp_path / "data"), "--model", str(model), "--size",
               "96x96", "--num-frames", "5", "--device", "cpu", "--no-upscale"]  # fmt: skip
    assert run(command) == 0
    made = Dataset(tmp_path / "data")
    assert sorted(clip.shape[2:] for clip in [*made.training, *made.held_out]) == [(8, 8)] * 2 + [(12, 12)] * 3
    assert finetune(settings(model, tmp_path / "out", data=tmp_path / "data", steps=2, batch_size=4)).steps == 2
    command = ["finetune", "--data", str(tmp_path / "data"), "--no-upscale", "--output", str(tmp_path / "other"),
               "--model", str(model), "--from-dense", "--device", "cpu"]  # fmt: skip
    assert run(command) == 2 and "--no-upscale has no effect. Leave it out" in capsys.readouterr().err


def prepare(model, path, output, held_out=None, dtype="fp32"):
    config = DataConfig(str(path), held_out=held_out, width=64, height=64, num_frames=9)
    base = GenerateConfig("-", model=str(model), device="cpu", dtype=dtype)
    told = []
    return preparing.prepare(config, base, output, output.parent / "cache", 0, told.append), told


def test_what_a_data_set_may_be(toy, tmp_path):
    """Several captions of a video, faulty numbers of clips, folders in each other, precisions, damage."""
    needs("av", "slagen[finetune]")
    from test_videos import write_video

    model, prepared = toy
    raw, data = tmp_path / "raw", tmp_path / "data"
    raw.mkdir()
    for number in range(3):
        write_video(raw / f"{number}.mp4", [60 * number, 40], [0, 2000], (64, 64))
    lines = [{"video_path": f"{n}.mp4", "caption": c} for n in range(3) for c in ("a circle", "a star")]
    (raw / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for held_out in (3, 7):
        with pytest.raises(UsageError, match=f"has 3 clips, but {held_out} would be held out"):
            prepare(model, raw, data, held_out)
    made, told = prepare(model, raw, data)
    assert not any("encoding" in event.text for event in prepare(model, raw, data)[1] if event.kind == "clip")
    assert (len(made.training), len(made.held_out)) == (4, 2)
    assert {clip.caption for clip in made.held_out} == {"a circle", "a star"}
    assert not {clip.latents for clip in made.training} & {clip.latents for clip in made.held_out}
    assert prepare(model, raw, data, dtype="bf16")[0].hash != made.hash  # other texts
    with pytest.raises(UsageError, match="is inside the data set"):
        prepare(model, raw, raw / "here")
    for option in ({"width": 64, "height": 64}, {"held_out": 1}):
        config = dataclasses.replace(settings(model, tmp_path / "out", data=data), data=DataConfig(str(data), **option))
        with pytest.raises(UsageError, match="is already prepared"):
            finetune(config)
    largest = max(data.glob("*.safetensors"), key=lambda file: file.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[-5] ^= 64
    largest.write_bytes(content)
    again, told = prepare(model, raw, data)
    assert any("encoding" in event.text or event.text == "text" for event in told) and again.hash == made.hash
    assert all(again.example(clip).latents.isfinite().all() for clip in [*again.training, *again.held_out])
    (raw / "1.mp4").write_bytes(b"broken")
    for path, message in ((raw, "1.mp4 cannot be decoded"), (tmp_path / "typo", "does not exist")):
        with pytest.raises(UsageError, match=message):
            prepare(model, path, data)
    assert Dataset(data).hash == made.hash  # what cannot be done changes nothing
    with pytest.raises(UsageError, match="fp16 is not precise enough"):
        prepare(model, raw, data, dtype="fp16")
    (data / "dataset.json").unlink()
    with pytest.raises(UsageError, match="was interrupted, prepare it again"):
        finetune(settings(model, tmp_path / "out", data=data))
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_all_faults_come_before_the_first_clip_is_encoded(toy, tmp_path, monkeypatch):
    """Damage that only decoding finds, too; and what is changed is no whole set until all is well."""
    needs("av", "slagen[finetune]")
    from test_videos import write_ramp

    model, _ = toy
    raw, data = tmp_path / "raw", tmp_path / "data"
    raw.mkdir()
    for number in range(3):
        write_ramp(raw / f"{number}.mp4", step=number + 1, size=(64, 64), g="8")
        (raw / f"{number}.txt").write_text("a circle")
    with av_damaged(raw / "1.mp4"):
        with pytest.raises(UsageError, match="the data set has one fault:\n1.mp4: "):
            prepare(model, raw, data)
        assert not list(data.glob("*.safetensors"))
    odd = raw / os.fsdecode(b"caf\xe9.mp4")
    (raw / "2.mp4").rename(odd)
    (raw / "2.txt").rename(odd.with_suffix(".txt"))
    made, _ = prepare(model, raw, data)
    assert len(made.training) == 2
    (raw / "0.txt").write_text("a star")
    monkeypatch.setattr(preparing, "write_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        prepare(model, raw, data)
    assert not dataset.is_prepared(data)
    monkeypatch.undo()
    (data / "decoded.txt").write_bytes(b"\xff\x00 damaged")
    monkeypatch.setattr(encode, "encode_video", lambda vae, frames: torch.full((16, 3, 8, 8), torch.nan))
    write_ramp(raw / "1.mp4", step=4, size=(64, 64))
    with pytest.raises(SlagenError, match="1.mp4 produced NaN or Inf"):
        prepare(model, raw, data)


@contextlib.contextmanager
def av_damaged(path):
    """The middle of a video's pictures is noise for a while."""
    content = path.read_bytes()
    start = content.index(b"mdat")
    middle = start + (len(content) - start) // 8
    path.write_bytes(content[:middle] + random.Random(0).randbytes(2000) + content[middle + 2000 :])
    yield
    path.write_bytes(content)


def test_data_of_another_negative_prompt(toy, tmp_path):
    import shutil

    model, data = toy
    other = tmp_path / "other"
    shutil.copytree(model, other)
    content = json.loads((other / "slagen.json").read_text())
    (other / "slagen.json").write_text(json.dumps({**content, "negative_prompt": "blurry"}))
    with pytest.raises(WeightsError, match="was prepared with a negative prompt that is not"):
        finetune(settings(other, tmp_path / "out", data=data))
