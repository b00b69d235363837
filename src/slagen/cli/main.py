"""Run `slagen`: call the command, and end with one message and an exit code whatever fails."""

import functools
import gc
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any

import typer

from slagen import torchrun
from slagen.cli import allocator, ranks, streams
from slagen.cli.app import app
from slagen.errors import Interrupted, UsageError, for_the_command_line
from slagen.interrupts import ENDING, INTERRUPTED
from slagen.io.text import escaped

__all__ = ["app", "main", "run"]


def main(arguments: list[str] | None = None) -> None:
    """Run the command and exit with its code; every expected failure is one message."""
    for number in ENDING:  # end as Ctrl-C does: part files go, the code is 130
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup sets SIGHUP
            signal.signal(number, signal.default_int_handler)
    if arguments is not None:
        sys.exit(run(arguments))
    streams.mend()
    allocator.keep_freed_memory()
    try:
        os.getcwd()
    except OSError as error:  # MKL and others end the process over it
        _show_error(f"the current folder no longer exists ({error.strerror}). Change to an existing folder: cd ~")
        sys.exit(UsageError.exit_code)
    code = run(sys.argv[1:], own_process=True)
    sys.stdout.flush()
    gc.freeze()  # or Python, before it ends, looks for garbage among all objects of PyTorch, for a second or more
    sys.exit(code)


def run(arguments: list[str], *, own_process: bool = False) -> int:
    """Run the command and return its exit code; what is wrong is said in one message.

    Args:
        own_process: the process ends with the command, so that nothing need be imported that it does not use.
    """
    with for_the_command_line():
        return _run(arguments, own_process)


@functools.cache  # of all options of all commands: a program that calls `run` often builds it once
def _command() -> Callable[..., Any]:
    return typer.main.get_command(app)


def _run(arguments: list[str], own_process: bool) -> int:
    try:
        with ranks.quiet():
            code = _command()(arguments, prog_name="slagen", obj={"own_process": own_process}, standalone_mode=False)
    except SystemExit as stop:
        code = stop.code
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        from slagen.cli import usage

        _debug()
        explained, code = usage.explain(error, arguments)
        if (text := ranks.worded(error, explained)) is None:
            return code
        if isinstance(error, Interrupted):
            _show_error(text)
            return code
        if text.startswith("Usage: "):
            typer.echo(text, err=True)
        else:
            _show_error(text)
    if code == INTERRUPTED and torchrun.rank() == 0:
        _show_error("interrupted. Finished files are kept, unfinished ones are removed. Run the same command again.")
    return code if isinstance(code, int) else 0


def _show_error(text: str) -> None:
    from slagen.cli import console

    console.show_error(text)


def _debug() -> None:
    if os.environ.get("SLAGEN_DEBUG") == "1":
        sys.stderr.write(escaped(traceback.format_exc()))
