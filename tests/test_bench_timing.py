"""The bench's stopwatch: what a round is, who runs in it, and the statistics of the ratios."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import timing
from timing import Contender, Effort, Ratio, Timing, geometric_mean, measure, speedup
from tiny_bench import HASTE


class FakeClock:
    """Time that passes only where a contender says so."""

    def __init__(self) -> None:
        self.now = 0.0
        self.ran: list[str] = []

    def __call__(self) -> float:
        return self.now

    def contender(self, name: str, *costs: float) -> Contender:
        """A contender whose calls cost what is listed, the last cost for good."""
        left = list(costs)

        def work() -> None:
            self.ran.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return Contender(name, work)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


def test_speedup_cancels_drift() -> None:
    fast, slow = Timing((1.0, 3.0, 2.0), 1), Timing((2.0, 6.0, 4.0), 1)
    assert speedup(fast, slow) == Ratio(2.0, 2.0, 2.0)
    assert speedup(slow, fast).median == 0.5


def test_speedup_uses_rounds_that_both_ran() -> None:
    assert speedup(Timing((1.0, 1.0, 9.0), 1), Timing((4.0, 4.0), 1)).median == 4.0


def test_geometric_mean() -> None:
    assert geometric_mean([0.5, 2.0]) == pytest.approx(1.0)
    assert geometric_mean([2.0, 8.0]) == pytest.approx(4.0)
    assert math.isnan(geometric_mean([]))


def test_spread_is_relative_interquartile_range() -> None:
    seconds = Timing((1.0, 2.0, 3.0, 4.0), 1)
    assert seconds.median == 2.5
    assert seconds.spread == pytest.approx((3.5 - 1.5) / 2.5)


def test_measures_what_calls_cost(clock: FakeClock) -> None:
    timings = measure([clock.contender("a", 1e-5), clock.contender("b", 2e-3)], Effort(), clock)
    assert timings["a"].median == pytest.approx(1e-5)
    assert timings["b"].median == pytest.approx(2e-3)
    assert list(timings) == ["a", "b"]


def test_calls_fill_a_slice(clock: FakeClock) -> None:
    effort = Effort(slice=0.004)
    contenders = [clock.contender("short", 1e-5), clock.contender("long", 0.1)]
    timings = measure(contenders, effort, clock)
    assert timings["short"].calls == pytest.approx(effort.slice / 1e-5, rel=0.5)
    assert timings["long"].calls == 1


def test_first_call_is_warm_up(clock: FakeClock) -> None:
    timings = measure([clock.contender("a", 0.01, 1e-4)], Effort(), clock)
    assert timings["a"].median == pytest.approx(1e-4)


def test_rounds_interleave_and_rotate(clock: FakeClock) -> None:
    contenders = [clock.contender(name, 0.006) for name in "abc"]
    measure(contenders, Effort(budget=0, slice=0.006, least_rounds=4, most_rounds=4), clock)
    calibration, rounds = clock.ran[:6], clock.ran[6:]
    assert calibration == ["a", "a", "b", "b", "c", "c"]
    assert rounds == list("abcbcacababc")


def test_session_is_entered_and_not_timed(clock: FakeClock) -> None:
    inside = False

    @contextmanager
    def session() -> Iterator[None]:
        nonlocal inside
        clock.now += 5.0
        inside = True
        yield
        inside = False

    def work() -> None:
        assert inside
        clock.now += 0.006

    timings = measure([Contender("a", work, session)], Effort(), clock)
    assert timings["a"].median == pytest.approx(0.006)


def test_straggling_rival_leaves_but_subject_stays(clock: FakeClock) -> None:
    contenders = [
        clock.contender("subject", 0.5),
        clock.contender("best", 0.1),
        clock.contender("straggler", 0.3),
    ]
    timings = measure(contenders, Effort(budget=0, least_rounds=6, most_rounds=6), clock)
    rounds = {name: len(timing.seconds) for name, timing in timings.items()}
    assert rounds == {"subject": 6, "best": 6, "straggler": timing.STRAGGLER_ROUNDS}


def test_every_subject_stays(clock: FakeClock) -> None:
    contenders = [
        clock.contender("first", 0.1),
        replace(clock.contender("second", 0.9), subject=True),
        clock.contender("best", 0.1),
        clock.contender("straggler", 0.3),
    ]
    timings = measure(contenders, Effort(budget=0, least_rounds=6, most_rounds=6), clock)
    rounds = {name: len(timing.seconds) for name, timing in timings.items()}
    assert rounds == {"first": 6, "second": 6, "best": 6, "straggler": timing.STRAGGLER_ROUNDS}
    assert list(timings) == [contender.name for contender in contenders]


def test_disturbed_round_does_not_turn_best_rival_away(clock: FakeClock) -> None:
    contenders = [
        clock.contender("subject", 0.1),
        clock.contender("best", 0.1, 0.9, 0.9, 0.1),
        clock.contender("other", 0.15),
    ]
    timings = measure(contenders, Effort(budget=0, least_rounds=6, most_rounds=6), clock)
    assert len(timings["best"].seconds) == 6


def test_unsettled_case_gets_more_time(clock: FakeClock) -> None:
    effort = Effort(budget=1.0, slice=0.1, least_rounds=5, most_rounds=1000)
    steady = measure([clock.contender("a", 0.1)], effort, clock)["a"]
    restless = measure([clock.contender("a", *(0.1, 0.2) * 500)], effort, clock)["a"]
    assert sum(steady.seconds) == pytest.approx(effort.budget, rel=0.3)
    assert sum(restless.seconds) == pytest.approx(timing.PATIENCE * effort.budget, rel=0.3)


def test_garbage_collection_comes_back_after_an_error() -> None:
    def fail() -> None:
        raise RuntimeError("broken contender")

    with pytest.raises(RuntimeError, match="broken contender"):
        measure([Contender("a", fail)], HASTE)
    assert gc.isenabled()
