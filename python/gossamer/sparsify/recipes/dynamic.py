"""Dynamic sparse training: SET, RigL, sparse momentum, DST-EE. They differ in what grows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...formats import Block
from ..allocation import share_out
from ..dynamic import DropGrow
from ..layers import Layer
from ..patterns import Pattern, Unstructured, over_layers
from ..schedules import DropAndGrow
from ..scores import Gradient, Magnitude, Momentum, Score
from ..stored import StoredDropGrow

AnyPattern = Pattern | Block | str | None


class SignedMagnitude(Score):
    """How many that live and have the same sign are of no larger magnitude, as a share of them."""

    def __call__(self, layer: Layer) -> Tensor:
        # A step may have moved what is masked.
        return signed_ranks(layer.weight.detach() * layer.mask)


def signed_ranks(weight: Tensor) -> Tensor:
    """``SignedMagnitude`` of any numbers."""
    score = torch.zeros(weight.shape, dtype=torch.float64, device=weight.device)
    for side in (weight > 0, weight < 0):
        values = weight[side].abs()
        ranks = torch.empty(len(values), dtype=torch.float64, device=weight.device)
        order = values.argsort(stable=True)
        count = torch.arange(1, len(values) + 1, dtype=torch.float64, device=weight.device)
        ranks[order] = count / max(1, len(values))
        score[side] = ranks
    return score


class SET(DropGrow):
    """Every epoch drop the smallest positive and the largest negative weights, grow at random.

    A share zeta of each layer's live weights is dropped, of either sign in proportion; as many are
    grown anywhere, with values from N(0, 0.1^2). Not in the last epoch.

    Parameters
    ----------
    model, pattern, **options
        As for ``Sparsifier``; Erdős-Rényi densities where the pattern allows.
    sparsity : float
    end : int
        Steps of training.
    every : int
        Steps of an epoch.
    zeta : float
    deviation : float

    References
    ----------
    Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse
    connectivity inspired by network science", Nature Communications 2018.
    """

    def __init__(
        self,
        model: nn.Module,
        sparsity: float,
        end: int,
        every: int,
        zeta: float = 0.3,
        deviation: float = 0.1,
        pattern: AnyPattern = None,
        **options: Any,
    ) -> None:
        pattern = over_layers(pattern, options, "erk")
        schedule = DropAndGrow(sparsity, end, every, zeta, cosine=False)
        super().__init__(model, pattern, SignedMagnitude(), None, schedule, deviation, **options)

    @staticmethod
    def stored(
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        end: int,
        every: int,
        zeta: float = 0.3,
        deviation: float = 0.1,
        **options: Any,
    ) -> StoredDropGrow:
        """The same for layers whose weight is stored sparse; options as for ``StoredDropGrow``."""
        schedule = DropAndGrow(0.0, end, every, zeta, cosine=False)
        rest = {"deviation": deviation, **options}
        return StoredDropGrow(model, optimizer, schedule, signed_ranks, **rest)


class RigL(DropGrow):
    """Drop the smallest |w|, grow the largest |gradient| of the dense weight, from 0.

    The share is alpha / 2 (1 + cos(pi t / end)) every so many steps.

    Parameters
    ----------
    model, pattern, **options
        As for ``Sparsifier``; Erdős-Rényi densities where the pattern allows.
    sparsity : float
    end : int
        The step from which masks stay: 75 % of training.
    every : int
    alpha : float

    References
    ----------
    Evci et al., "Rigging the Lottery: Making All Tickets Winners", ICML 2020.
    """

    def __init__(
        self,
        model: nn.Module,
        sparsity: float,
        end: int,
        every: int = 100,
        alpha: float = 0.3,
        pattern: AnyPattern = None,
        grow: Score | None = None,
        **options: Any,
    ) -> None:
        pattern = over_layers(pattern, options, "erk")
        schedule = DropAndGrow(sparsity, end, every, alpha)
        grow = Gradient() if grow is None else grow
        super().__init__(model, pattern, Magnitude(), grow, schedule, **options)

    @staticmethod
    def stored(
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        end: int,
        every: int = 100,
        alpha: float = 0.3,
        **options: Any,
    ) -> StoredDropGrow:
        """The same for layers whose weight is stored sparse; options as for ``StoredDropGrow``.

        A place that is dropped and grown at once begins at 0, too.
        """
        schedule = DropAndGrow(0.0, end, every, alpha)
        return StoredDropGrow(model, optimizer, schedule, torch.abs, by_gradient=True, **options)


class Acquisition(Score):
    """|g| + c ln(t) / (N + eps): t the step, N the changes of the mask that saw the entry alive."""

    sees_gradients = True
    masked_gradients = "due"

    def __init__(self, c: float, eps: float) -> None:
        self.c, self.eps, self.steps = c, eps, 0
        self.visits: dict[str, Tensor] = {}

    def observe(self, layers: Sequence[Layer]) -> None:
        self.steps += 1

    def visit(self, layer: Layer) -> None:
        seen = self.visits.setdefault(layer.name, torch.zeros_like(layer.mask, dtype=torch.int32))
        seen.add_(layer.mask)

    def __call__(self, layer: Layer) -> Tensor:
        rare = 1 / (self.visits[layer.name] + self.eps)
        return layer.gradient.detach().abs() + self.c * math.log(max(1, self.steps)) * rare

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "visits": {k: v.clone() for k, v in self.visits.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps = state["steps"]
        self.visits = {name: seen.clone() for name, seen in state["visits"].items()}


class DSTEE(RigL):
    """RigL with growth by |g| + c ln(t) / (N_t + eps): entries that rarely lived are tried.

    Parameters
    ----------
    model, sparsity, end, every, alpha, pattern, **options
        As for ``RigL``.
    c, eps : float
        Not known from the paper; these are ours.

    References
    ----------
    Huang et al., "Dynamic Sparse Training via Balancing the Exploration-Exploitation Trade-off",
    DAC 2023. The formula is from memory.
    """

    def __init__(
        self,
        model: nn.Module,
        sparsity: float,
        end: int,
        every: int = 100,
        alpha: float = 0.3,
        pattern: AnyPattern = None,
        c: float = 1e-3,
        eps: float = 1.0,
        **options: Any,
    ) -> None:
        self._acquisition = Acquisition(c, eps)
        super().__init__(model, sparsity, end, every, alpha, pattern, self._acquisition, **options)

    @torch.no_grad()
    def drop_and_grow(self, fraction: float) -> None:
        for layer in self.layers:
            self._acquisition.visit(layer)
        super().drop_and_grow(fraction)


class SparseMomentum(DropGrow):
    """Drop the smallest |w|; layers grow in proportion to their mean |momentum|, by the largest.

    With p from 0.5 to 0.005 by a cosine, each layer drops p of what lives; of all that was dropped
    layer l gets the share r_l = mean |m| over its live weights, by the sum of these means.

    Parameters
    ----------
    model, pattern, **options
        As for ``Sparsifier``; a pattern of one lane.
    end : int
        Steps of training.
    every : int
        Steps of an epoch.
    sparsity : float
    p : float
    decay : float
        Of the exponentially smoothed gradient.

    Raises
    ------
    TypeError, ValueError
        As ``Sparsifier`` says, or if the units of ``pattern`` do not all compete.

    References
    ----------
    Dettmers, Zettlemoyer, "Sparse Networks from Scratch: Faster Training without Losing
    Performance", 2019 (arXiv:1907.04840). The number that lives is exact at each change, so their
    controller of what rounding loses is left out, and so are their bounds for nearly dense layers.
    """

    one_lane_only = True

    def __init__(
        self,
        model: nn.Module,
        end: int,
        every: int,
        sparsity: float = 0.95,
        p: float = 0.5,
        decay: float = 0.9,
        pattern: AnyPattern = None,
        **options: Any,
    ) -> None:
        pattern = Unstructured() if pattern is None else pattern
        schedule = DropAndGrow(sparsity, end, every, p, final=0.005)
        super().__init__(model, pattern, Magnitude(), Momentum(decay), schedule, **options)

    def counts(self, lives: list[int], survived: list[int]) -> list[int]:
        assert self.grow is not None
        shares = [float(self.grow(layer)[layer.mask].double().mean()) for layer in self.layers]
        sizes = [layer.kept.numel() for layer in self.layers]
        room = [size - kept for size, kept in zip(sizes, survived, strict=True)]
        if not sum(shares) > 0:
            return lives
        grown = share_out(shares, room, sum(lives) - sum(survived), least=0)
        return [kept + more for kept, more in zip(survived, grown, strict=True)]
