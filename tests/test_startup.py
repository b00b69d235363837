"""What the command imports: no more than its run uses, and only in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own, with these arguments to the command."""
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths}, timeout=300,
    )  # fmt: skip


COMMAND = """
import sys
from slagen.cli import main
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
