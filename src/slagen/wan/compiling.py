"""torch.compile around every block of a Wan transformer, with the attention inside: one graph, which all blocks share.

A block is compiled anew for a new shape, and for what the attention is set to in a step where a schedule changes that;
not for a step, a layer or a prompt.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from slagen.errors import EnvironmentProblem, UsageError

BACKEND = "inductor"
MAX_GRAPHS = 256  # of a block: one for each size of a batch and each setting of a schedule; PyTorch's own limit is 8
ADVICE = "Leave --compile out"


def check_compiler(device: torch.device) -> None:
    """Raise EnvironmentProblem where PyTorch finds no compiler for code that runs on a device."""
    if BACKEND != "inductor":
        return
    if device.type == "cuda":
        from torch.utils._triton import has_triton_package

        if not has_triton_package():
            raise EnvironmentProblem(
                f"--compile needs Triton, which is not installed. Install it: pip install triton. Or {_small(ADVICE)}."
            )
        return
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise EnvironmentProblem(
            "--compile needs a C++ compiler, and none was found. Install one (apt install g++), or set CXX to the one "
            f"to use. Or {_small(ADVICE)}."
        ) from None


def compile_blocks(transformer: Any, *, whole: bool = True) -> Callable[[], None]:
    """Have every block compiled when it is first called. Returns what undoes this.

    Args:
        whole: a block that is not one graph is an error; otherwise it is compiled in pieces.
    """
    transformer.compile_repeated_blocks(backend=BACKEND, dynamic=False, fullgraph=whole)

    def undo() -> None:
        for block in transformer.blocks:
            block._compiled_call_impl = None

    return undo


@contextmanager
def compiling(attention: str, on_compiled: Callable[[float], None]) -> Iterator[None]:
    """Around calls of compiled blocks.

    Args:
        attention: what is inside the blocks, for messages. on_compiled: called with the milliseconds of each
            compilation.
    Raises: UsageError where the attention is not one graph, EnvironmentProblem where the compiler fails.
    """
    from torch._dynamo import callback, config, exc

    began = 0.0

    def start(*_: Any) -> None:
        nonlocal began
        began = time.perf_counter()

    def end(*_: Any) -> None:
        on_compiled((time.perf_counter() - began) * 1e3)

    handler = callback.callback_handler
    handler.register_start_callback(start)
    handler.register_end_callback(end)
    try:
        with config.patch(recompile_limit=MAX_GRAPHS, accumulated_recompile_limit=MAX_GRAPHS):
            yield
    except exc.Unsupported as error:
        raise UsageError(f"{attention} cannot be compiled: {_reason(error)}. {ADVICE}.") from error
    except exc.TorchDynamoException as error:
        if isinstance(inner := getattr(error, "inner_exception", None), torch.OutOfMemoryError):
            raise inner from error
        raise EnvironmentProblem(f"torch.compile failed: {_reason(inner or error)}. {ADVICE}.") from error
    finally:
        handler.remove_start_callback(start)
        handler.remove_end_callback(end)


def _reason(error: BaseException) -> str:
    """The first line of an error of the compiler."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")


def _small(text: str) -> str:
    return text[0].lower() + text[1:]
