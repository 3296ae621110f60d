"""GPU time of contenders: CUDA graphs over copies of the operands, replayed in turn.

A graph holds one call for each copy of a contender's weights, x and results, some times over. The
copies together are larger than the L2 cache several times, so every call reads its weights from
memory, as a layer does whose model is larger than the cache. A replay has no Python, no plan and
no launch overhead in it: what is measured is what the GPU does.
"""

from __future__ import annotations

import gc
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from time import perf_counter
from typing import Protocol

import torch
from timing import Timing
from torch import Tensor

Call = Callable[[], Tensor]

CACHES_FULL = 3.0  # times the L2 that the copies take up: its replacement is no strict LRU
MOST_COPIES = 64
SLICE = 400e-6  # s of calls in a graph: beside it the gap between two replays is lost
MOST_CALLS = 96  # in a graph
MOST_REASON = 200  # letters: some of torch's messages list every backend there is


@dataclass(frozen=True)
class Contender:
    """One way to do the job of a case: a call for each copy of its operands.

    ``answer`` turns what a call returns into [M, N]. ``session`` is entered around every call and
    capture: where a way to compute needs a global setting, it goes there.
    """

    name: str
    family: str  # "ours", "dense", "cusparselt", "cutlass" or "csr"
    calls: Sequence[Call]
    answer: Callable[[Tensor], Tensor] = lambda y: y
    session: Callable[[], AbstractContextManager[object]] = nullcontext
    settings: dict[str, object] | None = None


class Replay(Protocol):
    """So many calls of a contender, ready to run again and again."""

    calls: int
    last: Tensor  # the result of the last call
    eager: str | None  # why it is not a graph, if it is not

    def run(self) -> None: ...


class Stopwatch(Protocol):
    """What tells the time: on a GPU ``GraphStopwatch``, in tests something simpler."""

    def prepare(self, contender: Contender, repeats: int) -> Replay:
        """The contender's calls, each ``repeats`` times, ready to be timed."""

    def seconds(self, replays: Sequence[tuple[Replay, int]]) -> list[float]:
        """Run each so many times, one after the other; seconds of a run of each."""


def copies_for(nbytes: int, cache: int) -> int:
    """How many copies of operands of ``nbytes`` it takes that none survives in ``cache``."""
    if nbytes >= CACHES_FULL * cache:
        return 1
    return min(MOST_COPIES, math.floor(CACHES_FULL * cache / nbytes) + 1)


def repeats_for(copies: int, least_seconds: float) -> int:
    """How often a graph goes through its copies, for calls of at least so many seconds."""
    wanted = min(MOST_CALLS, math.ceil(SLICE / least_seconds))
    return max(1, math.ceil(wanted / copies))


# ---- on a GPU ------------------------------------------------------------------------------------


@dataclass
class Graph:
    graph: torch.cuda.CUDAGraph
    calls: int
    last: Tensor
    eager: None = None

    def run(self) -> None:
        self.graph.replay()


@dataclass
class EagerCalls:
    """Where a capture failed: the calls themselves, with all that they do on the host."""

    contender: Contender
    repeats: int
    calls: int
    last: Tensor
    eager: str

    def run(self) -> None:
        with self.contender.session():
            for _ in range(self.repeats):
                for call in self.contender.calls:
                    self.last = call()


class GraphStopwatch:
    """Captures into graphs that share one memory pool, and times them with CUDA events.

    ``close`` gives the pool back; results of one graph may lie where another's did.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: list[torch.cuda.CUDAGraph] = []
        # A pool lives as long as one of its graphs does: this one makes it outlive the others.
        number = torch.zeros(1, device=device).add_(1)  # which loads the kernel: not in a capture
        self._capture(lambda: number.add_(1))

    def _capture(self, body: Callable[[], object]) -> torch.cuda.CUDAGraph:
        # torch.cuda.graph() would also empty the allocator's cache each time, which takes longer
        # than what is captured. "relaxed": libraries may allocate while they plan.
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self.stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="relaxed")
            try:
                body()
            except BaseException:
                with suppress(RuntimeError):  # it would only say that the capture is void
                    graph.capture_end()
                raise
            graph.capture_end()
        self._graphs.append(graph)
        return graph

    def prepare(self, contender: Contender, repeats: int) -> Replay:
        """A graph; where the capture fails, the eager calls with the reason."""
        # As many results are kept as there are copies, so that they lie in as many places.
        results: deque[Tensor] = deque(maxlen=len(contender.calls))

        def body() -> None:
            with contender.session():
                for _ in range(repeats):
                    for call in contender.calls:
                        results.append(call())

        torch.cuda.synchronize(self.device)  # the operands come from another stream
        with torch.cuda.stream(self.stream), contender.session():
            last = contender.calls[0]()  # handles, workspaces and modules are made here
        torch.cuda.synchronize(self.device)
        calls = repeats * len(contender.calls)
        try:
            graph = self._capture(body)
        except RuntimeError as error:
            self.stream = torch.cuda.Stream(self.device)  # the old one may still be capturing
            return EagerCalls(contender, repeats, calls, last, first_line(error))
        return Graph(graph, calls, results[-1])

    def seconds(self, replays: Sequence[tuple[Replay, int]]) -> list[float]:
        marks = []
        with torch.cuda.stream(self.stream):
            for replay, times in replays:
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                # Untimed: while the GPU is busy with it, the host gets ahead with what is timed.
                replay.run()
                begin.record(self.stream)
                for _ in range(times):
                    replay.run()
                end.record(self.stream)
                marks.append((begin, end, times))
        torch.cuda.synchronize(self.device)
        return [1e-3 * begin.elapsed_time(end) / times for begin, end, times in marks]

    def drop(self, replay: Replay) -> None:
        """Free a graph that is not needed any more; its memory stays in the pool."""
        if isinstance(replay, Graph):
            self._graphs.remove(replay.graph)
            replay.graph.reset()

    def close(self) -> None:
        torch.cuda.synchronize(self.device)
        for graph in self._graphs:
            graph.reset()
        self._graphs.clear()
        torch.cuda.empty_cache()


@contextmanager
def graph_stopwatch(device: torch.device) -> Iterator[GraphStopwatch]:
    stopwatch = GraphStopwatch(device)
    try:
        yield stopwatch
    finally:
        stopwatch.close()


# ---- rounds --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rounds:
    """How long to measure: so many rounds, more while they fit into ``budget`` seconds."""

    budget: float = 0.5
    least: int = 9
    most: int = 31
    slice: float = SLICE  # of one contender in one round, unless a single replay takes longer


def measure(
    replays: dict[str, Replay],
    stopwatch: Stopwatch,
    rounds: Rounds,
    clock: Callable[[], float] = perf_counter,
) -> dict[str, Timing]:
    """Seconds a call of each, in rounds in which each runs in turn, another one first each time.

    Entry r of each timing is from round r, so that ``timing.speedup`` compares them round by round.
    """
    names = list(replays)
    first = stopwatch.seconds([(replays[name], 1) for name in names])
    times = {
        name: max(1, math.ceil(rounds.slice / max(seconds, 1e-9)))
        for name, seconds in zip(names, first, strict=True)
    }
    found: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.disable()
    try:
        start = clock()
        for index in range(rounds.most):
            if index >= rounds.least and clock() - start > rounds.budget:
                break
            at = index % len(names)
            order = names[at:] + names[:at]
            taken = stopwatch.seconds([(replays[name], times[name]) for name in order])
            for name, seconds in zip(order, taken, strict=True):
                found[name].append(seconds / replays[name].calls)
    finally:
        if collecting:
            gc.enable()
    return {
        name: Timing(tuple(seconds), times[name] * replays[name].calls)
        for name, seconds in found.items()
    }


def eager_seconds(
    call: Call,
    synchronise: Callable[[], None],
    calls: int = 200,
    rounds: int = 5,
    clock: Callable[[], float] = perf_counter,
) -> float:
    """Seconds a call takes on the host, launches and Python included, GPU work overlapped.

    The least over the rounds: the host's other work only ever adds.
    """
    least = math.inf
    for _ in range(3):
        call()
    for _ in range(rounds):
        synchronise()
        start = clock()
        for _ in range(calls):
            call()
        synchronise()
        least = min(least, (clock() - start) / calls)
    return least


def first_line(error: BaseException) -> str:
    """An error for the record: its type and the first line of its text."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:MOST_REASON]
