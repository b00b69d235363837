"""Text of users: refused where it is none, told where it is cut, and never obeyed by a terminal."""

import io
import json
import re
from types import SimpleNamespace

import pytest

from slagen.benchmark.config import BenchConfig
from slagen.cli.main import run
from slagen.errors import UsageError
from slagen.generation.config import GenerateConfig
from slagen.io.text import check_prompt, counted, cut, encodable, escaped, line, message, quote, to_json
from slagen.training.config import DataConfig, FinetuneConfig

HARMLESS = "é e\u0301 狐 🦊 👩\u200d🚀 🏳\ufe0f\u200d🌈 ฉัน สวัสดี ﺍلعربية \u3000 [bold]x[/] :smile: \\"
HARMFUL = "\x00\x07\x08\t\r\x1b]52;c;aGk=\x07\x1b[31m\x7f\x85\u061c\u200f\u202e\u2066\u2028\u2029\ufeff\ud83d \udcff"


def is_harmless(text):
    return not re.search(
        r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]", text
    )


def test_what_a_terminal_obeys_is_escaped_and_the_rest_stays():
    assert escaped(HARMLESS) == HARMLESS
    assert escaped(HARMFUL) == (
        "\\x00\\x07\\x08\\t\\r\\x1b]52;c;aGk=\\x07\\x1b[31m\\x7f\\x85\\u061c\\u200f\\u202e\\u2066\\u2028\\u2029"
        "\\ufeff\\ud83d \\xff"
    )
    every = "".join(map(chr, range(0x110000)))
    assert is_harmless(escaped(every)) and escaped(every).count("\n") == 1 and "\n" not in line(every)
    assert encodable("é🦊", "ascii") == "\\xe9\\U0001f98a" and encodable("é🦊", None) == "é🦊"


def test_json_is_exact_and_harmless():
    content = {HARMLESS + HARMFUL: [HARMFUL + HARMLESS, 1.5, None]}
    text = to_json(content, indent=2, exact=True)
    assert is_harmless(text) and "🦊" in text
    assert json.loads(text) == content and json.loads(text.encode()) == content
    assert json.loads(to_json(["a\\ caf\udce9\x1b"])) == ["a\\ caf\\xe9\x1b"]


def test_one_of_a_thing_is_no_plural():
    """There were "1 videos", "1 frames" and "1 tensors" all over."""
    assert [counted(n, "forward pass") for n in (0, 1, 2)] == ["0 forward passes", "1 forward pass", "2 forward passes"]
    assert counted(1, "video") == "1 video"


def test_messages_carry_a_line_of_a_text():
    long = "x" * 100_000
    assert len(cut(long)) == 60 and len(quote(long)) == 62 and quote(f"a\n{HARMFUL}").isascii()
    assert len(message(f"a{long}z\nb")) < 700 and message(f"a{long}z\nb").endswith("z\nb")


@pytest.mark.parametrize("text", [b"caf\xe9", "naïve".encode("utf-16")], ids=["latin-1", "utf-16"])
@pytest.mark.parametrize(
    "arguments",
    [["generate", "TEXT"], ["generate", "-p", "TEXT"], ["generate", "x", "-n", "TEXT"], ["generate", "x", "-nTEXT"],
     ["plan", "TEXT"], ["batch", "FILE", "-n", "TEXT"], ["generate", "--prompts", "FILE", "-n", "TEXT"],
     ["generate", "-"], ["batch", "-"], ["batch", "FAULTY"], ["generate", "--prompts", "FAULTY"],
     ["finetune", "--self-generate", "FAULTY"], ["generate", "TEXT", "--dry-run"]],
    ids=" ".join,
)  # fmt: skip
def test_text_that_is_no_utf8_is_refused_before_anything_is_loaded(tmp_path, monkeypatch, capfd, text, arguments):
    """As the interpreter hands it over: bytes that are no UTF-8 as halves of pairs, stdin as bytes."""

    def load(*arguments, **options):
        raise AssertionError("loaded")

    for place in ("generation.sharing.Session", "batch.worker.Session", "training.data.self_generate.Session"):
        monkeypatch.setattr(f"slagen.{place}", load)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.txt").write_text("a circle\n")
    (tmp_path / "faulty.txt").write_bytes(b"a circle\nb " + text)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text), encoding="latin-1"))
    given = text.replace(b"\0", b"").decode("utf-8", "surrogateescape")  # no argument holds a NUL byte
    names = {"TEXT": given, "FILE": "good.txt", "FAULTY": "faulty.txt"}
    assert run([re.sub("TEXT|FILE|FAULTY", lambda match: names[match[0]], word) for word in arguments]) == 2
    out, err = capfd.readouterr()
    assert not out and re.search(r"error: .*(UTF-8|NUL)", err) and is_harmless(err) and "bug" not in err
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["faulty.txt", "good.txt"]


@pytest.mark.parametrize("data", [b"\xef\xbb\xbfa blue star \r\n", "a blue star — ★".encode()])
def test_stdin_is_utf8_whatever_the_locale(monkeypatch, data):
    seen = []
    monkeypatch.setattr(
        "slagen.generation.generate.generate", lambda config, on_event: seen.append(config.prompt) or 1 / 0
    )
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data), encoding="ascii"))
    run(["generate", "-"])
    assert seen == [data.decode("utf-8-sig").strip()]


def test_stdin_that_is_closed_or_without_end(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", None)
    assert run(["generate", "-"]) == 2 and "stdin is closed" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=SimpleNamespace(read=lambda most: b"y\n" * (most // 2))))
    assert run(["generate", "-"]) == 2 and "at most 20,000" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["clip.apng", "o/x.MOV", "a.mkv", "x.json", "tuned.safetensors", "[x].PnG",
                                  "x.mp4 "])  # fmt: skip
def test_an_output_is_a_video_or_a_folder(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    makers = [lambda path: GenerateConfig("x", output=path), lambda path: BenchConfig(output=path),
              lambda path: FinetuneConfig(DataConfig("d"), output=path)]  # fmt: skip
    for make in makers:
        with pytest.raises(UsageError, match="must be a folder.*put a slash at its end"):
            make(name)
        make(f"{name}/")
    assert not list(tmp_path.iterdir())
    (tmp_path / name).mkdir(parents=True)
    for make in makers:
        make(name)
    for other in ("clip.mp4", "clip.MP4", "outputs", "day:1", "v1.2", "2026.11", "..", "./-x.mp4", "a.b/c", "~/x"):
        GenerateConfig("x", output=other)
    with pytest.raises(UsageError, match="must be a folder"):
        FinetuneConfig(DataConfig("d"), output="clip.mp4")


@pytest.mark.parametrize(
    "line",
    [["generate", "x", "--output", ""], ["info", ""], ["bench", "--output", " "], ["finetune", "--data", ""],
     ["generate", "x", "--weights", ""], ["finetune", "data", "v", "--output", ""], ["plan", "x", "--model", ""]],
    ids=" ".join,
)  # fmt: skip
def test_an_empty_path_is_refused(line, tmp_path, monkeypatch, capsys):
    """It was the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "v").mkdir()
    assert run(line) == 2
    told = capsys.readouterr().err
    assert " is empty. Give " in told and told.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["v"]


def test_outputs_that_are_none_are_refused_by_every_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for command in (
        "generate x -o a.mov",
        "batch f -o a.mov",
        "plan x -o a.mov",
        "bench -o a.json",
        "convert x a.pth",
        "finetune data d -o a.mp4",
        "finetune --data d -o a.mov",
        "replay x -o a.mov",
        "replay x -o a",
    ):
        assert run(command.split()) == 2
        assert re.search(r"output is 'a(\.\w+)?', but must be", capsys.readouterr().err), command
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        (["generate", "--fast car"], "slagen generate -- '--fast car'"),
        (["plan", "--fast car"], "slagen plan -- '--fast car'"),
        (["generate", "-fast car"], "slagen generate -- '-fast car'"),
        (["generate", "a car", "—steps", "4"], "two hyphens: --steps"),
        (["generate", "a car", "–seed=4"], "two hyphens: --seed=4"),
        (["generate", "—steps 4"], "Write --steps"),
        (["generate", "a", "red", "car"], "Put a prompt of several words in quotes"),
        (["generate", "x", "--sparsty", "1"], "--sparsity"),
    ],
)
def test_arguments_that_were_meant_otherwise(capsys, arguments, advice):
    assert run(arguments) == 2
    assert advice in capsys.readouterr().err


def test_a_prompt_behind_two_hyphens(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "slagen.generation.generate.generate", lambda config, on_event: seen.append(config.prompt) or 1 / 0
    )
    run(["generate", "--", "--fast car"])
    run(["generate", "— an old man"])
    assert seen == ["--fast car", "— an old man"]


def test_where_a_text_is_cut_is_told():
    from wan_models import build_pipeline

    from slagen.training.data.encode import encode_texts
    from slagen.wan.texts import describe_cut

    tokenizer = build_pipeline().tokenizer
    assert describe_cut(tokenizer, "a red circle " * 2, 8) is None and describe_cut(tokenizer, "a " * 7, 8) is None
    told = describe_cut(tokenizer, "a red circle &amp; a red circle, and a blue one", 8)
    assert told == (
        "has 12 tokens, but the model reads only the first 8: it reads up to 'a red circle & a red circle,' and "
        "ignores everything from 'and a blue one' on"
    )
    events = []
    pipe = SimpleNamespace(tokenizer=tokenizer, _execution_device="cpu", encode_prompt=lambda **options: ([None], None))
    store = SimpleNamespace(add=lambda *parts: None, flush=lambda: None)
    texts = {f"{i} " + "circle " * 20: str(i) for i in range(12)}
    source = SimpleNamespace(defaults=SimpleNamespace(max_sequence_length=8))
    encode_texts(pipe, list(texts), texts, store, source, events.append)
    warned = [event.text for event in events if event.kind == "warning"]
    assert len(warned) == 10 and "has 22 tokens" in warned[0] and warned[-1].endswith("(12 captions are truncated)")


def test_check_prompt():
    check_prompt("prompt", HARMLESS)
    for text in ("a\0", "a\ud83d", "caf\udce9"):
        with pytest.raises(UsageError, match="is not valid UTF-8 text") as caught:
            check_prompt("prompt", text)
        assert is_harmless(str(caught.value))


@pytest.mark.parametrize(
    "command",
    [
        ["generate", "x", "--model", "FOLDER"],
        ["generate", "x", "-o", "FOLDER.png"],
        ["batch", "FOLDER"],
        ["info", "FOLDER"],
        ["generate", "x", "--weights", "FOLDER"],
        ["decode", "FOLDER"],
    ],
    ids=" ".join,
)
def test_a_path_is_named_in_full(command, capsys):
    """Of more than 60 characters the middle was left out, which hides the slip of the pen."""
    folder = "some-folder/" * 10 + "and-a-file"
    assert run([part.replace("FOLDER", folder) for part in command]) == 2
    assert folder in capsys.readouterr().err
