"""SET on a wide perceptron whose weights are stored sparse, against the dense-masked one.

    python bench/wide_set.py             hidden layers of 30,000 units, 1 % of the weights
    python bench/wide_set.py --quick     the same with 6,000 units

An epoch of the sparse network is run; of the dense-masked one (the dense weights, gradients and
momenta are multiplied by masks after each step) so many steps are timed as fit a budget, and
scaled to the steps of an epoch. The largest dense layer of the wide network takes 3.6 GB for each
of weight, gradient and momentum: where they take more than ``--gigabytes``, a part of that layer's
rows is timed, and scaled by the rows. Both are said.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter

import torch
import torch.nn.functional as F
from gossamer import Unstructured, sparsify
from gossamer.nn import SparseLinear
from torch import Tensor, nn

INPUTS, CLASSES, BATCH = 784, 10, 100


@dataclass(frozen=True)
class Size:
    """Of a network and an epoch."""

    width: int
    density: float
    samples: int

    @property
    def steps(self) -> int:
        return self.samples // BATCH

    @property
    def layers(self) -> tuple[tuple[int, int], ...]:
        """(outputs, inputs) of the sparse ones."""
        return (self.width, INPUTS), (self.width, self.width)


@dataclass(frozen=True)
class Cost:
    """Of an epoch: seconds, and bytes of weights, gradients, momenta and, if any, masks."""

    seconds: float
    nbytes: int
    note: str


def draw(samples: int) -> tuple[Tensor, Tensor]:
    """Ten noisy prototypes."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(CLASSES, (samples,), generator=generator)
    prototypes = torch.randn(CLASSES, INPUTS, generator=generator)
    return prototypes[labels] + 2 * torch.randn(samples, INPUTS, generator=generator), labels


def sparse_epoch(size: Size) -> tuple[Cost, float]:
    """One epoch and the change of the pattern at its end, and the accuracy on what follows."""
    torch.manual_seed(0)
    pattern = Unstructured(size.density)
    (n, k), (m, _) = size.layers
    model = nn.Sequential(
        SparseLinear(k, n, pattern=pattern), nn.ReLU(),
        SparseLinear(n, m, pattern=pattern), nn.ReLU(),
        nn.Linear(m, CLASSES),
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    made = sparsify.SET.stored(model, optimizer, end=10 * size.steps, every=size.steps)
    x, labels = draw(size.samples + 1000)
    begin = perf_counter()
    for i in range(size.steps):
        batch = slice(i * BATCH, (i + 1) * BATCH)
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch]), labels[batch]).backward()
        optimizer.step()
        made.step()
    seconds = perf_counter() - begin
    nbytes = 0
    for layer in (model[0], model[2]):
        weight = layer.weight
        transposed = weight.nbytes - weight.values.nbytes + 4 * weight.values.numel()
        nbytes += weight.nbytes + 2 * weight.values.nbytes + transposed
    with torch.no_grad():
        right = model(x[-1000:]).argmax(1) == labels[-1000:]
    return Cost(seconds, nbytes, f"{size.steps} steps and a change of the pattern"), float(
        right.float().mean()
    )


def dense_epoch(size: Size, budget: float, most_bytes: float) -> Cost:
    """The time of some masked steps, scaled to an epoch: layer by layer, which need not all fit."""
    seconds, notes = 0.0, []
    for n, k in size.layers:
        rows = min(n, int(most_bytes / (13 * k)))
        step = _masked_step(rows, k, size.density)
        step()
        times: list[float] = []
        begin = perf_counter()
        while not times or perf_counter() - begin < budget / 2:
            start = perf_counter()
            step()
            times.append(perf_counter() - start)
        seconds += statistics.median(times) * n / rows
        notes.append(f"{n}x{k}: {len(times)} steps" + f" of {rows} rows" * (rows < n))
    nbytes = sum(13 * n * k for n, k in size.layers)
    return Cost(seconds * size.steps, nbytes, "scaled from " + ", ".join(notes))


def _masked_step(n: int, k: int, density: float) -> Callable[[], None]:
    """Forward, backward to x and weight, momentum and mask of one layer."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(n, k, generator=generator) < density
    weight = torch.randn(n, k, generator=generator).mul_(mask)
    momentum, x = torch.zeros(n, k), torch.randn(BATCH, k, generator=generator)
    dy = torch.randn(BATCH, n, generator=generator)
    gradient = torch.empty(n, k)

    def step() -> None:
        F.linear(x, weight)
        torch.mm(dy, weight)
        torch.mm(dy.t(), x, out=gradient)
        momentum.mul_(0.9).add_(gradient)
        weight.sub_(momentum, alpha=1e-9).mul_(mask)

    return step


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="bench/wide_set.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--quick", action="store_true", help="6,000 units and 20 steps an epoch, for 30,000 and 60"
    )
    parser.add_argument("--width", type=int, help="units of a hidden layer")
    parser.add_argument("--density", type=float, default=0.01)
    parser.add_argument("--samples", type=int, help="of an epoch")
    parser.add_argument("--budget", type=float, help="seconds for the dense steps")
    parser.add_argument("--gigabytes", type=float, default=4.0, help="for a dense layer")
    given = parser.parse_args(arguments)
    size = Size(
        given.width or (6_000 if given.quick else 30_000),
        given.density,
        given.samples or (2_000 if given.quick else 6_000),
    )
    print(
        f"hidden layers of {size.width} units, {size.density:.2%} of the weights, batches of "
        f"{BATCH}, {torch.get_num_threads()} threads"
    )
    sparse, accuracy = sparse_epoch(size)
    dense = dense_epoch(size, given.budget or (2.0 if given.quick else 20.0), 1e9 * given.gigabytes)
    for name, cost in (("stored sparse", sparse), ("dense, masked", dense)):
        print(f"{name}: {cost.seconds:9.2f} s, {cost.nbytes / 1e6:10,.0f} MB ({cost.note})")
    print(
        f"an epoch takes {dense.seconds / sparse.seconds:.1f} times less time and "
        f"{dense.nbytes / sparse.nbytes:.1f} times less memory; accuracy after it {accuracy:.1%}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
