"""Layers whose weight is computed from the dense Parameter in the forward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn
from torch.nn.utils import parametrize

from ..formats import Block
from .layers import Layer
from .patterns import Pattern
from .schedules import Schedule
from .scores import Magnitude
from .sparsifier import Sparsifier

Made = TypeVar("Made", bound=nn.Module)


class Standing(Schedule):
    """The same sparsity from before the first step on."""

    def start(self, sparsifier: Sparsifier) -> None:
        sparsifier.prune_to(self.sparsity)


class Computed(Sparsifier):
    """A sparsifier that leaves the dense weights alone and lets modules compute what is used."""

    computes = True

    def compute(self, make: Callable[[Layer], Made]) -> list[Made]:
        """Put a module between the weight of each layer and its use, and return them."""
        modules = [make(layer) for layer in self.layers]
        for layer, module in zip(self.layers, modules, strict=True):
            parametrize.register_parametrization(layer.module, "weight", module)
        return modules

    def apply(self) -> None:
        """Leave the dense weights alone."""

    @torch.no_grad()
    def leave(
        self,
        sparsity: float,
        pattern: Pattern | Block | str | None = None,
        distribution: str = "uniform",
    ) -> Sparsifier:
        """Make what is computed the weight, and keep its largest entries for good."""
        for layer in self.layers:
            parametrize.remove_parametrizations(layer.module, "weight", leave_parametrized=True)
        return Sparsifier(
            self.model,
            self.pattern if pattern is None else pattern,
            Magnitude(),
            Standing(sparsity),
            include=[layer.name for layer in self.layers],
            distribution=distribution,
        )
