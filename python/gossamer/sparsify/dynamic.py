"""Dynamic sparse training: constant sparsity, masks that move."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..formats import Block
from ..prune import largest
from .layers import Layer
from .patterns import Pattern
from .schedules import Schedule
from .scores import Score
from .sparsifier import Sparsifier


class DropGrow(Sparsifier):
    """Drop what one score holds for the least of what lives, grow what another holds for the best.

    With L live units in a layer and a share f, floor(f L) of them are dropped and as many grown
    among all that do not live then; with several lanes each lane grows what it lost. Sparsity is
    the same before and after, to the entry.

    Parameters
    ----------
    model, pattern, schedule, **options
        As for ``Sparsifier``; the schedule one that drops and grows.
    drop : Score
        The least are dropped.
    grow : Score, optional
        The best are grown; without one a random choice.
    deviation : float
        Of the normal distribution that grown entries begin with; 0 begins with 0, and leaves an
        entry that was dropped and grown at once what it was.
    """

    grows = True

    def __init__(
        self,
        model: nn.Module,
        pattern: Pattern | Block | str,
        drop: Score,
        grow: Score | None,
        schedule: Schedule,
        deviation: float = 0.0,
        **options: Any,
    ) -> None:
        self.grow, self.deviation = grow, deviation
        super().__init__(model, pattern, drop, schedule, **options)

    def _scores(self) -> list[Score]:
        return [self.score] if self.grow is None else [self.score, self.grow]

    @torch.no_grad()
    def drop_and_grow(self, fraction: float) -> None:
        lives = [int(layer.kept.sum()) for layer in self.layers]
        survivors = [
            self.of_rank_0(self.survivors(layer, int(self.share(layer, fraction) * live)))
            for layer, live in zip(self.layers, lives, strict=True)
        ]
        counts = self.counts(lives, [int(kept.sum()) for kept in survivors])
        self._take(
            [
                self.pattern.select(self.growth(layer, kept), count)
                for layer, kept, count in zip(self.layers, survivors, counts, strict=True)
            ]
        )
        for layer, kept in zip(self.layers, survivors, strict=True):
            self._begin(layer, kept)
        self.apply()

    def share(self, layer: Layer, fraction: float) -> float:
        """Which share of a layer is dropped, where the schedule says ``fraction``."""
        return fraction

    def survivors(self, layer: Layer, dropped: int) -> Tensor:
        """The live units of a layer without so many of the least."""
        units = self.scored(layer, self.score).masked_fill(~layer.kept, -torch.inf)
        survive = int(layer.kept.sum()) - dropped
        return largest(units.flatten(), survive).view_as(units)

    def counts(self, lives: list[int], survived: list[int]) -> list[int]:
        """How many units each layer has in the end, of how many lived and survived the drop."""
        return lives

    def growth(self, layer: Layer, survivors: Tensor) -> Tensor:
        """What units are worth when they compete to live: those that survived above all."""
        worth = self.random(layer) if self.grow is None else self.scored(layer, self.grow)
        padded = worth == -torch.inf
        finite = worth.double().clamp(max=torch.finfo(torch.float32).max)
        return finite.masked_fill(padded, -torch.inf).masked_fill(survivors, torch.inf)

    def _begin(self, layer: Layer, survivors: Tensor) -> None:
        """Give the grown entries of a layer their first values."""
        assert layer.fresh is not None
        layer.weight.masked_fill_(layer.fresh, 0)
        self._forget(layer, layer.fresh)
        if self.deviation > 0:
            grown = layer.mask & ~self.pattern.cover(survivors, layer.shape, layer.groups)
            # As many numbers whatever the device, from the generator that is saved.
            numbers = torch.randn(int(grown.sum()), generator=self.generator, device="cpu")
            layer.weight[grown] = (self.deviation * numbers).to(layer.weight)
