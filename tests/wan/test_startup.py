"""What the command imports: no more than its run uses, and only in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
UNUSED = (
    "peft", "bitsandbytes", "gguf", "scipy", "sklearn", "torchvision", "sympy", "torch._dynamo.convert_frame",
    "torch._inductor", "torch.distributed.tensor", "matplotlib", "ray", "tensorboard", "av", "pandas",
)  # fmt: skip


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own, with these arguments to the command."""
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests" / "support")])
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths}, timeout=1800,
    )  # fmt: skip


COMMAND = """
import sys
from slagen.cli.main import main
try:
    main()
except SystemExit as stop:
    code = stop.code
"""


@pytest.mark.parametrize("arguments", [("--help",), ("generate", "--help"), ("--version",)], ids=" ".join)
def test_help_imports_nothing_heavy(arguments):
    heavy = "{'torch', 'numpy', 'diffusers', 'transformers', 'huggingface_hub', 'jinja2', 'psutil', 'rich'}"
    done = python(f"{COMMAND}print('code', code, sorted({heavy} & sys.modules.keys()))", *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("code 0 []\n")


def test_ctrl_c_while_importing_is_quiet(monkeypatch, capsys):
    """It ended with a traceback of whatever module was being read."""

    class Interrupting:
        @staticmethod
        def find_spec(name, *_):
            if name == "slagen.cli.main":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "slagen.cli.main", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Interrupting, *sys.meta_path])
    from slagen.__main__ import main

    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 130 and capsys.readouterr() == ("", "")


def test_the_command_begins_with_next_to_no_import():
    """What is imported before Ctrl-C is caught."""
    code = """
import importlib, os, sys
before = set(sys.modules)
import slagen.__main__
print(*sorted(set(sys.modules) - before))
"""
    done = python(code)
    assert done.stdout.split() == ["slagen", "slagen.__main__"], done.stderr


@pytest.mark.slow
def test_a_run_imports_nothing_that_it_does_not_use(tmp_path):
    """The bundled model, text to file; and the compiler is there all the same, as soon as something is compiled."""
    code = f"""{COMMAND}
assert code == 0, code
print("found", *(name for name in {UNUSED} if sys.modules.get(name) is not None))
import torch
print("compiled", torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2)).tolist())
print("dynamo", hasattr(sys.modules["torch._dynamo"], "__file__"), torch._dynamo is sys.modules["torch._dynamo"])
"""
    small = ["--size", "32x32", "--num-frames", "5", "--steps", "1", "--timing", "off"]
    prompt = ["generate", "a red circle moving right", "--model", "tiny-wan", "--device", "cpu"]
    done = python(code, *prompt, *small, "--output", str(tmp_path / "a.mp4"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1:] == ["found", "compiled [2.0, 2.0]", "dynamo True True"]
    assert (tmp_path / "a.json").is_file()


@pytest.mark.slow
def test_weights_say_what_is_used(tmp_path):
    """A GGUF file is read with gguf, which a run with any other weights leaves out."""
    pytest.importorskip("gguf", reason="needs the extra slagen[gguf]")
    path = tmp_path / "wan.gguf"
    path.write_bytes(b"GGUF")
    done = python(f"{COMMAND}sys.exit(code)", "generate", "x", "--model", "tiny-wan", "--weights", str(path))
    assert done.returncode == 5
    assert "is corrupt" in done.stderr and "Install" not in done.stderr


@pytest.mark.slow
def test_a_library_leaves_nothing_out():
    """Whoever imports slagen, or calls its command within a program, can load a LoRA into a pipeline afterwards."""
    pytest.importorskip("peft", reason="needs the extra slagen[finetune]")
    code = """
from slagen.cli.main import run
assert run(["generate", "x", "--model", "./nowhere"]) == 2
from wan_models import build_transformer
from slagen.training.lora import add_lora
model = build_transformer()
add_lora(model, 2, 0)
print(sum(".lora_A." in name for name, _ in model.named_parameters()))
from diffusers.utils import is_bitsandbytes_available, is_scipy_available
from importlib.util import find_spec
assert is_scipy_available() == (find_spec("scipy") is not None)
assert is_bitsandbytes_available() == (find_spec("bitsandbytes") is not None)
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "8\n"  # two layers with four projections each
