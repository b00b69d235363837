"""Errors name options at the command line and arguments in Python, from one text."""

import ast
import re
from pathlib import Path
from typing import get_args

import pytest

import slagen
from slagen import errors
from slagen.attention import registry
from slagen.batch.config import BatchConfig
from slagen.benchmark.config import BenchConfig
from slagen.errors import UsageError, for_the_command_line, in_python
from slagen.generation.config import GenerateConfig
from slagen.settings import settings_of
from slagen.training.config import DataConfig, FinetuneConfig
from slagen.tuning.config import TuneConfig
from slagen.wan.caches import CACHES
from slagen.wan.folder import BUNDLED
from slagen.wan.presets import PRESETS

ROOT = Path(slagen.__file__).parent
OWN = {method.config for method in registry.METHODS.values()}
CONFIGS = (
    GenerateConfig,
    FinetuneConfig,
    BatchConfig,
    BenchConfig,
    DataConfig,
    TuneConfig,
    *sorted(OWN, key=lambda kind: kind.__name__),
)


@pytest.mark.parametrize(
    ("at_the_command_line", "from_python"),
    [
        ("num_frames is 80, but must be a multiple of 4, plus 1. Try --num-frames 81.",
         "num_frames is 80, but must be a multiple of 4, plus 1. Try num_frames=81."),
        ("Give both: --size 832x480.", "Give both: width=832, height=480."),
        ("Try fewer --num-frames or a smaller --size.", "Try fewer num_frames or a smaller width and height."),
        ("--sparsity 0.5 and --sla-topk 0.1 both say it.", "sparsity=0.5 and sla_topk=0.1 both say it."),
        ("--sampler is rcm. Leave --sampler out.", "sampler is rcm. Leave sampler out."),
        ("Give SLA weights with --weights, run these with --attention dense, or go on with --allow-untrained.",
         "Give SLA weights with weights=, run these with attention='dense', or go on with allow_untrained=True."),
        ("Choose another --output or --seed, or replace it with --overwrite.",
         "Choose another output or seed, or replace it with overwrite=True."),
        ("Try --steps 4 --guidance-scale 1 --sampler dpm++", "Try steps=4, guidance_scale=1, sampler='dpm++'"),
        ("Try --model wan2.1-t2v-1.3b (or -14b).", "Try model='wan2.1-t2v-1.3b' (or -14b)."),
        ("Install it again: pip install --force-reinstall imageio-ffmpeg.",
         "Install it again: pip install --force-reinstall imageio-ffmpeg."),
        ("this makes the video of it: slagen decode a.safetensors --output b.mp4",
         "this makes the video of it: slagen decode a.safetensors --output b.mp4"),
        ("the prompt 'a fox --steps 5' is cut", "the prompt 'a fox --steps 5' is cut"),
        ("Wan's --sampler is SLA's", "Wan's sampler is SLA's"),
    ],
)  # fmt: skip
def test_options_are_arguments_in_python(at_the_command_line, from_python):
    assert in_python(at_the_command_line) == from_python
    assert in_python(from_python) == from_python


def test_one_error_is_read_in_both_places(monkeypatch):
    monkeypatch.setattr(errors._Reader, "at_command_line", False)
    error = UsageError("steps is 0. Try --steps 50.")
    assert str(error) == "steps is 0. Try steps=50."
    with for_the_command_line():
        assert str(error) == "steps is 0. Try --steps 50."
    assert str(error) == "steps is 0. Try steps=50."


def test_flags_are_those_of_the_configs():
    flags = {s.name for kind in CONFIGS for s in settings_of(kind) if s.kind is bool and s.about.help}
    assert flags == errors.FLAGS


def messages() -> list[str]:
    """Every string that may be a message, but the command line's own; what is filled in stands as XX."""
    found = []
    for path in ROOT.rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        if "--" not in source or path.relative_to(ROOT).parts[0] == "cli":
            continue
        skipped: set[int] = set()  # docstrings, and parts of what was looked at as a whole
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Expr):
                skipped.add(id(node.value))
            elif isinstance(node, ast.JoinedStr):
                skipped |= {id(part) for part in node.values}
                found.append("".join(part.value if isinstance(part, ast.Constant) else "XX" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skipped:
                found.append(node.value)
    return [text for text in found if re.search(r"--[a-z]", text)]


def test_a_word_behind_an_option_is_known():
    """As a value of it, or as none: or a message from Python says sampler='is'."""
    choices = {str(v) for kind in CONFIGS for s in settings_of(kind) for v in get_args(s.kind)}
    values = choices | {BUNDLED, *PRESETS, *CACHES, "cpu", "auto", "cuda", "480p"}
    values |= {"mag:calibrate=1", "mag:ratios=report.json"}
    found = messages()
    assert len(found) > 100
    words = {word for text in found for word in re.findall(r"='([a-z][^']*)'", in_python(text))}
    assert words - values == set()
