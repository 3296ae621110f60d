"""What the recipes are tried on: small networks of three layers, and how one is trained.

- ``digits``: scikit-learn's images of 8x8 pixels, 1437 to train on and 360 to test; 64-128-128-10.
- ``text``: the next character of the docstrings of Python's own library, given the eight before
  it; 24,000 places to train on and 6,000 to test, in other docstrings; 512-128-128-64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from documentation import docstrings
from torch import Tensor, nn

EPOCHS, EPOCH, HIDDEN = 40, 22, 128  # an epoch is so many steps
STEPS = EPOCHS * EPOCH
LAST = "4"  # the last layer, which stays dense

# All else counts as one more character.
ALPHABET = " \nabcdefghijklmnopqrstuvwxyz0123456789.,:;'\"`()[]{}<>-_=/*+#%!?"
CONTEXT = 8


@dataclass(frozen=True)
class Task:
    """Data, and what the network and its training have to do with them."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: int
    batch: int
    rate: float  # of learning
    rho: float  # AdaSAP's largest perturbation

    def network(self, hidden: int = HIDDEN) -> nn.Sequential:
        inputs = self.x.shape[1]
        return nn.Sequential(
            *(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()),
            nn.Linear(hidden, self.classes),
        )


@cache
def digits() -> Task:
    from sklearn.datasets import load_digits

    found = load_digits()
    x = torch.tensor(found.data, dtype=torch.float32) / 16
    y = torch.tensor(found.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    return Task(x[:1437], y[:1437], x[1437:], y[1437:], 10, 64, 0.05, rho=0.1)


@cache
def text() -> Task:
    found = docstrings("[a-e]*.py")
    generator = torch.Generator().manual_seed(0)
    held_out = [t for i, t in enumerate(found) if i % 10 == 9]
    train = [t for i, t in enumerate(found) if i % 10 != 9]
    x, y = _places(train, 24_000, generator)
    test_x, test_y = _places(held_out, 6_000, generator)
    return Task(x, y, test_x, test_y, len(ALPHABET) + 1, 256, 0.2, rho=0.03)


def _places(texts: list[str], count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One-hot characters [count, CONTEXT * classes], and the one that comes next."""
    classes = len(ALPHABET) + 1
    number = {c: i for i, c in enumerate(ALPHABET)}
    characters = "\n".join(texts).lower()
    codes = torch.tensor([number.get(c, classes - 1) for c in characters])
    starts = torch.randperm(len(codes) - CONTEXT, generator=generator)[:count]
    windows = codes[starts[:, None] + torch.arange(CONTEXT + 1)]
    return F.one_hot(windows[:, :-1], classes).flatten(1).float(), windows[:, -1]


TASKS: dict[str, Callable[[], Task]] = {"digits": digits, "text": text}


class Run:
    """One network and how it is trained: a recipe changes what is its own."""

    def __init__(self, task: Task, seed: int) -> None:
        torch.manual_seed(seed)
        self.task = task
        self.x, self.y, self.test_x, self.test_y = task.x, task.y, task.test_x, task.test_y
        self.model: nn.Module = task.network()
        self.optimizer = self.sgd(self.model)
        self.made: Any = None
        self.learns = lambda step: True  # whether the optimizer takes a step
        self.before = lambda step: None
        self.backward = lambda x, y: self.loss(x, y).backward()
        self.finish = lambda: None
        self.zeros = lambda: zeros(self.model[0], self.model[2])

    def sgd(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), self.task.rate, momentum=0.9, weight_decay=1e-4)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.model(x), y)

    def evaluate(self) -> float:
        with torch.no_grad():
            return self.loss(self.x, self.y).item()

    def train(self, steps: int | None = None) -> None:
        batch = self.task.batch
        for step in range(STEPS if steps is None else steps):
            if step % EPOCH == 0:
                order = torch.randperm(len(self.x))
            taken = order[(step % EPOCH) * batch :][:batch]
            self.before(step)
            self.backward(self.x[taken], self.y[taken])
            if self.learns(step):
                self.optimizer.step()
            if self.made is not None:
                self.made.step()
            self.optimizer.zero_grad()

    def accuracy(self) -> float:
        with torch.no_grad():
            right = self.model.eval()(self.test_x).argmax(1) == self.test_y
        return right.float().mean().item()


def zeros(*layers: nn.Module) -> float:
    return torch.cat([(layer.weight == 0).float().flatten() for layer in layers]).mean().item()
