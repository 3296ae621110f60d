"""HESSO: redundant groups shrink to zero, a part of them in each period."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...formats import Block
from ...prune import largest
from ..layers import Layer
from ..patterns import Filters, Pattern
from ..schedules import Schedule, check_steps
from ..scores import Score
from ..sparsifier import Sparsifier


class Periods(Schedule):
    """From ``start_step`` on, ``periods`` of equal length that end ``steps`` later."""

    def __init__(self, sparsity: float, start_step: int, steps: int, periods: int) -> None:
        super().__init__(sparsity)
        check_steps("HESSO", start_step, start_step + steps, 1)
        if periods < 1 or steps < periods or steps % periods != 0:
            raise ValueError(f"HESSO: {steps} steps in {periods} periods, expected a multiple")
        self.start_step, self.periods, self.length = start_step, periods, steps // periods

    def update(self, sparsifier: Sparsifier) -> None:
        assert isinstance(sparsifier, HESSO)
        period, t = divmod(sparsifier.steps - 1 - self.start_step, self.length)
        if 0 <= period < self.periods:
            sparsifier.shrink(period, t, self.length)


class Saliency(Score):
    """The score of groups, [1, groups], by the gradient of the last step."""

    sees_gradients = True
    masked_gradients = "none"

    def __call__(self, layer: Layer) -> Tensor:
        weight, gradient = layer.weight.detach().double(), layer.gradient.detach().double()

        def total(entries: Tensor) -> Tensor:
            inside = layer.units(entries.clamp(min=0), "sum")
            return inside - layer.units((-entries).clamp(min=0), "sum")

        size = total(torch.ones_like(weight))
        norm, slope = total(weight.square()).sqrt(), total(weight * gradient)
        cosine = slope / (norm * total(gradient.square()).sqrt()).clamp(min=1e-30)
        parts = [norm, norm / size.sqrt(), 1 + cosine, slope.abs(), 0.5 * slope.square()]
        return sum((0.2 * p / p.mean().clamp(min=1e-30) for p in parts), torch.zeros_like(norm))


class HESSO(Sparsifier):
    """In P periods the K / P groups of lowest saliency each shrink to 0 while training goes on.

    At the beginning of a period groups are chosen; after its step t of T (from 0) theirs are
    multiplied by (T - t - 1) / (T - t), which is 0 at the last, and stay 0. The saliency is 0.2
    each of magnitude |w|, |w| / sqrt(size), 1 - cos(w, -g), |<w, g>| and 0.5 <w, g>^2, each
    divided by its mean over the groups of a layer.

    Parameters
    ----------
    model, **options
        As for ``Sparsifier``.
    sparsity : float
        The share of the groups of each layer that goes.
    start, steps, periods : int
        The step at which pruning starts, how many it takes (a multiple of the periods), in how
        many parts.
    divisible : int
        What the number of groups that stay is a multiple of, where that is possible.
    pattern : Pattern, Block or str
        Whose units are the groups: filters by default. Each layer is on its own: no
        zero-invariant groups across layers are looked for.

    Raises
    ------
    TypeError, ValueError
        As ``Sparsifier`` says, or if a number is out of its range, or the units of ``pattern`` do
        not all compete.

    References
    ----------
    Chen et al., "HESSO: Towards Automatic Efficient and User Friendly Any Neural Network Training
    and Pruning", 2024 (arXiv:2409.09085). The five parts and their weights are those of its code;
    how each is normalised, and the sign of the cosine, are ours.
    """

    one_lane_only = True
    schedule: Periods

    def __init__(
        self,
        model: nn.Module,
        sparsity: float = 0.7,
        start: int = 0,
        steps: int = 1000,
        periods: int = 10,
        divisible: int = 1,
        pattern: Pattern | Block | str | None = None,
        **options: Any,
    ) -> None:
        if divisible < 1:
            raise ValueError(f"HESSO: divisible by {divisible}, expected at least 1")
        self.divisible = divisible
        self._redundant: dict[str, Tensor] = {}
        schedule = Periods(sparsity, start, steps, periods)
        super().__init__(
            model, Filters() if pattern is None else pattern, Saliency(), schedule, **options
        )

    def kept_of(self, layer: Layer) -> int:
        """How many groups of a layer stay."""
        kept = layer.keep(self.schedule.sparsity)
        whole = round(kept / self.divisible) * self.divisible
        return whole if 0 < whole <= layer.kept.numel() else kept

    @torch.no_grad()
    def shrink(self, period: int, t: int, length: int) -> None:
        """Step t of a period: choose groups at its first, drop them for good at its last."""
        for layer in self.layers:
            if t == 0:
                self._redundant[layer.name] = self._chosen(layer, period + 1)
            factor = torch.ones_like(layer.kept, dtype=torch.float64)
            factor[self._redundant[layer.name]] -= 1 / (length - t)
            spread = self.pattern.spread(factor, layer.shape, layer.groups)
            layer.weight.mul_(spread.to(layer.weight.dtype))
        if t == length - 1:
            self._take([layer.kept & ~self._redundant[layer.name] for layer in self.layers])

    def _chosen(self, layer: Layer, period: int) -> Tensor:
        """The groups that a period adds to those that are gone."""
        units = layer.kept.numel()
        stay = units - (units - self.kept_of(layer)) * period // self.schedule.periods
        score = self.score(layer).masked_fill(~layer.kept, -torch.inf)
        return layer.kept & ~largest(score, stay)

    def state_dict(self) -> dict[str, Any]:
        chosen = {name: groups.clone() for name, groups in self._redundant.items()}
        return {**super().state_dict(), "redundant": chosen}

    def load_state_dict(self, state: Any) -> None:
        super().load_state_dict(state)
        self._redundant = {name: groups.clone() for name, groups in state["redundant"].items()}
