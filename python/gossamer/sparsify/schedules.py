"""Schedules: when masks change, and to what sparsity."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from .patterns import check_sparsity

if TYPE_CHECKING:
    from .sparsifier import Sparsifier


class Schedule:
    """When masks change: what ``Sparsifier`` asks after each of its steps.

    Parameters
    ----------
    sparsity : float
        The one that is aimed at, in [0, 1).
    """

    grows: ClassVar[bool] = False

    def __init__(self, sparsity: float) -> None:
        self.sparsity = check_sparsity(sparsity)

    def start(self, sparsifier: Sparsifier) -> None:
        """Called once, before the first step."""

    def update(self, sparsifier: Sparsifier) -> None:
        """Called at each step, after it was counted."""

    def due(self, step: int) -> bool:
        """Whether masks may change after a step."""
        return True

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` gave."""


def check_steps(name: str, begin: int, end: int, every: int) -> None:
    if every < 1 or begin < 0 or end < begin:
        raise ValueError(
            f"{name}: from step {begin} to {end} every {every}: expected 0 <= begin <= end and "
            "every >= 1"
        )


class OneShot(Schedule):
    """Prune once.

    Parameters
    ----------
    sparsity : float
    at : int
        After which step; 0 before the first, for scores that need no training step.

    Raises
    ------
    ValueError
        If a number is out of its range.
    """

    def __init__(self, sparsity: float, at: int = 0) -> None:
        super().__init__(sparsity)
        check_steps("OneShot", at, at, 1)
        self.at = at

    def start(self, sparsifier: Sparsifier) -> None:
        if self.at == 0:
            sparsifier.prune_to(self.sparsity)

    def update(self, sparsifier: Sparsifier) -> None:
        if sparsifier.steps == self.at:
            sparsifier.prune_to(self.sparsity)


class Cubic(Schedule):
    """s_t = s_f + (s_i - s_f) (1 - (t - t_0) / (t_1 - t_0))^3, every so many steps.

    Parameters
    ----------
    sparsity : float
        s_f.
    begin, end : int
        t_0 and t_1, the steps after which the first and the last change comes.
    every : int
        Steps between changes: 100 to 1000 in the paper.
    initial : float
        s_i.

    Raises
    ------
    ValueError
        If a number is out of its range.

    References
    ----------
    Zhu, Gupta, "To prune, or not to prune", 2017 (arXiv:1710.01878).
    """

    def __init__(
        self, sparsity: float, begin: int, end: int, every: int = 100, initial: float = 0.0
    ) -> None:
        super().__init__(sparsity)
        check_steps("Cubic", begin, end, every)
        self.initial = check_sparsity(initial)
        self.begin, self.end, self.every = begin, end, every

    def at(self, step: int) -> float:
        """The sparsity after a step."""
        if step >= self.end:
            return self.sparsity
        left = 1 - max(0, step - self.begin) / (self.end - self.begin)
        return self.sparsity + (self.initial - self.sparsity) * left**3

    def start(self, sparsifier: Sparsifier) -> None:
        if self.begin == 0 and self.at(0) > 0:
            sparsifier.prune_to(self.at(0))

    def update(self, sparsifier: Sparsifier) -> None:
        step = sparsifier.steps
        due = self.begin <= step <= self.end and (step - self.begin) % self.every == 0
        if due or step == self.end:
            sparsifier.prune_to(self.at(step))


class DropAndGrow(Schedule):
    """Constant sparsity; every so many steps a share of what lives is dropped, and as much grown.

    The share is final + (fraction - final) / 2 * (1 + cos(pi t / end)), or constant.

    Parameters
    ----------
    sparsity : float
    end : int
        The step from which the masks stay; 75 % of training in RigL.
    every : int
        Steps between changes.
    fraction : float
        The share at the beginning, in (0, 1).
    cosine : bool
        Whether the share falls.
    final : float
        To what it falls.

    Raises
    ------
    ValueError
        If a number is out of its range.

    References
    ----------
    Evci et al., "Rigging the Lottery: Making All Tickets Winners", ICML 2020.
    """

    grows = True

    def __init__(
        self,
        sparsity: float,
        end: int,
        every: int = 100,
        fraction: float = 0.3,
        cosine: bool = True,
        final: float = 0.0,
    ) -> None:
        super().__init__(sparsity)
        check_steps("DropAndGrow", 0, end, every)
        if not 0 < fraction < 1:
            raise ValueError(f"DropAndGrow: fraction {fraction}, expected in (0, 1)")
        self.end, self.every, self.fraction = end, every, fraction
        self.cosine, self.final = cosine, final

    def at(self, step: int) -> float:
        """The share that changes after a step."""
        if not self.cosine:
            return self.fraction
        part = (1 + math.cos(math.pi * step / self.end)) / 2
        return self.final + (self.fraction - self.final) * part

    def start(self, sparsifier: Sparsifier) -> None:
        sparsifier.prune_randomly(self.sparsity)

    def due(self, step: int) -> bool:
        return step % self.every == 0 and step < self.end

    def update(self, sparsifier: Sparsifier) -> None:
        if self.due(sparsifier.steps):
            sparsifier.drop_and_grow(self.at(sparsifier.steps))


class PlateauBisection(Schedule):
    """At each plateau of the loss, as much is pruned as raises it by at most a tolerance.

    Where the loss has not fallen for ``patience`` evaluations, bisection finds the largest number
    of the smallest scores whose removal keeps the loss below (1 + tolerance) times what it is.

    Parameters
    ----------
    sparsity : float
        Never exceeded.
    evaluate : callable
        () -> float, the validation loss of the model as it is; the same on all ranks.
    every : int
        Steps between evaluations, an epoch.
    patience : int
        Evaluations without a new least loss that make a plateau; 0 makes each one.
    tolerance : float
        By which share the loss may rise.
    rounds : int
        Bisections.

    Raises
    ------
    ValueError
        If a number is out of its range.

    References
    ----------
    Tartaglione et al., "LOss-Based SensiTivity rEgulaRization", Neural Networks 2022.
    """

    def __init__(
        self,
        sparsity: float,
        evaluate: Callable[[], float],
        every: int = 100,
        patience: int = 0,
        tolerance: float = 0.0,
        rounds: int = 10,
    ) -> None:
        super().__init__(sparsity)
        check_steps("PlateauBisection", 0, 0, every)
        if patience < 0 or tolerance < 0 or rounds < 1:
            raise ValueError(
                f"PlateauBisection: patience {patience}, tolerance {tolerance}, rounds {rounds}: "
                "expected none below 0 and at least one round"
            )
        self.evaluate, self.every, self.patience = evaluate, every, patience
        self.tolerance, self.rounds = tolerance, rounds
        self.best, self.bad, self.reached = math.inf, 0, 0.0

    def update(self, sparsifier: Sparsifier) -> None:
        if sparsifier.steps % self.every != 0 or self.reached >= self.sparsity:
            return
        loss = self.evaluate()
        if loss < self.best:
            self.best, self.bad = loss, 0
        else:
            self.bad += 1
        if self.bad < self.patience:
            return
        # One that is no number bears no comparison, and prunes nothing.
        allowed = loss * (1 + self.tolerance)
        low, high = self.reached, self.sparsity
        if self._loss_at(sparsifier, high) <= allowed:
            low = high
        else:
            for _ in range(self.rounds):
                middle = (low + high) / 2
                if self._loss_at(sparsifier, middle) <= allowed:
                    low = middle
                else:
                    high = middle
        if low > self.reached:
            self.reached = low
            sparsifier.prune_to(low)
        self.best, self.bad = math.inf, 0

    def _loss_at(self, sparsifier: Sparsifier, sparsity: float) -> float:
        with sparsifier.tried(sparsity):
            return self.evaluate()

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "bad": self.bad, "reached": self.reached}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.best, self.bad, self.reached = state["best"], state["bad"], state["reached"]


class LotteryRounds(Schedule):
    """Each round prunes a share of what survives and rewinds the survivors to where they began.

    Parameters
    ----------
    rounds : int
        How many; each prunes ``rate`` of what is left: 1 - (1 - rate)^rounds in the end.
    every : int
        Steps of training in a round.
    rate : float
        In (0, 1).
    rewind_to : int
        The step whose weights survivors go back to, below ``every``.

    Raises
    ------
    ValueError
        If a number is out of its range.

    References
    ----------
    Frankle, Carbin, "The Lottery Ticket Hypothesis", ICLR 2019; Frankle et al., "Linear Mode
    Connectivity and the Lottery Ticket Hypothesis", ICML 2020, for later steps.
    """

    def __init__(self, rounds: int, every: int, rate: float = 0.2, rewind_to: int = 0) -> None:
        if rounds < 1 or not 0 < rate < 1 or not 0 <= rewind_to < every:
            raise ValueError(
                f"LotteryRounds: {rounds} rounds of {every} steps at rate {rate}, rewound to step "
                f"{rewind_to}: expected rounds >= 1, rate in (0, 1), 0 <= rewind_to < every"
            )
        super().__init__(1 - (1 - rate) ** rounds)
        self.rounds, self.every, self.rate, self.rewind_to = rounds, every, rate, rewind_to

    def start(self, sparsifier: Sparsifier) -> None:
        if self.rewind_to == 0:
            sparsifier.remember()

    def update(self, sparsifier: Sparsifier) -> None:
        done, rest = divmod(sparsifier.steps, self.every)
        if sparsifier.steps == self.rewind_to:
            sparsifier.remember()
        if rest == 0 and 1 <= done <= self.rounds:
            sparsifier.prune_to(1 - (1 - self.rate) ** done)
            sparsifier.rewind()
