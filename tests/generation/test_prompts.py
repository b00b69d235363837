"""Prompt files: what a line says, and that every fault is told with its file, line and column."""

import json
import random

import pytest

from slagen.errors import UsageError
from slagen.generation.config import GenerateConfig
from slagen.generation.prompts import apply, read_prompts


def read(tmp_path, text, suffix=".txt"):
    path = tmp_path / f"prompts{suffix}"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_prompts(str(path))


def test_text(tmp_path):
    text = (
        "\ufeff# a comment\n\na red circle moving right\r\n"
        "  a blue star --seed 42 --size 832x480 --f 17 --g 3.5 --n blurry, grey -- or so --id star_1\n"
        "ein Bär — im Schnee 🐻 --frame_num=5 --num-inference-steps 7 --w 64 --h 96"
    )
    first, second, third = read(tmp_path, text)
    assert (first.prompt, first.fields, first.id) == ("a red circle moving right", {}, "")
    assert second.prompt == "a blue star" and second.id == "star_1" and second.where.endswith(":4")
    assert second.fields == {"seed": 42, "width": 832, "height": 480, "num_frames": 17, "guidance_scale": 3.5,
                             "negative_prompt": "blurry, grey -- or so"}  # fmt: skip
    assert third.prompt == "ein Bär — im Schnee 🐻"
    assert third.fields == {"num_frames": 5, "steps": 7, "width": 64, "height": 96}


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".yaml"])
def test_the_other_forms_say_the_same(tmp_path, suffix):
    text = {
        ".jsonl": '{"prompt": "a", "seed": 3, "num_frames": 9}\n\n{"prompt": "b, c", "id": "x", "guidance-scale": 2}\n',
        ".csv": 'prompt,seed,num_frames,id,guidance-scale\na,3,9,,\n"b, c",,,x,2\n',
        ".yaml": "prompts:\n- {prompt: a, seed: 3, num_frames: 9}\n- prompt: b, c\n  id: x\n  guidance-scale: 2\n",
    }[suffix]
    first, second = read(tmp_path, text, suffix)
    assert (first.prompt, first.fields, first.id) == ("a", {"seed": 3, "num_frames": 9}, "")
    assert (second.prompt, second.fields, second.id) == ("b, c", {"guidance_scale": 2.0}, "x")


def test_a_file_without_a_suffix_is_text(tmp_path):
    assert read(tmp_path, "a --seed 3", "")[0].fields == read(tmp_path, "a --seed 3", ".TXT")[0].fields == {"seed": 3}


def test_a_line_replaces_the_command_lines_settings(tmp_path):
    (request,) = read(tmp_path, "a --sparsity 0.5 --num-videos 3 --steps 2")
    config = apply(GenerateConfig("-", sla_topk=0.1, steps=9, fps=12), request)
    assert (config.prompt, config.sparsity, config.sla_topk, config.steps, config.fps) == ("a", 0.5, None, 2, 12)
    assert config.num_videos == 3
    (request,) = read(tmp_path, "a --steps 2")
    assert apply(GenerateConfig("-", num_videos=4), request).num_videos == 4


@pytest.mark.parametrize(
    ("text", "suffix", "words"),
    [
        ("", ".txt", "contains no prompts"),
        ("# only\n  # comments\n", ".txt", "contains no prompts"),
        ("a\nb --sed 4", ".txt", r"prompts.txt:2:3: --sed is unknown"),
        ("a --model x", ".txt", r":1:3: --model is the same for all prompts and belongs on the command line"),
        ("a --seed", ".txt", r":1:3: --seed is '', but must be a whole number"),
        ("a --l 3 --g 2", ".txt", ":1:9: --l and --g both set the guidance scale"),
        ("a --g 3 --g 2", ".txt", ":1:9: --g is given twice"),
        ('{"promt": "b"}', ".jsonl", r":1: promt is unknown; did you mean prompt\? A line can set prompt, size, "),
        ('{"prompt": "b", "model": "x"}', ".jsonl", ":1: model is the same for all prompts"),
        ('{"prompt": "b", "last_frame": "x"}', ".jsonl", ":1: last_frame is an option of other tools"),
        ('{"prompt": "b", "seed": 1, "d": 2}', ".jsonl", "seed and d both set the seed"),
        (
            '[{"prompt": "a"}]',
            ".json",
            "prompts.json ends in .json, but prompt files end in .txt, .jsonl, .csv, .tsv, ",
        ),
        ("a", ".docx", "prompts.docx ends in .docx"),
        ('{"prompt": }', ".jsonl", r":1:\d+: it is not valid JSON: expected a value"),
        ("a --seed 1 --d 2", ".txt", r":1:12: --seed and --d both set the seed"),
        ("--seed 1", ".txt", r":1:1: the line has no prompt"),
        ("a --num-frames 80", ".txt", "Try --num-frames 81"),
        ("a --size 10", ".txt", "Try --size 832x480"),
        ("a --id ../x", ".txt", "id is '../x'"),
        ("a --id *", ".txt", "id is"),
        ("a --id x\nb --id x", ".txt", r":2: id 'x' is already used in .*:1"),
        ("x" * 1_000_000, ".txt", "1,000,000 characters"),
        (b"a\nb\x00c", ".txt", r":2: it contains a NUL byte"),
        (b"a\nb \xff", ".txt", r":2:3: byte 0xff is not UTF-8"),
        ("ok\n".encode("utf-16"), ".txt", "not UTF-8|NUL"),
        ('{"prompt": "a"}\n{"prompt": 3}', ".jsonl", r":2: prompt is 3"),
        ('{"prompt": "a"', ".jsonl", r":1:\d+: it is not valid JSON: expected a comma"),
        ("[1]", ".jsonl", "must be an object"),
        ('{"prompt": "a", "seed": 1.5}', ".jsonl", "whole number"),
        ('{"prompt": "a", "seed": true}', ".jsonl", "whole number"),
        ('{"prompt": "a", "seed": NaN}', ".jsonl", "whole number"),
        ('{"prompt": "a", "steps": Infinity}', ".jsonl", "whole number"),
        ('{"prompt": "a", "seed": ' + "7" * 5000 + "}", ".jsonl", ":1: it contains a number with"),
        (
            '{"prompt": "a", "guidance_scale": ' + "7" * 401 + "}",
            ".jsonl",
            ":1: guidance_scale is 777",
        ),
        ('{"prompt": "ok"}\n{"prompt": "a circle \\ud83d"}', ".jsonl", ":2: prompt is .* incomplete character"),
        ('{"prompt": "a", "negative_prompt": "\\udc00"}', ".jsonl", "incomplete character"),
        ("- {prompt: a, seed: .inf}\n", ".yaml", "whole number"),
        ("text,seed\na,1", ".csv", r":1: the table has no column named prompt"),
        ("prompt,seed\na", ".csv", r":2: the line has 1 cell,"),
        ('prompt\n"a', ".csv", "is not valid CSV"),
        ("prompts: [a, b", ".yaml", "not valid YAML|YAML tag"),
        ("just text", ".yaml", "must contain a list"),
        ("- {prompt: a}\n- 7\n", ".yaml", r":2: the entry is 7"),
        ("- !!python/object/apply:os.system [ls]", ".yaml", "not valid YAML|YAML tag"),
    ],
)
def test_faults_are_told_where_they_are(tmp_path, text, suffix, words):
    with pytest.raises(UsageError, match=words):
        read(tmp_path, text, suffix)


def test_all_faults_are_told_at_once(tmp_path):
    with pytest.raises(UsageError) as caught:
        read(tmp_path, "\n".join(f"p --bad{i} 1" for i in range(15)))
    assert len(str(caught.value).splitlines()) == 11 and "5 more" in str(caught.value)


def test_ten_thousand_lines(tmp_path):
    assert len(read(tmp_path, "\n".join(f"prompt {i} --seed {i}" for i in range(10_000)))) == 10_000


def test_a_missing_file():
    with pytest.raises(UsageError, match="cannot be read"):
        read_prompts("/nowhere/at all.txt")


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv", ".yaml"])
def test_malformed_files_are_refused_or_read(tmp_path, suffix):
    """400 files with random damage: a UsageError that names the file, or requests that are sound."""
    good = {
        ".txt": "a red circle --seed 3 --size 64x64\nb --id x --steps 4\n# c\n",
        ".jsonl": '{"prompt": "a", "seed": 3}\n{"prompt": "b", "id": "x", "steps": 4}\n',
        ".csv": 'prompt,seed,id\n"a, b",3,\nc,,x\n',
        ".yaml": "- prompt: a\n  seed: 3\n- {prompt: b, id: x, steps: 4}\n",
    }[suffix].encode()
    rng = random.Random(suffix)
    refused = 0
    for _ in range(100):
        data = bytearray(good)
        for _ in range(rng.randrange(1, 6)):
            place = rng.randrange(len(data) + 1)
            kind = rng.randrange(4)
            if kind == 0:
                data[place:place] = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 5)))
            elif kind == 1:
                del data[place : place + rng.randrange(1, 12)]
            elif kind == 2:
                data[place:place] = rng.choice(
                    [b" --", b'"', b"{", b"\n", b"\x00", b": ", b",", b"--seed x", b"\xef\xbb"]
                )
            else:
                data[place:place] = data[: rng.randrange(20)]
        try:
            for request in read(tmp_path, bytes(data), suffix):
                assert request.prompt and json.dumps(request.fields)
                assert apply(GenerateConfig("-"), request).num_videos >= 1
        except UsageError as error:
            refused += 1
            assert f"prompts{suffix}" in str(error)
    assert refused > 20


@pytest.mark.parametrize(
    ("line", "column", "option"),
    [
        ("a cat —seed 7", 7, "--seed"),
        ("a cat –steps 8", 7, "--steps"),
        ("a cat ——num_frames=17", 7, "--num_frames"),
        ("a cat --n blurry ―size 832x480", 18, "--size"),
        ("a cat −s 8", 7, "--s"),
        ("a cat -guidance-scale 5", 7, "--guidance-scale"),
        ("a cat ﹣-Seed 7", 7, "--Seed"),
        ("—model x", 1, "--model"),
    ],
)
def test_a_dash_that_a_word_processor_made_is_told(tmp_path, line, column, option):
    with pytest.raises(UsageError, match=f":2:{column}: .*Write {option} for the option"):
        read(tmp_path, f"a dog\n{line}\n")


@pytest.mark.parametrize(
    "line",
    ["a — seed of doubt", "well-known steps", "rock —n roll", "a man —walking fast", "5 -3 = 2", "-- a", "a—seed 7"],
)
def test_dashes_of_prose_stay(tmp_path, line):
    (request,) = read(tmp_path, line)
    assert request.prompt == line and not request.fields


@pytest.mark.parametrize(
    "text",
    [
        "Prompt;Seed;Num Frames;ID\r\n\"a; b\";3;9;x\r\nc, d;;;\r\n",
        "\ufeffsep=;\r\nPROMPT;seed;num_frames;id\r\n\"a; b\";3;9;x\r\nc, d;;;\r\n",
        "prompt\tseed\tnum-frames\tId\na; b\t3\t9\tx\nc, d\t\t\t\n",
        'sep=\t\n"Prompt"\tSeed\tFrames\tid\na; b\t3\t9\tx\nc, d\t\t\t\n',
        "seed,num frames,Prompt ,id,,\n3,9,a; b,x,,\n,,\"c, d\",,,\n",
        '"sep=|"\nseed|num frames|Prompt|id\n3|9|a; b|x\n||c, d|\n',
    ],
    ids=["semicolon", "sep and BOM", "tab", "sep tab", "empty columns", "bar"],
)  # fmt: skip
def test_csv_as_spreadsheets_write_it(tmp_path, text):
    first, second = read(tmp_path, text, ".csv")
    assert (first.prompt, first.fields, first.id) == ("a; b", {"seed": 3, "num_frames": 9}, "x")
    assert (second.prompt, second.fields) == ("c, d", {})
    with pytest.raises(UsageError, match=rf"prompts.tsv:{4 if 'sep' in text else 3}: .*whole number"):
        read(tmp_path, text.replace("c, d", "c").replace(";;;", ";no;;").replace("\t\t\t", "\tno\t\t")
             .replace(',,"c",', 'no,,"c",').replace("||c|", "no||c|"), ".tsv")  # fmt: skip


def test_one_rule_for_long_prompts(tmp_path):
    read(tmp_path, "é" * 20_000)
    GenerateConfig("é" * 20_000, negative_prompt="é" * 20_000)
    long = "x" * 20_001
    for make in (
        lambda: read(tmp_path, long), lambda: read(tmp_path, json.dumps({"prompt": long}), ".jsonl"),
        lambda: read(tmp_path, f"a --n {long}"), lambda: GenerateConfig(long),
        lambda: GenerateConfig("x", negative_prompt=long),
    ):  # fmt: skip
        with pytest.raises(UsageError, match="20,001 characters, but at most 20,000") as caught:
            make()
        assert len(str(caught.value)) < 250
