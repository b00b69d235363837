"""`python -m slagen` is the `slagen` command, and says so in one line where what it starts with is missing."""

import sys


def main() -> None:
    """Run the command and exit with its code."""
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
