"""Each recipe trains a small network on scikit-learn's digits: sparsity reached and accuracy.

1437 images to train on, 360 to test, three seeds; the network is 64-128-128-10 and its last layer
stays dense. ``pip install scikit-learn`` first.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from gossamer import Block
from gossamer import sparsify as s
from torch import Tensor, nn

EPOCHS, BATCH = 40, 64
STEPS = EPOCHS * (1437 // BATCH)
EPOCH = STEPS // EPOCHS
Builder = Callable[[nn.Module, torch.optim.Optimizer, Callable[[], float]], Any]

# fmt: off
RECIPES: dict[str, Builder] = {
    "dense": lambda m, o, e: None,
    "GMP 90 %": lambda m, o, e: s.GMP(m, 0.9, 50, STEPS // 2, 20, optimizer=o, exclude="4"),
    "GMP 2:4": lambda m, o, e: s.GMP(m, 0.5, 50, STEPS // 2, 20, "2:4", optimizer=o, exclude="4"),
    "GMP 8x8 blocks 75 %": lambda m, o, e: s.GMP(
        m, 0.75, 50, STEPS // 2, 20, Block(8, 8), optimizer=o, exclude="4"),
    "MIRL 10 rounds (89 %)": lambda m, o, e: s.MIRL(
        m, STEPS // 11, 10, optimizer=o, exclude="4"),
    "SET 90 %": lambda m, o, e: s.SET(m, 0.9, STEPS, EPOCH, optimizer=o, exclude="4"),
    "RigL 90 %": lambda m, o, e: s.RigL(m, 0.9, 3 * STEPS // 4, 20, optimizer=o, exclude="4"),
    "RigL fan-in 90 %": lambda m, o, e: s.RigL(
        m, 0.9, 3 * STEPS // 4, 20, pattern=s.ConstantFanIn(), optimizer=o, exclude="4"),
    "DSTEE 90 %": lambda m, o, e: s.DSTEE(m, 0.9, 3 * STEPS // 4, 20, optimizer=o, exclude="4"),
    "SparseMomentum 90 %": lambda m, o, e: s.SparseMomentum(
        m, STEPS, EPOCH, 0.9, optimizer=o, exclude="4"),
    "GSM 90 %": lambda m, o, e: s.GSM(m, o, 0.9, STEPS // 2, exclude="4"),
    "LOBSTER up to 90 %": lambda m, o, e: s.LOBSTER(
        m, 0.9, e, every=EPOCH, tolerance=0.05, optimizer=o, exclude="4"),
    "STE 2:4": lambda m, o, e: s.STE(m, o, exclude="4"),
    "SRSTE 2:4": lambda m, o, e: s.SRSTE(m, o, exclude="4"),
    "SSTE 2:4": lambda m, o, e: s.SSTE(m, o, exclude="4"),
    "MaskedDecay 2:4": lambda m, o, e: s.MaskedDecay(m, o, exclude="4"),
    "AutoSparse, learned": lambda m, o, e: s.AutoSparse(m, STEPS // 2, -4.0, exclude="4"),
    "WGSEF filters 50 %": lambda m, o, e: s.WGSEF(m, o, 0.5, STEPS // 2, exclude="4"),
    "HESSO filters 50 %": lambda m, o, e: s.HESSO(m, 0.5, 50, STEPS // 2, 2, exclude="4"),
}
# fmt: on


def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    x = torch.tensor(digits.data, dtype=torch.float32) / 16
    y = torch.tensor(digits.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    return x[:1437], y[:1437], x[1437:], y[1437:]


def train(build: Builder, seed: int) -> tuple[float, float]:
    """Sparsity of the layers that are sparsified, and accuracy."""
    torch.manual_seed(seed)
    x, y, test_x, test_y = data()
    model = nn.Sequential(
        *(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    )
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-4)

    def evaluate() -> float:
        with torch.no_grad():
            return F.cross_entropy(model(x), y).item()

    made = build(model, optimizer, evaluate)
    if isinstance(made, s.AutoSparse):
        optimizer.add_param_group({"params": list(made.parameters())})
    for step in range(STEPS):
        if step % EPOCH == 0:
            order = torch.randperm(len(x))
        batch = order[(step % EPOCH) * BATCH :][:BATCH]
        F.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
        if made is not None:
            made.step()
        optimizer.zero_grad()
    if isinstance(made, s.STE):
        made.to_dense(project=True)
    with torch.no_grad():
        accuracy = (model(test_x).argmax(1) == test_y).float().mean().item()
        zeros = [(model[i].weight == 0).float() for i in (0, 2)]
    return torch.cat([z.flatten() for z in zeros]).mean().item(), accuracy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    seeds = range(parser.parse_args().seeds)
    torch.set_num_threads(1)
    print("| recipe | zeros | accuracy, mean (least to most) |\n|---|---|---|")
    for name, build in RECIPES.items():
        zeros, accuracies = zip(*(train(build, seed) for seed in seeds), strict=True)
        low, high = min(accuracies), max(accuracies)
        mean = statistics.mean(accuracies)
        print(
            f"| {name} | {statistics.mean(zeros):.2%} | {mean:.2%} ({low:.2%} to {high:.2%}) |",
            flush=True,
        )


if __name__ == "__main__":
    main()
