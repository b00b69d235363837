"""Processes for tests that need several: forked from one that has imported slagen, torch and diffusers already.

A fresh process takes seconds to import them, and torchrun's own takes as long again. The process they are forked from
has run no backward pass, after which PyTorch forbids forking.
"""

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

PRELOADED = ["torch", "slagen.cli.main", "slagen.training.finetune", "slagen.wan.loading", "train_together"]
HERE = Path(__file__).parent


def start(task: Callable[..., Any], arguments: list[Any], output: Path, **environment: str) -> BaseProcess:
    """Run task(*arguments) elsewhere; stdout goes into `output`, stderr beside it, and its result is the exit code."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=_run, args=(task, arguments, str(output), environment))
    with pytest.MonkeyPatch.context() as patch:  # the first process of all imports what is preloaded
        patch.setenv("PYTHONPATH", os.pathsep.join([str(HERE.parents[1] / "src"), str(HERE)]))
        patch.setenv("OMP_NUM_THREADS", "1")
        process.start()
    return process


def _run(task: Callable[..., Any], arguments: list[Any], output: str, environment: dict[str, str]) -> None:
    for number, name in ((1, output), (2, f"{output}.err")):
        with open(name, "wb") as file:
            os.dup2(file.fileno(), number)
    os.environ.update(environment)
    sys.exit(task(*arguments))


def run_together(task: Callable[..., Any], arguments: list[Any], folder: Path, size: int = 2) -> list[str]:
    """Run a task in `size` processes that find each other as torchrun's do, and return what each printed.

    Raises: AssertionError with what a process printed that failed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = [str(rank) for rank in range(size)]
    team = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(size), "TORCHELASTIC_RUN_ID": "test"}
    outputs = [folder / f"rank{rank}.txt" for rank in ranks]
    processes = [
        start(task, arguments, output, RANK=rank, LOCAL_RANK=rank, **(team if size > 1 else {}))
        for rank, output in zip(ranks, outputs, strict=True)
    ]
    for process in processes:
        process.join(180)
    for process, output in zip(processes, outputs, strict=True):
        assert process.exitcode == 0, Path(f"{output}.err").read_text()
    return [output.read_text() for output in outputs]
