"""Pictures in terminals that show them: the graphics protocols of kitty and of iTerm2, above what is live.

Sources: sw.kovidgoyal.net/kitty/graphics-protocol and iterm2.com/documentation-images.html.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slagen.cli import console

ROWS = 8  # of text that a picture is high
CHUNK = 4096  # characters of base64 in one of kitty's escape sequences
KITTY = {"xterm-kitty", "xterm-ghostty", "kitty", "ghostty"}  # by TERM or TERM_PROGRAM
ITERM = {"iTerm.app", "WezTerm"}


def protocol(environ: Mapping[str, str]) -> str | None:
    """The protocol that a terminal understands, by what it says in the environment: "kitty", "iterm2", or None; None
    too under tmux and screen, which keep pictures from it."""
    term, program = environ.get("TERM", ""), environ.get("TERM_PROGRAM", "")
    if environ.get("CI") or environ.get("TMUX") or term.startswith(("screen", "tmux", "dumb")):
        return None
    if environ.get("KITTY_WINDOW_ID") or {term, program} & KITTY:
        return "kitty"
    return "iterm2" if program in ITERM or environ.get("LC_TERMINAL") == "iTerm2" else None


def escape(name: str, png: bytes) -> str:
    """What draws a PNG at the cursor, `ROWS` high, and leaves the cursor where it was."""
    data = base64.b64encode(png).decode()
    if name == "iterm2":
        return f"\x1b7\x1b]1337;File=inline=1;size={len(png)};height={ROWS};preserveAspectRatio=1:{data}\x07\x1b8"
    parts = [data[start : start + CHUNK] for start in range(0, len(data), CHUNK)]
    keys = [f"m={int(index + 1 < len(parts))}" for index in range(len(parts))]
    keys[0] = f"a=T,f=100,q=2,C=1,r={ROWS},{keys[0]}"
    return "".join(f"\x1b_G{key};{part}\x1b\\" for key, part in zip(keys, parts, strict=True))


def show(path: Path) -> None:
    """A PNG on stderr, where that is a terminal that shows pictures; nothing elsewhere."""
    name = protocol(os.environ) if console.stderr.is_terminal else None
    if name is None:
        return
    try:
        png = path.read_bytes()
    except OSError:  # it is replaced, or the run has ended
        return
    console.stderr.print(_Picture(escape(name, png)))


class _Picture:
    """For rich: room of so many lines, and a picture in it."""

    def __init__(self, drawn: str) -> None:
        self.drawn = drawn

    def __rich_console__(self, printer: Any, options: Any) -> Any:
        from rich.segment import ControlType, Segment

        yield Segment("\n" * ROWS)
        up, down = f"\x1b[{ROWS}A", f"\x1b[{ROWS}B"
        yield Segment(up + self.drawn + down, None, [(ControlType.CARRIAGE_RETURN,)])
