"""README and the pages of docs/: their code blocks, the commands in these, and running them."""

import contextlib
import dataclasses
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from slagen.cli.main import run
from slagen.wan.defaults import ModelDefaults

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", *sorted(f"docs/{file.name}" for file in (ROOT / "docs").glob("*.md")))
BLOCK = re.compile(r"(?:<!-- ([^\n]*?) -->\n)?```(\w*)\n(.*?)```", re.DOTALL)
SHELL = {"|", "<", ">", "<<", ">>", "&&", ";"}  # signs that only a shell understands


@dataclass(frozen=True)
class Block:
    """A code block: its language, its text, and what the comment before it says ("not run: why", "slow" or "")."""

    language: str
    code: str
    mark: str

    @property
    def runs(self) -> bool:
        return self.language in ("bash", "python") and not self.mark.startswith("not run")


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(text: str) -> list[Block]:
    return [
        Block(found[2], found[3], "" if (found[1] or "").startswith("made by") else found[1] or "")
        for found in BLOCK.finditer(text)
    ]


def statements(code: str) -> Iterator[str]:
    """The commands of a shell's block, one after the other; text between <<END and END belongs to its command."""
    lines = iter(code.splitlines())
    for line in lines:
        if not line.strip() or line.startswith("#"):
            continue
        while line.endswith("\\"):
            line = f"{line[:-1]} {next(lines).strip()}"
        if "<<END" in line:
            line = "\n".join([line, *iter(lambda: next(lines), "END"), "END"])
        yield line


def slagen_arguments(statement: str) -> list[str] | None:
    """What a command gives to slagen; None for another command."""
    words = shlex.split(statement.partition("<<")[0], comments=True)
    if "slagen" not in words:
        return None
    given = words[words.index("slagen") + 1 :]
    ends = [index for index, word in enumerate(given) if word in SHELL]
    return given[: ends[0]] if ends else given


def run_block(block: Block, folder: Path, names: dict[str, Any]) -> None:
    """Run a block in a folder, which is the current one. `names`: what earlier blocks of Python defined."""
    if block.language == "python":
        exec(compile(block.code, "a page", "exec"), names)
        return
    for statement in statements(block.code):
        words = shlex.split(statement.partition("<<")[0], comments=True)
        if words[0] == "slagen" and not SHELL & set(words):
            assert run(words[1:]) == 0, statement
        else:
            script = f'slagen() {{ {shlex.quote(sys.executable)} -m slagen "$@"; }}\n{statement}'
            subprocess.run(["bash", "-ec", script], cwd=folder, check=True)


@contextlib.contextmanager
def small_clips() -> Iterator[None]:
    """Models make clips of 64x64 pixels and five frames, in two steps, where a command says nothing else.

    Most of a page's time was the decoding of clips that nobody looks at; test_generate.py makes one of full size.
    """
    whole = ModelDefaults.from_dict

    def small(fields: dict[str, Any]) -> ModelDefaults:
        return dataclasses.replace(whole(fields), width=64, height=64, num_frames=5, steps=2, trained_sizes=None)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModelDefaults, "from_dict", small)
        yield
