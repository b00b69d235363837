"""Pictures of --preview: whole for terminals that say they show them, above the live lines, and nowhere else."""

import base64
import io
import re

import pytest

from slagen.cli import console
from slagen.cli.inline_images import ROWS, escape, protocol
from slagen.cli.progress import GenerateProgress
from slagen.events import Event


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"TERM": "xterm-kitty"}, "kitty"),
        ({"TERM": "xterm-256color", "KITTY_WINDOW_ID": "1"}, "kitty"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "ghostty"}, "kitty"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "iTerm.app"}, "iterm2"),
        ({"TERM": "xterm-256color", "LC_TERMINAL": "iTerm2"}, "iterm2"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "WezTerm"}, "iterm2"),
        ({"TERM": "xterm-256color"}, None),
        ({"TERM": "screen-256color", "KITTY_WINDOW_ID": "1"}, None),
        ({"TERM": "xterm-kitty", "TMUX": "/tmp/tmux"}, None),
        ({"TERM": "xterm-kitty", "CI": "true"}, None),
        ({}, None),
    ],
)
def test_what_a_terminal_says(environ, expected):
    assert protocol(environ) == expected


@pytest.mark.parametrize("size", [1, 3000, 3072, 20_000])
def test_the_whole_picture_is_sent(size):
    png = bytes(range(256)) * (size // 256) + bytes(size % 256)
    sent = re.findall(r"\x1b_G([^;]*);([^\x1b]*)\x1b\\", escape("kitty", png))
    assert base64.b64decode("".join(part for _, part in sent)) == png and all(len(part) <= 4096 for _, part in sent)
    assert [keys.rpartition("m=")[2] for keys, _ in sent] == ["1"] * (len(sent) - 1) + ["0"]
    assert base64.b64decode(escape("iterm2", png).partition(":")[2].partition("\x07")[0]) == png


def test_it_stands_above_what_is_live(monkeypatch, tmp_path):
    screen = io.StringIO()
    monkeypatch.setattr(console, "stderr", console.Console(file=screen, force_terminal=True, width=80, height=24))
    monkeypatch.setenv("TERM", "xterm-kitty")
    for name in ("CI", "TMUX"):
        monkeypatch.delenv(name, raising=False)
    path = tmp_path / "x.preview.png"
    path.write_bytes(b"a picture")
    with GenerateProgress() as progress:
        progress(Event("stage", "denoise", num_steps=4))
        progress._live.refresh()
        before = len(screen.getvalue())
        progress(Event("picture", str(path)))
        progress._live.refresh()
        progress(Event("picture", str(tmp_path / "gone.png")))
        said = screen.getvalue()[before:]
    assert said.count("\x1b_G") == 1 and "\n" * ROWS + f"\x1b[{ROWS}A\x1b_G" in said
    assert said.index("\x1b_G") < said.rindex("denoising")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("KITTY_WINDOW_ID", raising=False)
    progress(Event("picture", str(path)))
    assert screen.getvalue().count("\x1b_G") == 1
