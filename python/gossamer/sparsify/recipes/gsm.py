"""Global sparse momentum: only the most salient weights follow the gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...formats import Block
from ..allocation import select_globally
from ..hooks import before_update
from ..patterns import Pattern, Unstructured
from ..schedules import OneShot
from ..scores import Magnitude, WeightGradient
from ..sparsifier import Sparsifier


class GSM(Sparsifier):
    """z <- beta z + eta w + B g, w <- w - a z, B = 1 for the Q weights of largest |w g|, else 0.

    The others only decay; after ``end`` steps all but the Q largest |w| are pruned for good. The
    optimizer is torch's SGD, whose momentum beta (0.98 in the paper) and weight decay eta (1e-4)
    make the equation above; B multiplies the gradient before its step.

    Parameters
    ----------
    model, pattern, **options
        As for ``Sparsifier``; Q is of all layers together.
    optimizer : torch.optim.Optimizer
    sparsity : float
        1 - Q / the number of weights.
    end : int

    References
    ----------
    Ding et al., "Global Sparse Momentum SGD for Pruning Very Deep Neural Networks", NeurIPS 2019.
    """

    schedule: OneShot

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        sparsity: float,
        end: int,
        pattern: Pattern | Block | str | None = None,
        **options: Any,
    ) -> None:
        self._saliency = WeightGradient()
        options["distribution"] = "global"
        schedule = OneShot(sparsity, at=end)
        super().__init__(
            model, pattern or Unstructured(), Magnitude(), schedule, optimizer=optimizer, **options
        )
        self._hook = before_update(optimizer, self._mask_gradients)

    @torch.no_grad()
    def _mask_gradients(self) -> None:
        if self.steps >= self.schedule.at:
            return
        units = [self.scored(layer, self._saliency) for layer in self.layers]
        chosen = select_globally(units, self.schedule.sparsity)
        for layer, kept in zip(self.layers, chosen, strict=True):
            active = self.pattern.cover(kept, layer.shape, layer.groups)
            layer.gradient.masked_fill_(~active, 0)

    def detach(self) -> None:
        super().detach()
        self._hook.remove()
