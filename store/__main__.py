"""Operator commands: `python -m store migrate` and `python -m store keys ...`."""

import sys


def main(arguments: list[str]) -> int:
    """Run a command and return its exit status."""
    raise NotImplementedError


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
