"""FISH mask: only the weights that the data tells most about are trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...formats import Block
from ..patterns import Pattern, over_layers
from ..schedules import OneShot
from ..scores import Fisher
from ..sparsifier import Sparsifier

Delta = dict[str, tuple[Tensor, Tensor]]


class FISHMask(Sparsifier):
    """F_i = mean of (d log p / dw_i)^2 over samples; the largest are trained, the rest stays.

    For the first ``samples`` calls of ``step()`` the loop only computes gradients (one sample each)
    and leaves ``optimizer.step()`` out; from then on it trains, and what the mask drops is put
    back to what it was. The weights stay dense; ``delta()`` is what training changed.

    Parameters
    ----------
    model, pattern, **options
        As for ``Sparsifier``; weights compete over all layers where the pattern has one lane.
    density : float
        The share that is trained.
    samples : int
        1024 in the paper on GLUE, 256 on CIFAR.

    Raises
    ------
    TypeError, ValueError
        As ``Sparsifier`` says, or if ``density`` is not in (0, 1], or ``samples`` below 1.

    References
    ----------
    Sung, Nair, Raffel, "Training Neural Networks with Fixed Sparse Masks", NeurIPS 2021.
    """

    computes = True  # what is masked stays in the weight

    def __init__(
        self,
        model: nn.Module,
        density: float = 0.005,
        samples: int = 1024,
        pattern: Pattern | Block | str | None = None,
        **options: Any,
    ) -> None:
        if not 0 < density <= 1 or samples < 1:
            raise ValueError(
                f"FISHMask: density {density}, samples {samples}: expected in (0, 1], at least 1"
            )
        pattern = over_layers(pattern, options, "global")
        self.samples = samples
        schedule = OneShot(1 - density, at=samples)
        super().__init__(model, pattern, Fisher(), schedule, **options)
        self.remember()

    @torch.no_grad()
    def apply(self) -> None:
        """Put back what the mask does not train."""
        for layer in self.layers:
            if self.steps >= self.samples:
                before = self._initial[f"{layer.name}.weight".lstrip(".")]
                layer.weight.copy_(torch.where(layer.mask, layer.weight, before))

    @torch.no_grad()
    def step(self) -> None:
        if self.steps < self.samples:
            super().step()
        else:
            self.steps += 1
            self.apply()

    @torch.no_grad()
    def delta(self) -> Delta:
        """By layer: which entries of the flattened weight are trained (int64), by how much."""
        found = {}
        for layer in self.layers:
            where = layer.mask.flatten().nonzero().flatten()
            before = self._initial[f"{layer.name}.weight".lstrip(".")]
            found[layer.name] = (where, (layer.weight - before).flatten()[where])
        return found

    @staticmethod
    @torch.no_grad()
    def merge(model: nn.Module, delta: Delta) -> None:
        """Add what ``delta()`` gave to another copy of the original model."""
        for name, (where, values) in delta.items():
            weight = model.get_submodule(name).weight
            assert isinstance(weight, Tensor)
            weight.view(-1).index_add_(0, where, values.to(weight))
