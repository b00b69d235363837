"""What a command does before it loads a model."""

import sys

import typer

from slagen import torchrun
from slagen.errors import EnvironmentProblem


def start_quickly(context: typer.Context, weights: str | None, *, all_of_torch: bool = False) -> None:
    """Where the process ends with this command, import no package that it does not use.

    Args:
        all_of_torch: blocks are to be compiled, or a LoRA computed by peft, which needs more of PyTorch.
    Raises: as `check_docstrings`.
    """
    check_docstrings()
    if context.obj["own_process"] and not all_of_torch and torchrun.size() == 1:
        from slagen.wan.startup import leave_out

        leave_out(keep=("gguf",) if weights is not None and weights.endswith(".gguf") else ())


def check_docstrings() -> None:
    """Raise EnvironmentProblem where Python has no docstrings, of which diffusers prints pages before it fails."""
    if sys.flags.optimize > 1:
        from slagen.cli.usage import WITHOUT_DOCSTRINGS

        raise EnvironmentProblem(WITHOUT_DOCSTRINGS)
