"""What the benches on a GPU have in common: how a case is timed, and one after the other run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from time import perf_counter
from typing import Any, TypeVar

import torch
from bench_sparse24_cuda import RIVALS_SLACK, Bench
from cuda_record import CudaCase
from cuda_rivals import DENSE, WRONG, Rivals
from cuda_timing import Rounds, first_line, measure, repeats_for
from record import OURS, Check
from torch import Tensor

AnyCase = TypeVar("AnyCase", bound=CudaCase)


def timed(
    case: AnyCase,
    rivals: Rivals,
    right: Callable[[Tensor], Check],
    rounds: Rounds,
    bench: Bench,
    floor: float = 0.0,
) -> AnyCase:
    """The case with the times of all rivals that answer right when replayed.

    No call is expected to take less than ``floor`` seconds: a graph holds calls by that.
    """
    replays: dict[str, Any] = {}
    before = bench.sensors()
    with bench.stopwatch() as stopwatch:
        for contender in rivals.contenders:
            least = max(floor, case.dense_limit if contender.family == DENSE else case.limit)
            try:
                replay = stopwatch.prepare(contender, repeats_for(len(contender.calls), least))
                stopwatch.seconds([(replay, 1)])
                answer = right(contender.answer(replay.last))
            except Exception as error:
                rivals.missing[contender.name] = first_line(error)
                continue
            if contender.name == OURS:  # the call by itself may be right, and its replay not
                case = case if answer.passed else dataclasses.replace(case, check=answer)
            elif not answer.worst <= RIVALS_SLACK:
                rivals.missing[contender.name] = WRONG
                continue
            replays[contender.name] = replay
        if OURS not in replays:
            return dataclasses.replace(case, unavailable=rivals.missing[OURS], failed=True)
        timings = measure(replays, stopwatch, rounds)
    families = {c.name: c.family for c in rivals.contenders}
    return dataclasses.replace(
        case, timings=timings, families={name: families[name] for name in timings},
        not_graphs={name: r.eager for name, r in replays.items() if r.eager},
        missing=rivals.missing, sensors={"before": before, "after": bench.sensors()},
    )  # fmt: skip


def run_each(
    cases: Iterable[AnyCase],
    run_case: Callable[[AnyCase], AnyCase],
    most_seconds: float,
    clock: Callable[[], float] = perf_counter,
) -> Iterator[AnyCase]:
    """All cases in their order; those after ``most_seconds`` come out as left out."""
    begin = clock()
    with torch.no_grad():
        for case in cases:
            if clock() - begin > most_seconds:
                yield dataclasses.replace(case, unavailable="left out: no time")
                continue
            try:
                found = run_case(case)
            except Exception as error:  # so that the record of the others is written
                failed: dict[str, Any] = {"unavailable": first_line(error), "failed": True}
                found = dataclasses.replace(case, **failed)
            yield found
