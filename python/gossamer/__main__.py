"""``python -m gossamer info``: what is installed, what this machine has, what will run."""

from __future__ import annotations

import argparse

from .info import info


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m gossamer", description=__doc__)
    parser.add_argument("command", choices=["info"])
    parser.parse_args()
    print(info())


if __name__ == "__main__":
    main()
