"""What every test runs under: determinism that shows unwritten memory, one thread, GPU tests only with a GPU.

Without a GPU, Triton's kernels run in its interpreter, which is chosen when Triton is first imported.
"""

import contextlib
import gc
import itertools
import os
import signal
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from cuda_branches import reached

from slagen.errors import for_the_command_line
from slagen.generation import config

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    with contextlib.suppress(ImportError):  # Triton is for Linux; tests that need it say so
        import faster_interpreter  # noqa: F401

for ignored in (signal.SIGINT, getattr(signal, "SIGHUP", signal.SIGINT)):  # by a shell's background or nohup
    if signal.getsignal(ignored) == signal.SIG_IGN:
        signal.signal(ignored, signal.default_int_handler if ignored == signal.SIGINT else signal.SIG_DFL)

NUMBERS = itertools.count()
torch.use_deterministic_algorithms(True, warn_only=True)  # fills torch.empty with nan
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start, for there is a test on every core


def pytest_collection_finish() -> None:
    gc.freeze()  # millions of objects of imported packages, which every collection of garbage would look through


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device and a CUDA build of torch"))


@pytest.fixture(autouse=True)
def messages_name_options() -> Iterator[None]:
    """Errors as the command line words them; `in_python` is tested in test_errors.py."""
    with for_the_command_line():
        yield


@pytest.fixture(autouse=True, scope="session")
def no_cache_of_the_user(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Encoded prompts are neither taken from this machine's cache nor left there."""
    config.CACHE = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def own_cache() -> Iterator[None]:
    """Each test encodes its prompts itself. (Not by `monkeypatch`, which must be set up after a test's own fixtures,
    for it puts back what it found.)"""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "CACHE", f"{config.CACHE}/{next(NUMBERS)}")
        yield


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Iterator[None]:
    with reached(f"{pyfuncitem.path.name}::{pyfuncitem.originalname}"):
        return (yield)


def needs(package: str, extra: str) -> ModuleType:
    """A package of an extra; without it the tests of the calling module are skipped, and say so."""
    return pytest.importorskip(package, reason=f"needs {package}: pip install '{extra}'")
