"""The one reader of JSON and YAML: what it refuses, in which words and where, and that it does so at once."""

import json
import os
import re
import struct
import zipfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import slagen
from slagen.batch.config import BatchConfig
from slagen.batch.contact_sheet import write_page
from slagen.batch.manifest import Manifest, Wanted
from slagen.benchmark.config import BenchConfig
from slagen.cli.main import run
from slagen.cli.usage import explain
from slagen.errors import SlagenError, UsageError, WeightsError
from slagen.formats.headers import read_header
from slagen.formats.peek import peek
from slagen.formats.sla import find_sla_file
from slagen.formats.tensor_files import read_tensors
from slagen.generation.config import GenerateConfig
from slagen.generation.latents import read_latents
from slagen.io.documents import MAX_YAML_VALUES, parse_json, parse_yaml, read_json, read_lines
from slagen.io.forms import Fault, check, one_of, sha256, shown, whole
from slagen.io.paths import user_path
from slagen.io.reading import file_hash
from slagen.training.config import DataConfig, FinetuneConfig
from slagen.video import write_video
from slagen.wan.defaults import ModelDefaults
from slagen.wan.folder import bundled_folder, describe_folder


def aliases(inner: str, levels: int = 9) -> str:
    """Nine lines, each of which has the one before nine times: 9^9 values."""
    lines = ["a: &a " + inner.format("x, x, x, x, x, x, x, x, x")]
    lines += [f"{new}: &{new} " + inner.format(", ".join([f"*{old}"] * 9)) for old, new in pairwise("abcdefghi")]
    return "\n".join(lines[:levels])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 100_000, "it is nested too deeply .more than 64 levels."),
        ('{"a": ' * 65 + "1" + "}" * 65, "it is nested too deeply .more than 64 levels."),
        ("7" * 5000, "it contains a number with 5,000 digits, but at most 1,000 are allowed"),
        ('{"a": 1, "a": 2}', "contains the key 'a' twice"),
        ("[],", "is not valid JSON: there is extra text after the value"),
        ("[" + "[]," * 4_000_001 + "[]]", "more than 4,000,000 values"),
        ('{"a": "\\ud83d"}', "incomplete character"),
        (b"\xff\xfe[]", "byte 0xff is not UTF-8"),
        (b'{"a": "\0"}', "NUL byte"),
        ("", "is not valid JSON: expected a value"),
    ],
    ids=lambda value: str(value)[:12],
)
def test_json_out_of_bounds_is_refused(text, words):
    with pytest.raises(Fault, match=words):
        parse_json(text, object)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (aliases("[{}]"), f"more than {MAX_YAML_VALUES:,} values"),
        (aliases("{{k: [{}]}}"), f"more than {MAX_YAML_VALUES:,} values"),
        (aliases("{{<<: [{}]}}").replace("[x, x, x, x, x, x, x, x, x]", "{k: 1}"), f"more than {MAX_YAML_VALUES:,}"),
        ("a: &a [*a]", "alias \\*a refers to a value that is not defined"),
        ("[" * 100_000, "it is nested too deeply .more than 64 levels."),
        ("- " * 100_000, "it is nested too deeply .more than 64 levels."),
        ("!!int ''", "'' is tagged int, but is not a valid int"),
        ("!!float x", "'x' is tagged float"),
        (
            "!!python/object/apply:os.system [ls]",
            "the YAML tag tag:yaml.org,2002:python/object/apply:os.system is not supported",
        ),
        ("!!binary aGk=", "is not supported"),
        ("a: 1\na: 2", "the key 'a' twice"),
        ("? [a]\n: b", "a key must be text, but this one is a list"),
        ("<<: 3", "<< must be followed by an object"),
        ("a\n---\nb", "second YAML document"),
        ("x" * (2**21 + 1), "larger than 2 MiB"),
        ("9" * 5000, "it contains a number with 5,000 digits, but at most 1,000 are allowed"),
    ],
    ids=lambda value: str(value)[:12],
)
def test_yaml_out_of_bounds_is_refused_at_once(text, words):
    """333 bytes took 40 s and a GiB."""
    with pytest.raises(Fault, match=words):
        parse_yaml(text)


def test_yaml_that_people_write_is_read():
    text = "base: &b {steps: 4, seed: 1}\nlist:\n- <<: *b\n  seed: 2\n- *b\n- ~\n- 'no'\n- no\n- [1, -2.5, 0x1f, 1e3]\n"
    content = parse_yaml(text)
    assert content["list"][:5] == [{"seed": 2, "steps": 4}, {"steps": 4, "seed": 1}, None, "no", "no"]
    assert content["list"][5] == [1, -2.5, 31, 1000.0] and content["list"].lines == [3, 5, 6, 7, 8, 9]
    assert parse_yaml("!!str 3") == "3" and parse_yaml("!!float 3") == 3 and parse_yaml("") is None


@pytest.mark.parametrize(
    ("value", "form", "words"),
    [
        ({"vae": 3}, {"vae": (str, str)}, '"vae" is a number, but must be a list of two texts'),
        ({"a": {"b": [1, "x"]}}, {"a": {"b": [int]}}, '"a.b[1]" is text, but must be a whole number'),
        ({"n": 10**400}, {"n": float}, '(401 digits), which is too large'),
        ({"n": float("nan")}, {"n": float}, '"n" is nan, but must be a number'),
        ({"n": True}, {"n": int}, '"n" is true, but must be a whole number'),
        ({"n": 9}, {"n": whole(1, 8)}, '"n" is 9, but must be a whole number from 1 to 8'),
        ({"n": "c"}, {"n": one_of("a", "b")}, "\"n\" is 'c', but must be one of a, b"),
        ({"n": None}, {"n": int | str}, '"n" is null, but must be a whole number or text'),
        ({"n": "A" * 64}, {"n": sha256()}, "64 hexadecimal digits"),
        ([], dict, "is a list, but must be an object"),
        ({}, {"n": int}, 'has no "n"'),
        ({"x": {}}, {str: {"n": int}}, '"x" has no "n"'),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)  # fmt: skip
def test_what_is_of_another_form_is_told_by_its_path(value, form, words):
    with pytest.raises(Fault) as caught:
        check(value, form)
    assert words in str(caught.value)


def test_a_file_is_told_by_name_and_place(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('{\n  "a": }')
    with pytest.raises(
        WeightsError, match=r"x\.json:2:8: it is not valid JSON: expected a value\. Copy or download it again\."
    ):
        read_json(path)
    path.write_bytes(b"{}" + b" " * 100)
    with pytest.raises(WeightsError, match="larger than"):
        read_json(path, most=50)
    pipe = tmp_path / "pipe.json"
    os.mkfifo(pipe)
    with pytest.raises(WeightsError, match="not a regular file"):
        read_json(pipe)
    with pytest.raises(WeightsError, match="cannot be read"):
        read_json(tmp_path)


def test_pipes_are_not_waited_for(tmp_path):
    """Neither in place of its record, nor of a file of lines or of weights, nor of a video that is done."""
    manifest = Manifest(tmp_path)
    job = manifest.queue([Wanted({"prompt": "x"}, 1, "x")])[0]
    os.mkfifo(tmp_path / job.name)
    assert not manifest.is_whole(job)
    assert list(read_lines(tmp_path / job.name, dict)) == []
    with pytest.raises(WeightsError, match="it is not a regular file"):
        read_header(tmp_path / job.name)
    manifest.path.unlink()
    os.mkfifo(manifest.path)
    with pytest.raises(SlagenError, match="it is not a regular file"):
        Manifest(tmp_path).read()


def test_a_message_holds_no_more_than_a_line():
    assert shown("x\n" * 1000) == repr("x\n" * 28 + "x...") and shown([[1] * 10**6]) == "a list"
    assert (
        shown(10**5000) == "a number of more than 1000 digits"
        and shown(-(10**40)) == "-" + "1" + "0" * 25 + "... (41 digits)"
    )


@pytest.mark.parametrize("path", ["~nosuchuser/x", "a\0b", "x" * 5000])
def test_a_path_that_none_can_be_is_wrong_usage(path, tmp_path, capsys):
    with pytest.raises(UsageError):
        user_path(path)
    commands = (["generate", "a", "--output", path], ["generate", "a", "--model", path], ["replay", path],
                ["generate", "a", "--weights", path], ["batch", path], ["info", path],
                ["convert", path, str(tmp_path / "x")], ["plan", "--model", path])  # fmt: skip
    for command in commands:
        assert run(command) == 2, command
        assert "a bug in slagen" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        dict(num_videos=10**9), dict(width=10**9, height=16), dict(width=16, height=10**9), dict(steps=10**9),
        dict(num_frames=4 * 10**9 + 1), dict(fps=10**9), dict(guidance_scale=1e300), dict(flow_shift=1e300),
        dict(seed=10**4000), dict(width=10**4000, height=1),
    ],
    ids=lambda options: next(iter(options)),
)  # fmt: skip
def test_what_is_beyond_all_use_is_refused_before_any_work(options):
    """`--num-videos 1000000000` made a list of a billion names."""
    with pytest.raises(UsageError) as caught:
        GenerateConfig("a", **options)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(sla_topk=1e-300), r"sla_topk is 1e-300, but must be from 1e-09 to 1. Try --sla-topk"),
        (dict(flow_shift=1e-300), r"flow_shift is 1e-300, but must be from 0.0001 to 10000. Try --flow-shift"),
        (dict(sigma_max=1e-300), r"sigma_max is 1e-300, but must be from 0.0001 to 10000. Try --sigma-max"),
        (dict(seed=2**63 - 1, num_videos=2), r"and num_videos is 2.*Try --seed 9223372036854775806\."),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_what_is_too_little_is_told_by_its_own_name_and_bound(options, words):
    """A top-k of 1e-300 was "sparsity is 1.0", and a shift of 1e-300 gave NaN after the sampling."""
    with pytest.raises(UsageError, match=words):
        GenerateConfig("a", **options)


@pytest.mark.parametrize(
    "make",
    [
        lambda: BenchConfig(shapes=("1x12x9999999x9999",)),
        lambda: BenchConfig(lengths=(10**12,)),
        lambda: BenchConfig(model="tiny-wan", steps=10**9),
        lambda: BenchConfig(seconds=1e300),
        lambda: DataConfig(self_generate="x", clips_per_prompt=10**9),
        lambda: DataConfig(path="x", num_frames=4 * 10**9 + 1),
        lambda: FinetuneConfig(DataConfig(path="x"), steps=10**12),
        lambda: FinetuneConfig(DataConfig(path="x"), batch_size=10**12),
        lambda: FinetuneConfig(DataConfig(path="x"), block_m=10**12),
        lambda: BatchConfig("x", GenerateConfig("-"), ray_address="local", ray_workers=10**9),
        lambda: FinetuneConfig(DataConfig(path="x"), train="lora", lora_rank=10**9),
        lambda: ModelDefaults.from_dict({"steps": 10**9}),
        lambda: ModelDefaults.from_dict({"guidance_scale": 10**4000}),
        lambda: ModelDefaults.from_dict({"max_sequence_length": 10**9}),
        lambda: ModelDefaults.from_dict({"training": {"batch_size": 10**12}}),
        lambda: ModelDefaults.from_dict({"trained_sizes": [{"width": 10**12, "height": 1, "num_frames": 1}]}),
    ],
)
def test_so_is_it_elsewhere(make):
    with pytest.raises(UsageError):
        make()


@pytest.mark.parametrize(
    "line", ["a --num-videos 1000000000", "a --w 999999999 --h 16", "a --frames 4000000001", "a --fps 99999999999"]
)
def test_so_is_it_in_a_prompt_file(tmp_path, capsys, line):
    (tmp_path / "prompts.txt").write_text(line)
    assert run(["batch", str(tmp_path / "prompts.txt"), "--output", str(tmp_path / "out")]) == 2
    assert "prompts.txt:1" in capsys.readouterr().err.replace("\n", "") and not (tmp_path / "out").exists()
    (tmp_path / "prompts.txt").write_text("a --num-videos 10000\n" * 11)
    assert run(["batch", str(tmp_path / "prompts.txt"), "--output", str(tmp_path / "out")]) == 2
    assert "110,000 videos" in capsys.readouterr().err


def test_there_is_one_reader():
    """No other file parses JSON or YAML, or expands `~`; two read what their own process has just written."""
    source = Path(slagen.__file__).parent
    own = {"io/documents.py", "doctor/kernel_costs.py", "training/resume.py"}
    for file in source.rglob("*.py"):
        text, name = file.read_text(), file.relative_to(source).as_posix()
        assert name in own or not re.search(r"\bjson\.loads?\(|\byaml\.", text), file
        assert name == "io/paths.py" or ".expanduser()" not in text, file


def test_there_is_one_hash_of_a_file():
    """It was written in seven places, four of which waited for a pipe."""
    package = Path(slagen.__file__).parent
    places = [p.relative_to(package).as_posix() for p in package.rglob("*.py") if "file_digest" in p.read_text()]
    assert places == ["io/reading.py"]


def test_the_bundled_model_is_of_the_forms():
    assert describe_folder(bundled_folder(), "x").shape.num_layers == 6


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("model_index.json", {"transformer_2": 3}, '"transformer_2" is a number'),
        ("model_index.json", {"scheduler": ["os", "system"]}, '"scheduler" is a list, but must be a pair of a library'),
        ("transformer/config.json", {"num_layers": 10**9}, '"num_layers" is 1000000000, but must be a whole'),
        ("transformer/config.json", {"patch_size": 2}, '"patch_size" is a number, but must be a list of three'),
        ("vae/config.json", {"latents_std": [0.0] * 16}, '"latents_std" is a list, but'),
        ("vae/config.json", {"latents_mean": [0.0]}, 'has 1 number in "latents_mean", but must have 16'),
        ("text_encoder/config.json", {"vocab_size": "x"}, '"vocab_size" is text'),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**9}, '"num_train_timesteps" is 1000000000'),
        ("slagen.json", {"steps": [1]}, "steps is a list"),
        *((name, None, "is text, but must be an object") for name in (
            "model_index.json", "transformer/config.json", "vae/config.json", "text_encoder/config.json",
            "scheduler/scheduler_config.json", "slagen.json")),
    ],
    ids=str,
)  # fmt: skip
def test_wrong_types_in_a_models_folder_are_told_with_the_file(tmp_path, capsys, name, change, words):
    for part in bundled_folder().rglob("*.json"):
        copy = tmp_path / "model" / part.relative_to(bundled_folder())
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(part.read_bytes())
    path = tmp_path / "model" / name
    path.write_text(json.dumps("x" if change is None else {**json.loads(path.read_text()), **change}))
    with pytest.raises(WeightsError) as caught:
        describe_folder(tmp_path / "model", "x")
    assert words in str(caught.value) and name in str(caught.value)
    assert run(["plan", "--model", str(tmp_path / "model")]) == 5
    assert words.split(",")[0] in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, "4"]}},
        {"a": {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [10**4000], "data_offsets": [0, 4]}},
        {"a": 3}, [], {"__metadata__": {"slagen": 3}}, {"__metadata__": []},
    ],
    ids=lambda header: str(header)[:60],
)  # fmt: skip
def test_a_header_of_another_form_is_a_broken_file(tmp_path, header, capsys):
    data = json.dumps(header).encode()[:4000]
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(data)) + data + b"\0" * 4)
    with pytest.raises(WeightsError, match="corrupt or incomplete"):
        read_header(path)
    assert run(["info", str(path)]) == 5
    assert run(["plan", "--weights", str(path)]) == 5


# The manifest of a batch, which may come with a folder from anywhere


def queued(**change) -> bytes:
    event = {"v": 1, "event": "queued", "key": "a" * 64, "index": 1, "name": "0001-x-s1-aaaaaaaa.mp4",
             "settings": {"prompt": "p"}, "seed": 1, "lookup": "", "time": 1.0, **change}  # fmt: skip
    return json.dumps(event).encode() + b"\n"


@pytest.mark.parametrize(
    "change",
    [
        *({"key": key} for key in ("../../../x", "k", "A" * 64, "a" * 63, "a" * 64 + "\n", 3, None, [], {})),
        *({"name": name} for name in (
            "javascript:alert(1)//.mp4", "../x.mp4", "/x.mp4", "a/b.mp4", "a\\b.mp4", "manifest.jsonl", "index.html",
            ".mp4", ".hidden.mp4", "-x.mp4", "a\n.mp4", "a.mp4\n", "a\x1b[2J.mp4", "http://x/a.mp4", "%2e.mp4",
            "data:video/mp4;base64,.mp4", "a?b.mp4", "a#b.mp4", "a b.mp4", "a" * 300 + ".mp4", "\ud83d.mp4", 3, None,
            ["a.mp4"])),
        *({"index": index} for index in ("1", 0, -1, 1.5, True, 10**400)),
        *({"seed": seed} for seed in ("1", -1, 2**63, None)),
        *({"settings": settings} for settings in ([], {}, {"prompt": 3}, "x", {"prompt": "\udc00"})),
        *({"lookup": lookup} for lookup in (3, "../x", "a" * 64)),
    ],
    ids=lambda change: ascii(change)[:40],
)  # fmt: skip
def test_a_line_of_the_manifest_that_slagen_would_not_write_is_no_job(tmp_path, change):
    """A key `../../../x` wrote outside the folder, a name `javascript:...` became a live link."""
    manifest = Manifest(tmp_path)
    manifest.path.write_bytes(queued(**change) + queued(key="b" * 64, name="0002-y-s1-bbbbbbbb.mp4"))
    assert list(manifest.read()) == ["b" * 64]


def test_a_name_is_one_jobs_alone(tmp_path):
    manifest = Manifest(tmp_path)
    (wanted,) = Manifest(tmp_path / "other").queue([Wanted({"prompt": "p"}, 1, "p")])
    taken = queued(index=10**12, name=wanted.name)
    manifest.path.write_bytes(taken + queued(key="b" * 64, name=wanted.name.upper().replace("MP4", "mp4")))
    assert list(manifest.read()) == ["a" * 64]
    (job,) = manifest.queue([Wanted({"prompt": "p"}, 1, "p")])
    assert job.key == wanted.key and job.name != wanted.name and job.index < 10**9
    assert Manifest(tmp_path).read()[job.key].name == job.name


@pytest.mark.parametrize(
    "event",
    [
        {"event": "done"}, {"event": "done", "sha256": 3}, {"event": "done", "sha256": "x", "seconds": "1"},
        {"event": "done", "sha256": "x", "seconds": float("nan")}, {"event": "failed", "reason": []},
        {"event": "running", "worker": 3}, {"event": "gone"}, {"event": []},
    ],
    ids=str,
)  # fmt: skip
def test_an_end_that_slagen_would_not_write_is_none(tmp_path, event):
    manifest = Manifest(tmp_path)
    manifest.path.write_bytes(queued() + json.dumps({"v": 1, "key": "a" * 64, **event}).encode() + b"\n")
    assert manifest.read()["a" * 64].state == "queued"


def test_a_manifest_of_one_endless_line_is_passed_over(tmp_path):
    manifest = Manifest(tmp_path)
    manifest.path.write_bytes(b"[" * 3_000_000 + b"\n" + queued())
    assert list(manifest.read()) == ["a" * 64]


def test_a_planted_link_in_place_of_the_locks_is_not_followed(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".slagen").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SlagenError, match="is a symbolic link"):
        Manifest(tmp_path / "out")


def test_the_page_of_a_tampered_folder_links_to_its_videos_alone(tmp_path):
    manifest = Manifest(tmp_path / "out")
    (tmp_path / "secret.mp4").write_bytes(b"secret")
    names = ["0001-x-s1-aaaaaaaa.mp4", "../secret.mp4", "javascript:alert(1)//.mp4", "https://x/y.mp4"]
    for number, name in enumerate(names):
        key = f"{number:064x}"
        done = {"v": 1, "event": "done", "key": key, "sha256": "../../../../x"}
        with manifest.path.open("ab") as handle:
            handle.write(queued(key=key, name=name) + json.dumps(done).encode() + b"\n")
    write_video(np.zeros((5, 16, 16, 3), np.uint8), manifest.folder / names[0], 8)
    for report in ("[]", "{", '{"cost": 3}', '{"cost": {"measured_attention_share": "x"}}', "\udcff"):
        (manifest.folder / names[0]).with_suffix(".json").write_bytes(report.encode(errors="surrogateescape"))
        page = write_page(manifest).read_text()
    assert re.findall(r'href="([^"]*)"', page) == [f"./{names[0]}"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out", "secret.mp4"]
    assert len(list((manifest.folder / ".slagen" / "thumbnails").iterdir())) == 1


@pytest.mark.parametrize(
    ("start", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:", "a Git LFS pointer.*git lfs pull"),
        (b"<!DOCTYPE html>\n<html>", "a web page, not a weight file"),
        (b"\0\0\0\x20ftypisom", "is a video. Give a weight file"),
        (b"PK\3\4\0\0", "a zip archive.*ends in .pth"),
        (b"GGUF\3\0\0\0", "a GGUF file.*ends in .gguf"),
    ],
    ids=["lfs", "web-page", "video", "zip", "gguf"],
)
def test_another_file_under_the_name_of_weights_is_not_called_damaged(tmp_path, start, words):
    path = tmp_path / "x.safetensors"
    path.write_bytes(start + bytes(100))
    with pytest.raises(WeightsError, match=words):
        read_header(path)
    for suffix in (".safetensors", ".pth", ".bin", ".gguf"):
        path = path.rename(path.with_suffix(suffix))
        own = {b"PK": (".pth", ".bin"), b"GG": (".gguf",)}.get(start[:2], ())
        if suffix not in own:
            with pytest.raises(WeightsError, match=words):
                read_tensors(path)


def test_safetensors_under_another_name_are_told(tmp_path):
    save_file({"x": torch.zeros(2)}, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match="is a safetensors file. Give it a name that ends in .safetensors"):
        read_tensors(tmp_path / "x.pth")


def test_a_torchscript_archive_is_told(tmp_path):
    """It was "corrupt or incomplete"."""
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("x/data.pkl", "x/code/__torch__.py", "x/constants.pkl"):
            archive.writestr(name, b"")
    with pytest.raises(WeightsError, match="is a TorchScript archive.*Give the state_dict"):
        read_tensors(path)


@pytest.mark.parametrize(
    ("place", "words"), [("torchao.dtypes", "with torchao"), ("optimum.quanto.tensor", "with optimum-quanto")]
)
def test_a_pickle_of_another_quantiser_is_told(place, words, tmp_path):
    """It was one "that holds more than tensors, which could run code"."""
    (tmp_path / "x.pth").write_bytes(f"\x80\x02c{place}\nTensor\n.".encode("latin-1"))
    with pytest.raises(WeightsError, match=f"is quantised {words}, which (is|are) not supported"):
        read_tensors(tmp_path / "x.pth")


@pytest.mark.parametrize("name", ["x-00001-of-00002.safetensors", "x-00002-of-00012.bin"])
def test_one_shard_is_told_with_its_folder(name, tmp_path):
    """It was "faulty", with most of its tensors missing."""
    path = tmp_path / name
    save_file({"blocks.0.attn1.to_q.weight": torch.zeros(2, 2)}, path)
    for read in (read_tensors, peek):
        with pytest.raises(WeightsError, match=f"is one of (2|12) shards of a model.*{re.escape(str(tmp_path))}.$"):
            read(path)
    with pytest.raises(WeightsError, match="is the index of a sharded model. Give the folder that holds it"):
        read_tensors(path.rename(tmp_path / "x.safetensors.index.json"))
    only = (tmp_path / "x.safetensors.index.json").rename(tmp_path / "x-00001-of-00001.safetensors")
    assert list(read_tensors(only)) == ["blocks.0.attn1.to_q.weight"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_what_is_no_file_is_told_as_what_it_is(tmp_path):
    """/dev/zero and a pipe "did not exist"."""
    pipe = tmp_path / "x.safetensors"
    os.mkfifo(pipe)
    gone = tmp_path / "gone.safetensors"
    link = tmp_path / "link.safetensors"
    link.symlink_to(gone)
    for path, words in (
        (pipe, "is a named pipe."), (Path("/dev/zero"), "is a device."), (gone, "does not exist."),
        (link, "is a broken link."),
    ):  # fmt: skip
        for read in (read_tensors, find_sla_file, read_latents):
            with pytest.raises(WeightsError) as caught:
                read(path)
            assert str(caught.value).startswith(f"{path} {words}")
        with pytest.raises(OSError):
            file_hash(path)


def test_a_line_feed_in_a_path_makes_no_second_line(tmp_path):
    path = tmp_path / "a\nerror: forged\x1b[2J.safetensors"
    path.write_bytes(b"{}")
    with pytest.raises(WeightsError) as caught:
        read_tensors(path)
    assert "\n" not in str(caught.value) and "a\\nerror: forged" in str(caught.value)
    assert str(UsageError("two", "lines\nof a fault")) == "two\nlines\\nof a fault"
    assert explain(OSError(28, "No space left", "a\nb"), [])[0].startswith("a\\nb: No space left")
