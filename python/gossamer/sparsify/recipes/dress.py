"""DRESS: nested subnets that share one weight."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..computed import Computed, Standing
from ..layers import Layer
from ..patterns import ConstantFanIn
from ..scores import Magnitude
from ..sparsifier import Sparsifier


class DRESS(Computed):
    """min over W of sum_i pi_i L(M_i W): M_1 in M_2 in ..., each the largest k_i of every row.

    ``with dress.subnet(i):`` runs the model as subnet i; a step sums the gradients of all::

        for i, share in enumerate(shares):
            with dress.subnet(i):
                (share * loss(model(x))).backward()

    Rows of a subnet hold equally many non-zeros, and those of a sparser one are among them.
    Outside of the block the model is the densest subnet.

    Parameters
    ----------
    model, **options
        As for ``Sparsifier``.
    sparsities : sequence of float
        Descending, in [0, 1).

    Raises
    ------
    TypeError, ValueError
        As ``Sparsifier`` says, or if the sparsities are none or do not descend.

    References
    ----------
    DRESS: "Dynamic REal-time Sparse Subnets". The equation is from memory.
    """

    def __init__(self, model: nn.Module, sparsities: Sequence[float], **options: Any) -> None:
        self.sparsities = list(sparsities)
        if not self.sparsities or self.sparsities != sorted(self.sparsities, reverse=True):
            raise ValueError(f"DRESS: sparsities {self.sparsities}, expected a descending sequence")
        super().__init__(
            model, ConstantFanIn(), Magnitude(), Standing(self.sparsities[-1]), **options
        )
        for layer in self.layers:
            layer.keep(self.sparsities[0])
        self._views = self.compute(_Subnet)

    @contextmanager
    def subnet(self, index: int) -> Iterator[None]:
        """The model as one of the subnets."""
        with torch.no_grad():
            for view, kept in zip(self._views, self._selected(self.sparsities[index]), strict=True):
                layer = view.layer[0]
                view.mask = self.pattern.cover(kept, layer.shape, layer.groups)
        try:
            yield
        finally:
            for view in self._views:
                view.mask = None

    def apply(self) -> None:
        """Make 0 what no subnet has."""
        Sparsifier.apply(self)

    @torch.no_grad()
    def step(self) -> None:
        self.steps += 1
        self.apply()

    @torch.no_grad()
    def finalize_at(self, index: int = -1) -> Sparsifier:
        """Leave one subnet alone in the weights, under an exact ``Sparsifier``."""
        return self.leave(self.sparsities[index])


class _Subnet(nn.Module):
    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.layer = (layer,)  # no submodule, no state
        self.mask: Tensor | None = None

    def forward(self, weight: Tensor) -> Tensor:
        mask = self.layer[0].mask if self.mask is None else self.mask
        return weight * mask
