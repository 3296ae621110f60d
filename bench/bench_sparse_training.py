"""A training step of one linear layer, dense against sparse through kernels, interleaved.

Forward, backward and an SGD step with momentum; run ``python bench/bench_sparse_training.py``. The
ratio is the median over rounds of the time of the dense step by that of the sparse one.
"""

from __future__ import annotations

import argparse
import fnmatch
import statistics
import time
from collections.abc import Callable

import torch
from gossamer import Block
from gossamer.sparsify import SET, SRSTE, SSTE, STE, MaskedDecay, RigL, Sparsifier
from torch import nn

RECIPES: dict[str, Callable[[nn.Module, torch.optim.Optimizer], Sparsifier]] = {
    "STE": lambda m, o: STE(m, o),
    "SR-STE": lambda m, o: SRSTE(m, o),
    "SR-STE, mask every 10": lambda m, o: SRSTE(m, o, refresh=10),
    "S-STE": lambda m, o: SSTE(m, o),
    "S-STE, MVUE": lambda m, o: SSTE(m, o, mvue=True),
    "masked decay, every 40": lambda m, o: MaskedDecay(m, o),
}


def in_blocks(size: int, sparsity: float) -> None:
    """Add the recipes whose weights are zero in blocks, through their kernels."""
    block, of = Block(size, size), f"{size}x{size} {sparsity:.0%}"
    common = {"pattern": block, "kernels": True}
    RECIPES[f"SET, {of}"] = lambda m, o: SET(m, sparsity, 10**6, 100, optimizer=o, **common)
    RECIPES[f"RigL, {of}"] = lambda m, o: RigL(m, sparsity, 10**6, 100, optimizer=o, **common)
    RECIPES[f"SR-STE, {of}"] = lambda m, o: SRSTE(m, o, sparsity=sparsity, refresh=10, **common)


for size, sparsity in ((16, 0.9), (16, 0.75), (4, 0.9)):
    in_blocks(size, sparsity)


def make_step(
    name: str, rows: int, outputs: int, inputs: int, dtype: torch.dtype
) -> Callable[[], None]:
    model = nn.Sequential(nn.Linear(inputs, outputs, dtype=dtype))
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
    made = RECIPES[name](model, optimizer) if name != "dense" else None
    x = torch.randn(rows, inputs, dtype=dtype, requires_grad=True)
    dy = torch.randn(rows, outputs, dtype=dtype)

    def step() -> None:
        optimizer.zero_grad()
        model(x).backward(dy)
        optimizer.step()
        if made is not None:
            made.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="1024x1024x4096", help="rows x outputs x inputs")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--only", default="*", help="fnmatch pattern of recipes")
    parser.add_argument("--seconds", type=float, default=20)
    options = parser.parse_args()
    torch.manual_seed(0)
    shape = [int(size) for size in options.shape.split("x")]
    dtype = getattr(torch, options.dtype)
    wanted = fnmatch.filter(RECIPES, options.only)
    steps = {name: make_step(name, *shape, dtype) for name in ("dense", *wanted)}
    times: dict[str, list[float]] = {name: [] for name in steps}
    end = time.perf_counter() + options.seconds
    while time.perf_counter() < end:
        for name, step in steps.items():
            begin = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - begin)
    rounds = len(times["dense"])
    print(f"{options.shape} {options.dtype}, {torch.get_num_threads()} threads, {rounds} rounds")
    for name, taken in times.items():
        ratios = sorted(d / t for d, t in zip(times["dense"][2:], taken[2:], strict=True))
        low, high = ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]
        print(
            f"{name:24} {1e3 * statistics.median(taken):8.2f} ms  "
            f"{statistics.median(ratios):5.2f}x ({low:.2f} to {high:.2f})"
        )


if __name__ == "__main__":
    main()
