"""`python -m slagen` is the `slagen` command, and says so in one line where what it starts with is missing."""

import os
import sys
from importlib.util import find_spec


def main() -> None:
    """Run the command and exit with its code."""
    if find_spec("rich") is None:
        os.environ["TYPER_USE_RICH"] = "0"  # or Typer's help asks for it
    try:
        from slagen.cli import main as start
    except ImportError as error:
        from slagen import packages
        from slagen.errors import EnvironmentProblem

        if (lack := packages.explain(error)) is None:
            raise
        sys.stderr.write(f"error: {lack}\n")
        sys.exit(EnvironmentProblem.exit_code)
    start()


if __name__ == "__main__":
    main()
