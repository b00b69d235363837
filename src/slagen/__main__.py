"""`python -m slagen` is the `slagen` command."""

from slagen.cli import main

if __name__ == "__main__":
    main()
