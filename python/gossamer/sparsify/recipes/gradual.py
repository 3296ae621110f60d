"""Magnitude pruning step by step: GMP, and lottery rounds."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...formats import Block
from ..patterns import Pattern, Unstructured, over_layers
from ..schedules import Cubic, LotteryRounds
from ..scores import Magnitude
from ..sparsifier import Sparsifier


class GMP(Sparsifier):
    """Gradual magnitude pruning: s_t = s_f + (s_i - s_f) (1 - (t - t_0) / (t_1 - t_0))^3.

    Masked entries are 0 and get gradients, but no update: one returns only where more of the layer
    than before may live.

    Parameters
    ----------
    model, pattern, **options
        As for ``Sparsifier``.
    sparsity, begin, end, every
        As for ``Cubic``.

    References
    ----------
    Zhu, Gupta, "To prune, or not to prune: exploring the efficacy of pruning for model
    compression", 2017 (arXiv:1710.01878).
    """

    def __init__(
        self,
        model: nn.Module,
        sparsity: float,
        begin: int,
        end: int,
        every: int = 100,
        pattern: Pattern | Block | str | None = None,
        **options: Any,
    ) -> None:
        schedule = Cubic(sparsity, begin, end, every)
        super().__init__(model, pattern or Unstructured(), Magnitude(), schedule, **options)

    @classmethod
    def for_agents(
        cls, model: nn.Module, steps: int, sparsity: float = 0.95, every: int = 1000, **options: Any
    ) -> GMP:
        """For a network of values that is learned by replay: from 20 % to 80 % of its steps.

        Parameters
        ----------
        model, **options
            As for ``GMP``; the online network. What is copied to a target network is masked.
        steps : int
            Of the optimizer, in all.
        sparsity : float
        every : int
            Steps between changes. Not known from the paper: ours.

        References
        ----------
        Obando-Ceron et al., "In value-based deep reinforcement learning, a pruned network is a good
        network", ICML 2024, with DQN and Rainbow; from memory.
        """
        return cls(model, sparsity, steps // 5, 4 * steps // 5, every, **options)


class MIRL(Sparsifier):
    """Lottery rounds: each prunes 20 % of what survives by |w| over all layers, and rewinds.

    Parameters
    ----------
    model, pattern, **options
        As for ``Sparsifier``; weights compete over all layers where the pattern has one lane.
    every : int
        Steps of training in a round.
    rounds : int
    rate : float
        The share of the survivors that a round prunes: 0.8^10 = 0.107 are left after ten.

    References
    ----------
    MIR-L, whose code has these defaults; Frankle, Carbin, "The Lottery Ticket Hypothesis", ICLR
    2019.
    """

    def __init__(
        self,
        model: nn.Module,
        every: int,
        rounds: int = 15,
        rate: float = 0.2,
        pattern: Pattern | Block | str | None = None,
        **options: Any,
    ) -> None:
        pattern = over_layers(pattern, options, "global")
        schedule = LotteryRounds(rounds, every, rate)
        super().__init__(model, pattern, Magnitude(), schedule, **options)
