"""Standard streams that are closed or broken, signals of a terminal that goes, a Python without docstrings."""

import os
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest

from slagen.cli.main import main, run
from slagen.interrupts import stopping

POSIX = pytest.mark.skipif(os.name != "posix", reason="needs a POSIX shell")


def shell(line):
    """A line of bash in which `slagen` is the command; its exit code, and what it says on stderr."""
    function = f'slagen() {{ "{sys.executable}" -m slagen "$@"; }}; '
    done = subprocess.run(["bash", "-c", function + line], capture_output=True, text=True, timeout=1800)
    return done.returncode, done.stderr


@POSIX
@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        ("slagen models >&-", 0, ""),
        ("slagen --help >&- 2>&-", 0, ""),
        ("slagen generate - <&- >&-", 2, "the prompt is empty"),
        ("slagen models --sneed 2>&-", 2, ""),
        ("set -o pipefail; slagen models | head -c 0", 0, ""),
        ("slagen models >/dev/full", 1, "No space left on device"),
    ],
    ids=["stdout", "help", "stdin", "stderr", "pipe", "full"],
)  # fmt: skip
def test_streams_that_are_closed_or_broken(line, code, words):
    """They were bugs in slagen, for Python has None in their place; a reader that has gone was a failure."""
    if "/dev/full" in line and not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    found, told = shell(line)
    assert found == code, told
    assert words in told and "bug" not in told and "Traceback" not in told and "ignored" not in told
    assert words or not told


def test_a_hang_up_stops_as_a_termination_does():
    """A finetune died of it without a checkpoint, as soon as its terminal was closed."""
    before = signal.getsignal(signal.SIGHUP)
    stop, said = threading.Event(), []
    with stopping(stop, lambda: said.append(1)):
        signal.raise_signal(signal.SIGHUP)
        assert stop.is_set() and said == [1]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGHUP)
    with pytest.raises(KeyboardInterrupt), stopping(threading.Event(), print, at_once=(signal.SIGHUP,)):
        signal.raise_signal(signal.SIGHUP)
    assert signal.getsignal(signal.SIGHUP) == before


def test_what_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stop = threading.Event()
        with stopping(stop, print):
            signal.raise_signal(signal.SIGHUP)
        assert not stop.is_set() and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@POSIX
def test_a_hang_up_ends_the_command_with_130(tmp_path):
    code = """
import os, signal, sys
from slagen.cli import generate, main
generate.read_prompt = lambda *a: os.kill(os.getpid(), signal.SIGHUP)
sys.argv = ["slagen", "generate", "x"]
main.main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=1800, cwd=tmp_path)
    assert done.returncode == 130, done.stderr


def test_python_without_docstrings(monkeypatch, capsys):
    """diffusers fails as it is imported, in pages."""
    monkeypatch.setattr(
        "slagen.cli.startup.sys", SimpleNamespace(**{**vars(sys), "flags": SimpleNamespace(optimize=2)})
    )
    assert run(["generate", "a red circle"]) == 4
    told = " ".join(capsys.readouterr().err.split())
    assert "-OO or PYTHONOPTIMIZE=2" in told and "a bug in slagen" not in told


@pytest.mark.parametrize(("scheme", "words"), [("socks5", "pip install socksio"), ("gopher", "check ALL_PROXY")])
def test_a_proxy_that_cannot_be_used(monkeypatch, capsys, tmp_path, scheme, words):
    """The package was named by httpx alone, in a bug in slagen."""
    from huggingface_hub.utils import close_session

    monkeypatch.setitem(sys.modules, "socksio", None)
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, f"{scheme}://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    close_session()
    try:
        assert run(["generate", "x", "--model", "nobody/has-this", "--device", "cpu"]) == 4
    finally:
        close_session()
    told = " ".join(capsys.readouterr().err.split())
    assert words in told and "a bug in slagen" not in told


def test_a_current_folder_that_is_gone_is_told(monkeypatch, capsys):
    """oneMKL ended the process with words about a library."""

    def gone():
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr("os.getcwd", gone)
    monkeypatch.setattr("slagen.cli.streams.mend", lambda: None)
    monkeypatch.setattr("slagen.cli.main.run", lambda *a, **k: pytest.fail("it runs"))
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2 and capsys.readouterr().err.startswith("error: the current folder no longer exists")


def test_columns_of_zero_hide_nothing(monkeypatch, capsys):
    """rich printed nothing then, and the command ended with 0."""
    monkeypatch.setenv("COLUMNS", "0")
    assert run(["methods"]) == 0
    assert "dense" in capsys.readouterr().out
