"""Robust pruning at initialization: SNIP's score, and weights rescaled to the edge of chaos."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...formats import Block
from ..patterns import Pattern, over_layers
from ..schedules import OneShot
from ..scores import SNIP
from ..sparsifier import Sparsifier


class RobustAtInitialization(Sparsifier):
    """Prune a fresh network by |w dL/dw| over all layers, then w <- w sqrt(v / (n E[M w^2])).

    n is the number of inputs of an output, and v the variance of the edge of chaos, 2 for ReLU: so
    the pruned network is back on it, where the dense one was initialised. For the first ``samples``
    calls of ``step()`` the loop computes gradients and leaves ``optimizer.step()`` out. No layer is
    emptied.

    Parameters
    ----------
    model, pattern, **options
        As for ``Sparsifier``; weights compete over all layers where the pattern has one lane.
    sparsity : float
    samples : int
        Batches that the gradient is the mean of.
    variance : float
        v.

    Raises
    ------
    TypeError, ValueError
        As ``Sparsifier`` says, or if ``samples`` is below 1, or ``variance`` not above 0.

    References
    ----------
    Hayou, Ton, Doucet, Teh, "Robust Pruning at Initialization", ICLR 2021. From memory; its scaling
    of residual branches by 1 / sqrt(depth) is the model's to have.
    """

    def __init__(
        self,
        model: nn.Module,
        sparsity: float,
        samples: int = 1,
        variance: float = 2.0,
        pattern: Pattern | Block | str | None = None,
        **options: Any,
    ) -> None:
        if samples < 1 or variance <= 0:
            raise ValueError(
                f"RobustAtInitialization: samples {samples}, variance {variance}: expected at "
                "least 1, above 0"
            )
        pattern = over_layers(pattern, options, "global")
        self.variance = variance
        schedule = OneShot(sparsity, at=samples)
        super().__init__(model, pattern, SNIP(), schedule, **options)

    @torch.no_grad()
    def prune_to(self, sparsity: float) -> None:
        super().prune_to(sparsity)
        for layer in self.layers:
            inputs = layer.weight[0].numel()
            now = inputs * float(layer.weight.double().square().mean())
            if now > 0:
                layer.weight.mul_((self.variance / now) ** 0.5)
