"""Interleaved timing: in every round each contender runs in turn.

A machine drifts (clock, neighbours, temperature) more than good kernels differ. Contenders that are
timed within milliseconds of each other see the same machine, so the ratio of two of them is taken
round by round, and the median of those ratios is reported, with its quartiles.
"""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from pytest_benchmark.stats import Stats

WARM_CALL_BELOW = 0.005  # s; a longer call refills the caches in a small part of its own time
STRAGGLER = 2.0  # a rival this many times slower than the fastest rival is timed briefly
STRAGGLER_ROUNDS = 3
UNSETTLED = 0.1  # interquartile range over median: above it a case is given more time
PATIENCE = 2.0  # times the budget, at most


@dataclass(frozen=True)
class Contender:
    """One way to do the job of a case.

    ``session`` is entered around the calls of every round and is not timed: where a way to compute
    needs a global setting, it goes there. A ``subject`` is no rival: it is timed in every round,
    however slow.
    """

    name: str
    run: Callable[[], Any]
    session: Callable[[], AbstractContextManager[Any]] = nullcontext
    subject: bool = False


@dataclass(frozen=True)
class Effort:
    """How long to measure: a case takes about ``budget`` seconds, and its rounds stay in bounds.

    A case whose rounds differ much, because the machine has other work, is given more.
    """

    budget: float = 1.0
    slice: float = 0.004  # s of one contender in one round, unless a single call takes longer
    least_rounds: int = 5
    most_rounds: int = 25


@dataclass(frozen=True)
class Timing:
    """Seconds a call of one contender, one entry a round, each the mean of ``calls`` calls."""

    seconds: tuple[float, ...]
    calls: int

    @property
    def stats(self) -> Stats:
        """pytest-benchmark's statistics of the rounds."""
        stats = Stats()
        for value in self.seconds:
            stats.update(value)
        return stats

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Interquartile range over median."""
        return float(self.stats.iqr) / self.median


@dataclass(frozen=True)
class Ratio:
    """How many times faster one contender was than another, over the rounds both ran in."""

    median: float
    low: float  # first quartile
    high: float  # third quartile


def speedup(timing: Timing, baseline: Timing) -> Ratio:
    """The baseline's time over ``timing``'s, round by round: above 1 the baseline is slower."""
    stats = Stats()
    for own, other in zip(timing.seconds, baseline.seconds, strict=False):
        stats.update(other / own)
    return Ratio(float(stats.median), float(stats.q1), float(stats.q3))


def geometric_mean(values: Iterable[float]) -> float:
    """The mean that suits ratios; NaN of nothing."""
    logs = [math.log(value) for value in values]
    return math.exp(statistics.fmean(logs)) if logs else math.nan


def _seconds_per_call(
    contender: Contender, calls: int, warm_call: bool, clock: Callable[[], float]
) -> float:
    with contender.session():
        if warm_call:
            contender.run()
        start = clock()
        for _ in range(calls):
            contender.run()
        return (clock() - start) / calls


def _calibrate(
    contender: Contender, effort: Effort, clock: Callable[[], float]
) -> tuple[int, float]:
    """Warms up; returns how many calls fill a time slice, and the seconds that one takes."""
    calls = 1
    seconds = _seconds_per_call(contender, calls, False, clock)
    if seconds > 10 * effort.slice:
        return calls, seconds  # too long for the first call's own costs to matter
    seconds = _seconds_per_call(contender, calls, False, clock)
    while seconds * calls < effort.slice / 2:
        wanted = effort.slice / max(seconds, 1e-9)
        calls = max(calls + 1, min(10 * calls, round(wanted)))
        seconds = _seconds_per_call(contender, calls, False, clock)
    return calls, seconds


def _settled(seconds: Sequence[float]) -> bool:
    return Timing(tuple(seconds), 1).spread <= UNSETTLED


def measure(
    contenders: Sequence[Contender],
    effort: Effort,
    clock: Callable[[], float] = perf_counter,
) -> dict[str, Timing]:
    """Time all contenders of a case together.

    Each is warmed up and calibrated alone. Then come rounds in which each runs for a time slice,
    one after the other, a different one first in each round; a call before each slice brings its
    own weights back into the caches. A rival far behind the others leaves after some rounds.

    Parameters
    ----------
    contenders : sequence of Contender
        With distinct names; the first is the one that the others, its rivals, are compared with.
        There may be further subjects.
    effort : Effort
        Slices, rounds and the budget, all in seconds.
    clock : callable
        Seconds, increasing.

    Returns
    -------
    dict of str to Timing
        By name, in the order given. Timings line up: entry r of each is from round r.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        pace = {c.name: _calibrate(c, effort, clock) for c in contenders}
        seconds: dict[str, list[float]] = {c.name: [] for c in contenders}
        active = list(contenders)
        start = clock()
        for round_index in range(effort.most_rounds):
            spent = clock() - start
            if round_index >= effort.least_rounds and spent > effort.budget:
                settled = all(_settled(seconds[c.name]) for c in active)
                if settled or spent > PATIENCE * effort.budget:
                    break
            first = round_index % len(active)
            for contender in active[first:] + active[:first]:
                calls, expected = pace[contender.name]
                warm_call = expected < WARM_CALL_BELOW
                taken = _seconds_per_call(contender, calls, warm_call, clock)
                seconds[contender.name].append(taken)
            rivals = [c for c in active[1:] if not c.subject]
            if round_index + 1 == STRAGGLER_ROUNDS and rivals:
                # The least time, since a disturbed round must not turn the best rival away. Calls
                # that fit a time slice cost nothing more than the others.
                least = {c.name: min(seconds[c.name]) for c in rivals}
                limit = max(effort.slice, STRAGGLER * min(least.values()))
                active = [c for c in active if least.get(c.name, 0.0) <= limit]
    finally:
        if collecting:
            gc.enable()
    return {name: Timing(tuple(s), pace[name][0]) for name, s in seconds.items()}
