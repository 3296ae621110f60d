"""LOBSTER: weights that the loss does not depend on decay, plateaus are pruned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ...formats import Block
from ..patterns import Pattern, over_layers
from ..schedules import PlateauBisection
from ..scores import Magnitude
from ..sparsifier import Sparsifier


class LOBSTER(Sparsifier):
    """After each step w <- w - lambda w max(0, 1 - |g|); at a plateau the smallest |w| go.

    Parameters
    ----------
    model, pattern, **options
        As for ``Sparsifier``; weights compete over all layers where the pattern has one lane.
    sparsity : float
        Where pruning ends.
    evaluate : callable
        () -> float, the validation loss.
    decay : float
        lambda.
    every, patience, tolerance
        As for ``PlateauBisection``: an epoch, the paper's PWE and TWT.

    Raises
    ------
    TypeError, ValueError
        As ``Sparsifier`` says, or if a number is out of its range.

    References
    ----------
    Tartaglione et al., "LOss-Based SensiTivity rEgulaRization: Towards deep sparse neural
    networks", Neural Networks 2022.
    """

    def __init__(
        self,
        model: nn.Module,
        sparsity: float,
        evaluate: Callable[[], float],
        decay: float = 1e-4,
        every: int = 100,
        patience: int = 0,
        tolerance: float = 0.0,
        pattern: Pattern | Block | str | None = None,
        **options: Any,
    ) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"LOBSTER: decay {decay}, expected at least 0 and below 1")
        self.decay = decay
        pattern = over_layers(pattern, options, "global")
        schedule = PlateauBisection(sparsity, evaluate, every, patience, tolerance)
        super().__init__(model, pattern, Magnitude(), schedule, **options)

    @torch.no_grad()
    def step(self) -> None:
        if self._finite():
            for layer in self.layers:
                insensitive = (1 - layer.gradient.abs()).clamp_(min=0)
                layer.weight.sub_(self.decay * layer.weight * insensitive)
        super().step()
