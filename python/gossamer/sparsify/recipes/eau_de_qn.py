"""EauDeQN: differently sparse copies of a value network; the one that learns best is followed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...formats import Block
from ..computed import Standing
from ..patterns import Pattern, Unstructured, check_sparsity
from ..scores import Magnitude
from ..sparsifier import Sparsifier


class EauDeQN:
    """K online networks learn from one target; at its update that of least loss is followed.

    Each step trains all copies on the same batch and adds up their losses. ``update_target`` makes
    the copy whose sum is least the target; it goes on as it is, and each other becomes a copy of
    it, optimizer included, that is pruned further: a share u ``rate`` of what lives, u uniform in
    [0, 1), until ``sparsity`` is reached. So sparsity grows as fast as learning bears it::

        for network, optimizer in made.copies():
            loss = temporal_difference(network, made.target, batch)
            loss.backward(); optimizer.step(); optimizer.zero_grad(); losses.append(loss)
        made.step(losses)
        if due: made.update_target()

    Parameters
    ----------
    network : nn.Module
        Copied; stays as it is.
    optimizer : callable
        parameters -> torch.optim.Optimizer, for each copy.
    copies : int
        K.
    sparsity : float
        Where pruning ends.
    rate : float
        In (0, 1).
    pattern : Pattern, Block or str
    seed : int
    **options
        ``include``, ``exclude``, ``distribution`` of ``Sparsifier``.

    Raises
    ------
    TypeError, ValueError
        As ``Sparsifier`` says, or if ``copies`` is below 2, or ``rate`` not in (0, 1).

    References
    ----------
    Vincent et al., "Eau De Q-Network: Adaptive Distillation of Neural Networks in Deep
    Reinforcement Learning", 2025. How levels are drawn was not recovered from it: ours, as are
    the defaults.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer],
        copies: int = 5,
        sparsity: float = 0.95,
        rate: float = 0.2,
        pattern: Pattern | Block | str | None = None,
        seed: int = 0,
        **options: Any,
    ) -> None:
        self.sparsity, self.rate = check_sparsity(sparsity), rate
        if copies < 2 or not 0 < rate < 1:
            raise ValueError(f"EauDeQN: {copies} copies, rate {rate}: at least 2, in (0, 1)")
        self.networks = [copy.deepcopy(network) for _ in range(copies)]
        self.target = copy.deepcopy(network).requires_grad_(False)
        self.optimizers = [optimizer(each.parameters()) for each in self.networks]
        self.sparsifiers = [
            Sparsifier(
                n, pattern or Unstructured(), Magnitude(), Standing(0.0), optimizer=o, **options
            )
            for n, o in zip(self.networks, self.optimizers, strict=True)
        ]
        for made in self.sparsifiers:
            for layer in made.layers:
                layer.keep(sparsity)
        self.losses = [0.0] * copies
        self.levels = [0.0] * copies
        self.generator = torch.Generator("cpu").manual_seed(seed)

    def copies(self) -> Iterator[tuple[nn.Module, torch.optim.Optimizer]]:
        """Each online network with its optimizer."""
        return zip(self.networks, self.optimizers, strict=True)

    @torch.no_grad()
    def step(self, losses: Sequence[Tensor | float]) -> None:
        """Add the losses of a step, of each copy one; call it after the optimizers.

        Raises
        ------
        ValueError
            If they are not as many as the copies.
        """
        if len(losses) != len(self.networks):
            raise ValueError(f"EauDeQN: {len(losses)} losses of {len(self.networks)} copies")
        self.losses = [s + float(loss) for s, loss in zip(self.losses, losses, strict=True)]
        for made in self.sparsifiers:
            made.step()

    @torch.no_grad()
    def update_target(self) -> int:
        """Follow the copy of least loss and say which it was; the lower of equal ones."""
        # A sum that is no number is no least one.
        ranked = [loss if loss == loss else float("inf") for loss in self.losses]
        best = ranked.index(min(ranked))
        states = [x[best].state_dict() for x in (self.networks, self.optimizers, self.sparsifiers)]
        self.target.load_state_dict(states[0])
        level = self.levels[best]
        for i, (network, its_optimizer) in enumerate(self.copies()):
            u = float(torch.rand((), generator=self.generator, dtype=torch.float64))
            if i == best:
                continue
            network.load_state_dict(states[0])
            its_optimizer.load_state_dict(copy.deepcopy(states[1]))  # torch would share it
            self.sparsifiers[i].load_state_dict(states[2])
            self.levels[i] = min(self.sparsity, 1 - (1 - level) * (1 - self.rate * u))
            self.sparsifiers[i].prune_to(self.levels[i])
        self.losses = [0.0] * len(self.networks)
        return best

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors, numbers and containers, from which training goes on to the bit."""
        return {
            "copies": [
                [x.state_dict() for x in (network, optimizer, made)]
                for (network, optimizer), made in zip(self.copies(), self.sparsifiers, strict=True)
            ],
            "target": self.target.state_dict(),
            "losses": list(self.losses),
            "levels": list(self.levels),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` gave; ValueError if it has another number of copies."""
        if len(state["copies"]) != len(self.networks):
            raise ValueError(
                f"EauDeQN: the state has {len(state['copies'])} copies, not {len(self.networks)}"
            )
        each = zip(self.copies(), self.sparsifiers, state["copies"], strict=True)
        for (network, optimizer), made, saved in each:
            network.load_state_dict(saved[0])
            optimizer.load_state_dict(saved[1])
            made.load_state_dict(saved[2])
        self.target.load_state_dict(state["target"])
        self.losses, self.levels = list(state["losses"]), list(state["levels"])
        self.generator.set_state(state["generator"])
