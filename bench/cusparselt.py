"""cuSPARSELt through torch: its default, its own search, and every algorithm it has.

Some of its algorithms give wrong results, so each is checked before it is timed.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from cuda_rivals import CUSPARSELT, WRONG, Operands, Rivals, clones, padded_rows
from cuda_shapes import GpuDtype
from cuda_timing import Call, Contender, Replay, Stopwatch, first_line
from torch import Tensor

LEAST_ROWS = {2: 8, 1: 16, 4: 4}  # of x for cuSPARSELt, by bytes of an element; fewer are padded
BRIEF = 2e-3  # s of a replay: a shorter one is timed thrice in the sweep
MOST_ALGORITHMS = 64  # tried where cuSPARSELt does not say how many it has


@dataclass(frozen=True)
class Algorithm:
    """What cuSPARSELt can be told; torch's own class uses the defaults."""

    alg_id: int = 0
    split_k: int = 1
    split_k_mode: int = -1
    transpose_result: bool = False  # True: rows of x are rows of the result

    def as_dict(self) -> dict[str, object]:
        return {**self.__dict__}


@dataclass(frozen=True)
class CusparseLt:
    """torch's bindings of cuSPARSELt for one case, with x padded to the rows it wants."""

    dtype: GpuDtype
    rows: int
    packed: Sequence[Tensor]
    xs: Sequence[Tensor]

    @classmethod
    def make(cls, o: Operands, copies: int) -> CusparseLt:
        least = LEAST_ROWS[o.x.element_size()]
        bits = o.x.view(torch.uint8) if o.x.dtype is torch.float8_e4m3fn else o.x
        x = padded_rows(bits, least).view(o.x.dtype)
        return cls(
            o.dtype, o.rows, clones(torch._cslt_compress(o.weight), copies), clones(x, copies)
        )

    @property
    def out_dtype(self) -> torch.dtype | None:
        return self.dtype.out if self.dtype.quantised else None

    def calls(self, algorithm: Algorithm) -> list[Call]:
        def product(packed: Tensor, x: Tensor) -> Tensor:
            return torch._cslt_sparse_mm(
                packed, x.t(), out_dtype=self.out_dtype, **algorithm.as_dict()
            )

        return [partial(product, p, x) for p, x in zip(self.packed, self.xs, strict=True)]

    def answer(self, algorithm: Algorithm) -> Callable[[Tensor], Tensor]:
        if algorithm.transpose_result:
            return lambda y: y[: self.rows]
        return lambda y: y.t()[: self.rows]

    def contender(self, name: str, algorithm: Algorithm) -> Contender:
        return Contender(
            name, CUSPARSELT, self.calls(algorithm), self.answer(algorithm),
            settings=algorithm.as_dict(),
        )  # fmt: skip

    def search(self, transposed: bool) -> tuple[Algorithm, int]:
        """cuSPARSELt's own search: its choice, and how many algorithms it has."""
        packed, x = self.packed[0], self.xs[0].t()
        native = getattr(torch._C, "_cusparselt", None)
        if hasattr(native, "mm_search"):  # which also tells the split of K and the last id
            try:
                found = native.mm_search(packed, x, None, None, self.out_dtype, transposed)
                alg_id, split_k, mode, last = (int(value) for value in found)
            except (TypeError, ValueError):
                pass  # another torch's: the public one will do
            else:
                return Algorithm(alg_id, split_k, mode, transposed), last + 1
        alg_id = torch._cslt_sparse_mm_search(
            packed, x, out_dtype=self.out_dtype, transpose_result=transposed
        )
        return Algorithm(int(alg_id), transpose_result=transposed), MOST_ALGORITHMS


@dataclass(frozen=True)
class Trial:
    """One algorithm of the sweep: ``seconds`` if it ran and was right, else why it was not."""

    algorithm: Algorithm
    seconds: float | None
    failure: str | None = None


def summarise(trials: Sequence[Trial]) -> dict[str, object]:
    """What a sweep found: how many were tried, which were wrong or refused, the five fastest."""
    failures = Counter(trial.failure for trial in trials if trial.failure)
    fast = sorted((t for t in trials if t.seconds is not None), key=lambda t: t.seconds or 0.0)
    return {
        "tried": len(trials),
        "failures": dict(failures),
        "wrong": [t.algorithm.as_dict() for t in trials if t.failure == WRONG],
        "fastest": [{**t.algorithm.as_dict(), "us": 1e6 * (t.seconds or 0.0)} for t in fast[:5]],
    }


def sweep(
    library: CusparseLt,
    candidates: Sequence[Algorithm],
    right: Callable[[Tensor], bool],
    stopwatch: Stopwatch,
    repeats: int,
    out_of_time: Callable[[], bool] = lambda: False,
    drop: Callable[[Replay], None] = lambda replay: None,
) -> list[Trial]:
    """Every algorithm checked, then timed briefly: some of cuSPARSELt's give wrong results."""
    trials = []
    for algorithm in candidates:
        if out_of_time():
            break
        contender = library.contender("cuSPARSELt", algorithm)
        try:
            if not right(contender.answer(contender.calls[0]())):
                trials.append(Trial(algorithm, None, WRONG))
                continue
            replay = stopwatch.prepare(contender, repeats)
            seconds = min(stopwatch.seconds([(replay, 1)]))
            if seconds < BRIEF:
                seconds = min(seconds, *stopwatch.seconds([(replay, 1)] * 2))
            seconds /= replay.calls
            drop(replay)
        except Exception as error:
            trials.append(Trial(algorithm, None, first_line(error)))
            continue
        trials.append(Trial(algorithm, seconds))
    return trials


def candidates_of(library: CusparseLt) -> tuple[list[Algorithm], Algorithm, Algorithm | None]:
    """Every algorithm in both orders of the result; torch's default; the search's choice."""
    counts, chosen = [], []
    for transposed in (False, True):
        try:
            algorithm, count = library.search(transposed)
            chosen.append(algorithm)
        except Exception:  # the library finds none for this problem: the ids may still do
            count = MOST_ALGORITHMS
        counts.append(count)
    every = [
        Algorithm(alg_id, transpose_result=transposed)
        for alg_id, transposed in itertools.product(range(max(counts)), (False, True))
    ]
    default = Algorithm()
    found = dict.fromkeys([default, *chosen, *every])
    return list(found), default, chosen[0] if chosen else None


def add_cusparselt(
    rivals: Rivals,
    o: Operands,
    copies: int,
    right: Callable[[Tensor], bool],
    stopwatch: Stopwatch,
    repeats: int,
    every: bool = True,
    **sweep_options: Any,
) -> list[Trial]:
    """cuSPARSELt as torch's class calls it, as its search says, and the best of all algorithms.

    Not ``every``: the best of the first two.
    """
    try:
        library = CusparseLt.make(o, copies)
        candidates, default, chosen = candidates_of(library)
        if not every:
            candidates = [c for c in candidates if c in (default, chosen)]
    except Exception as error:
        rivals.missing["cuSPARSELt"] = first_line(error)
        return []
    trials = sweep(library, candidates, right, stopwatch, repeats, **sweep_options)
    taken = {trial.algorithm: trial.seconds for trial in trials if trial.seconds is not None}
    if not taken:
        failures = "; ".join(sorted({str(trial.failure) for trial in trials}))
        rivals.missing["cuSPARSELt"] = f"{len(trials)} algorithms tried: {failures}"
        return trials
    named = {"cuSPARSELt best": min(taken, key=lambda algorithm: taken[algorithm])}
    if default in taken:
        named["cuSPARSELt default"] = default
    if chosen in taken:
        named["cuSPARSELt search"] = chosen
    for name, algorithm in named.items():
        if name == "cuSPARSELt best" or algorithm != named["cuSPARSELt best"]:
            rivals.attempt(name, partial(library.contender, name, algorithm))
        else:
            rivals.missing[name] = "the same as the best"
    return trials
