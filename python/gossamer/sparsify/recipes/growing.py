"""Growing networks by structured continuous sparsification: a gate for each filter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...formats import Block
from ..computed import Computed
from ..layers import Layer
from ..patterns import Filters, Pattern
from ..schedules import OneShot
from ..scores import Magnitude, Score
from ..sparsifier import Sparsifier


class ContinuousSparsification(Computed):
    """W~_i = q_i sigmoid(beta s_i) W_i for each filter i, q_i ~ Bernoulli(sigmoid(beta s_i)).

    beta = beta_max^(t / end) rises from 1, so that gates become 0 or 1; filters whose s rises above
    0 grow, others go. Each step samples q anew, and a filter that is not in the sample gets no
    gradient. ``penalty()`` draws the expected share of what lives, e = sum n_i sigmoid(beta s_i) /
    sum n_i, to the budget: strength (e - (1 - sparsity))^2. After ``end`` steps exactly the filters
    of largest s stay, their gates are 1, and the rest is 0.

    Parameters
    ----------
    model, **options
        As for ``Sparsifier``.
    sparsity : float
        The share of filters of each layer that goes in the end.
    end : int
    grown : float
        The share of each layer's filters whose s is above 0 at the beginning, those of largest
        norm.
    beta : float
        beta_max.
    strength : float
    initial : float
        |s| at the beginning.
    pattern : Pattern, Block or str
        Whose units have gates: filters by default.

    Raises
    ------
    TypeError, ValueError
        As ``Sparsifier`` says, or if a number is out of its range, or the units of ``pattern`` do
        not all compete.

    References
    ----------
    Yuan, Savarese, Maire, "Growing Efficient Deep Networks by Structured Continuous
    Sparsification", ICLR 2021. From memory; one beta for all filters, the form of the budget's
    loss and the beginning are ours.
    """

    one_lane_only = True

    def __init__(
        self,
        model: nn.Module,
        sparsity: float,
        end: int,
        grown: float = 0.5,
        beta: float = 200.0,
        strength: float = 1.0,
        initial: float = 0.1,
        pattern: Pattern | Block | str | None = None,
        **options: Any,
    ) -> None:
        if not 0 < grown <= 1 or beta < 1 or strength < 0 or initial <= 0 or end < 1:
            raise ValueError(
                f"ContinuousSparsification: end {end}, grown {grown}, beta {beta}, strength "
                f"{strength}, initial {initial}: expected at least 1, in (0, 1], at least 1, at "
                "least 0, above 0"
            )
        self.end, self.beta_max, self.strength = end, beta, strength
        super().__init__(
            model, pattern or Filters(), Magnitude(), OneShot(sparsity, at=end), **options
        )

        def gate(layer: Layer) -> _Gate:
            norms = super(ContinuousSparsification, self).scored(layer, self.score)
            alive = self.pattern.select(norms, layer.keep(1 - grown))
            s = torch.where(alive, initial, -initial).to(layer.weight)
            return _Gate(layer, s)

        self._gates = self.compute(gate)
        with torch.no_grad():
            self._sample()

    def parameters(self) -> Iterator[nn.Parameter]:
        """s of each layer, which are among the model's parameters."""
        for gate in self._gates:
            yield gate.s

    def beta(self, step: int) -> float:
        """After a step."""
        return self.beta_max ** (min(step, self.end) / self.end)

    def penalty(self) -> Tensor:
        """What is added to the loss until ``end``."""
        if self.steps >= self.end:
            return torch.zeros((), device=self._gates[0].s.device)
        live = torch.stack([n * g.open().mean() for n, g in self._sized()]).sum()
        share = live / sum(n for n, _ in self._sized())
        return self.strength * (share - (1 - self.schedule.sparsity)).square()

    def _sized(self) -> list[tuple[int, _Gate]]:
        sizes = [layer.mask.numel() for layer in self.layers]
        return list(zip(sizes, self._gates, strict=True))

    def _sample(self) -> None:
        """Draw the filters of a step, the one of largest s among them."""
        for layer, gate in zip(self.layers, self._gates, strict=True):
            gate.beta = self.beta(self.steps)
            alive = self.random(layer) < gate.open()
            alive.view(-1)[gate.s.argmax()] = True
            layer.take(self.of_rank_0(alive))

    def scored(self, layer: Layer, score: Score) -> Tensor:
        """exp(s): of all layers together too."""
        return self._gates[self.layers.index(layer)].s.detach().double().exp()

    @torch.no_grad()
    def step(self) -> None:
        if self.steps < self.end:
            self.steps += 1
            if self.steps < self.end:
                self._sample()
            else:
                self.prune_to(self.schedule.sparsity)
                self._close()
        else:
            self.steps += 1
        self.apply()

    def apply(self) -> None:
        """Leave the weights to the gates until the end."""
        if self.steps >= self.end:
            Sparsifier.apply(self)

    def _close(self) -> None:
        for gate in self._gates:
            gate.s.requires_grad_(False)
            gate.s.grad, gate.beta = None, torch.inf

    @torch.no_grad()
    def finalize_at(self) -> Sparsifier:
        """Leave the filters that stay alone in the weights, under an exact ``Sparsifier``.

        Raises
        ------
        RuntimeError
            Before the step ``end``.
        """
        if self.steps < self.end:
            raise RuntimeError(f"ContinuousSparsification: step {self.steps} of {self.end}")
        return self.leave(self.schedule.sparsity, distribution=self.distribution)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        for gate in self._gates:
            gate.beta = self.beta(self.steps)
        if self.steps >= self.end:
            self._close()


class _Gate(nn.Module):
    def __init__(self, layer: Layer, s: Tensor) -> None:
        super().__init__()
        self.s, self.beta = nn.Parameter(s), 1.0
        self._layer = (layer,)  # no submodule, no state

    def open(self) -> Tensor:
        """sigmoid(beta s)."""
        return (self.beta * self.s).sigmoid()

    def forward(self, weight: Tensor) -> Tensor:
        (layer,) = self._layer
        gate = layer.kept.to(weight.dtype)
        if self.beta < torch.inf:
            gate = gate * self.open()
        return weight * layer.pattern.spread(gate, layer.shape, layer.groups).to(weight.dtype)
