"""AdaSAP: unimportant neurons are trained to bear larger perturbations, then pruned."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...formats import Block
from ..layers import Layer
from ..patterns import Filters, Pattern
from ..schedules import OneShot
from ..scores import Magnitude
from ..sparsifier import Sparsifier


class AdaSAP(Sparsifier):
    """min over W of max over |eps_i| <= rho_i of L(W + eps), then the least neurons are pruned.

    rho_i goes from rho_max for the neuron of least importance to rho_min for the most important of
    a layer, in even steps by rank; eps_i = rho_i g_i / |g_i|. A step computes two gradients::

        loss(model(x)).backward()
        with made.perturbed():      # to W + eps, the gradients cleared
            loss(model(x)).backward()
        optimizer.step()            # at W again, with the gradients of W + eps
        made.step()

    After the pruning ``perturbed()`` has one radius for all, rho_min.

    Parameters
    ----------
    model, **options
        As for ``Sparsifier``.
    sparsity : float
        The share of neurons of each layer that is pruned.
    end : int
        The step after which they are.
    rho_min, rho_max : float
    pattern : Pattern, Block or str
        Whose units are the neurons: filters by default.

    Raises
    ------
    TypeError, ValueError
        As ``Sparsifier`` says, or if the radii are not 0 <= rho_min <= rho_max.

    References
    ----------
    Bair et al., "Adaptive Sharpness-Aware Pruning for Robust Sparse Networks", ICLR 2024. The
    equation and the radii are from memory; how a radius follows from importance is ours.
    """

    def __init__(
        self,
        model: nn.Module,
        sparsity: float,
        end: int,
        rho_min: float = 0.01,
        rho_max: float = 2.0,
        pattern: Pattern | Block | str | None = None,
        **options: Any,
    ) -> None:
        if not 0 <= rho_min <= rho_max:
            raise ValueError(f"AdaSAP: rho from {rho_min} to {rho_max}, expected 0 <= min <= max")
        self.rho_min, self.rho_max = rho_min, rho_max
        schedule = OneShot(sparsity, at=end)
        pattern = Filters() if pattern is None else pattern
        super().__init__(model, pattern, Magnitude(), schedule, **options)

    def radii(self, layer: Layer) -> Tensor:
        """rho of each unit of a layer: [lanes, units] float64."""
        units = self.scored(layer, self.score).double()
        top = self.rho_min if self.history else self.rho_max
        if units.shape[1] == 1:
            return torch.full_like(units, top)
        rank = units.argsort(dim=-1, stable=True).argsort(dim=-1).double()
        return top + (self.rho_min - top) * rank / (units.shape[1] - 1)

    @contextmanager
    def perturbed(self) -> Iterator[None]:
        """The model at W + eps by the gradients there are, then cleared; W again afterwards."""
        saved = []
        with torch.no_grad():
            for layer in self.layers:
                saved.append(layer.weight.detach().clone())
                gradient = layer.gradient
                norm = layer.units(gradient, "l2").double()
                scale = torch.where(norm > 0, self.radii(layer) / norm, 0)
                factor = self.pattern.spread(scale, layer.shape, layer.groups)
                layer.weight.add_(
                    (gradient * factor.to(gradient.dtype)).masked_fill(~layer.mask, 0)
                )
        for parameter in self.model.parameters():
            parameter.grad = None
        try:
            yield
        finally:
            with torch.no_grad():
                for layer, weight in zip(self.layers, saved, strict=True):
                    layer.weight.copy_(weight)
