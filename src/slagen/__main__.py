"""`slagen` and `python -m slagen`: the command, or a one-line error if a package it starts with is missing.

Nothing is imported here but what Python has loaded already, so that Ctrl-C has hardly a moment to leave a traceback in.
"""

import os
import sys

INTERRUPTED = 130


def main() -> None:
    """Run the command and exit with its code."""
    try:
        start = _command()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    start()


def _command():
    """The command's own main; an exit with 4 and a message where a package that it starts with is missing."""
    from importlib.util import find_spec

    if find_spec("rich") is None:
        os.environ["TYPER_USE_RICH"] = "0"  # or Typer's help asks for it
    try:
        from slagen.cli.main import main as start
    except ImportError as error:
        from slagen import packages
        from slagen.errors import EnvironmentProblem

        if (lack := packages.explain(error)) is None:
            raise
        sys.stderr.write(f"error: {lack}\n")
        sys.exit(EnvironmentProblem.exit_code)
    return start


if __name__ == "__main__":
    main()
