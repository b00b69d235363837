"""Errors of kernel launches, explained: what keeps a kernel from starting, and what to do about it."""

from __future__ import annotations

import subprocess
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from triton.errors import TritonError  # a tile is too large for the card, or the front end or ptxas rejects it

COMPILER = "apt install gcc, or CC=<compiler>"
REJECTED = "PassManager::run failed"  # a RuntimeError: the compiler's passes reject a kernel with its tile
# The search for a C compiler and the driver raise RuntimeError, the C compiler CalledProcessError, the search for
# libcuda AssertionError, the cache of compiled kernels OSError and ImportError.
OUTSIDE = (RuntimeError, OSError, ImportError, AssertionError, subprocess.SubprocessError)


class LaunchError(RuntimeError):
    """A kernel did not start.

    Args:
        reason: why.
        fix: what to do, where that is known.
        of_tile: whether a smaller tile may run; otherwise this machine lacks what every kernel needs.
    """

    def __init__(self, reason: str, fix: str = "", of_tile: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.fix, self.of_tile = reason, fix, of_tile


@contextmanager
def launching() -> Iterator[None]:
    """Around launches: raise LaunchError for all that keeps them from running, but for a lack of memory."""
    try:
        yield
    except torch.OutOfMemoryError:  # a RuntimeError too; the tasks know what to do about it
        raise
    except TritonError as error:
        raise LaunchError(str(error), of_tile=True) from error
    except OUTSIDE as error:
        if isinstance(error, AssertionError) and "libcuda" not in str(error):
            raise
        raise _explain(error) from error


def _explain(error: Exception) -> LaunchError:
    text = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    if REJECTED in text:
        return LaunchError(f"Triton's compiler rejects the kernel ({text})", of_tile=True)
    if "Failed to find C compiler" in text:
        return LaunchError("there is no C compiler, which Triton needs to launch kernels", COMPILER)
    if isinstance(error, subprocess.CalledProcessError):
        header = Path(sysconfig.get_path("include", "posix_prefix"), "Python.h")
        if not header.is_file():
            return LaunchError(
                f"{header}, which Triton needs to compile its launcher, is missing", "apt install python3-dev"
            )
        tool = Path(error.cmd[0] if isinstance(error.cmd, list | tuple) else str(error.cmd).split()[0]).name
        reason = f"{tool} cannot compile Triton's launcher (exit code {error.returncode}; the reason is printed above)"
        return LaunchError(reason, COMPILER)
    if "Triton Error [CUDA]" in text or "CUDA error" in text:
        return LaunchError(
            f"the driver cannot run the kernels ({text})", "a newer driver (nvidia-smi shows the installed one)"
        )
    if isinstance(error, OSError) and error.filename is not None:
        text = f"{error.filename}: {error.strerror}"
        return LaunchError(f"Triton failed ({text})", "TRITON_CACHE_DIR=<writable folder>, CC=<compiler>")
    return LaunchError(text)
