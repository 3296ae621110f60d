"""Each recipe trains a small network on digits or on text: sparsity reached and accuracy.

The tasks are described in ``recipe_tasks.py``; the last layer stays dense. ``pip install
scikit-learn`` first for the digits.
"""

from __future__ import annotations

import argparse
import statistics
from fnmatch import fnmatch

import torch
from recipe_builders import RECIPES
from recipe_tasks import TASKS, Run


def measure(name: str, task: str, seed: int) -> tuple[float, float]:
    """Sparsity of the layers that are sparsified, and accuracy."""
    run = Run(TASKS[task](), seed)
    RECIPES[name](run)
    run.train()
    run.finish()
    return run.zeros(), run.accuracy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=TASKS, default="digits")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default="*", help="fnmatch pattern of names")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| recipe | zeros | accuracy, mean (least to most) |\n|---|---|---|")
    for name in RECIPES:
        if not fnmatch(name, options.only):
            continue
        each = [measure(name, options.task, seed) for seed in range(options.seeds)]
        found, accuracies = zip(*each, strict=True)
        low, high = min(accuracies), max(accuracies)
        mean = statistics.mean(accuracies)
        print(
            f"| {name} | {statistics.mean(found):.2%} | {mean:.2%} ({low:.2%} to {high:.2%}) |",
            flush=True,
        )


if __name__ == "__main__":
    main()
