"""What a 2:4 layer has to beat on a GPU: cuBLAS, cuSPARSELt, torch's CUTLASS kernels, cuSPARSE.

A rival that cannot run is not left out in silence: what it said is part of the record.
"""

from __future__ import annotations

import itertools
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from cuda_shapes import GpuDtype
from cuda_timing import Call, Contender, Replay, Stopwatch, first_line
from torch import Tensor

DENSE = "dense"
CUSPARSELT = "cusparselt"
DEFAULT = "F.linear"
WRONG = "wrong result"
LEAST_ROWS = {2: 8, 1: 16, 4: 4}  # of x for cuSPARSELt, by bytes of an element; fewer are padded
INT_MM_ROWS = 32  # torch._int_mm wants more than 16
BRIEF = 2e-3  # s of a replay: a shorter one is timed thrice in the sweep
MOST_ALGORITHMS = 64  # tried where cuSPARSELt does not say how many it has


@dataclass(frozen=True)
class Operands:
    """The operands of a case; weights and x come in as many copies as their contender needs."""

    dtype: GpuDtype
    weight: Tensor  # [N, K], 2:4, with its zeros
    x: Tensor  # [M, K]

    @property
    def rows(self) -> int:
        return self.x.shape[0]


@dataclass
class Rivals:
    """Contenders for a case, and the reasons of those that are missing."""

    contenders: list[Contender] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)

    def attempt(self, name: str, make: Callable[[], Contender]) -> Contender | None:
        """Make a contender and let it compute once; if that fails, keep what it said."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # prototypes and betas say so
                contender = make()
                with contender.session():
                    contender.calls[0]()
        except Exception as error:  # whatever a library raises, it is not there for this case
            self.missing[name] = first_line(error)
            return None
        self.contenders.append(contender)
        return contender


def clones(tensor: Tensor, count: int) -> list[Tensor]:
    return [tensor, *(tensor.clone() for _ in range(1, count))]


def padded_rows(x: Tensor, least: int) -> Tensor:
    """x with zero rows up to a multiple of ``least``: done before the clock starts."""
    return F.pad(x, (0, 0, 0, -x.shape[0] % least))


@contextmanager
def blas_library(name: str) -> Iterator[None]:
    before = torch.backends.cuda.preferred_blas_library()
    torch.backends.cuda.preferred_blas_library(name)
    try:
        yield
    finally:
        torch.backends.cuda.preferred_blas_library(before)


# ---- dense ---------------------------------------------------------------------------------------


def add_dense(rivals: Rivals, o: Operands, copies: int) -> None:
    """Every dense way torch has: cuBLAS and cuBLASLt, for 8-bit types with scales of one."""
    kind = o.dtype.dtype
    if kind is torch.int8:
        _add_int8(rivals, o, copies)
    elif o.dtype.quantised:
        _add_float8(rivals, o, copies)
    else:
        xs, weights = clones(o.x, copies), clones(o.weight, copies)
        calls = [partial(F.linear, x, w) for x, w in zip(xs, weights, strict=True)]
        rivals.attempt(DEFAULT, lambda: Contender(DEFAULT, DENSE, calls))
        if o.x.is_cuda:
            library = partial(blas_library, "cublaslt")
            rivals.attempt("cuBLASLt", lambda: Contender("cuBLASLt", DENSE, calls, session=library))


def _add_float8(rivals: Rivals, o: Operands, copies: int) -> None:
    one = torch.ones((), device=o.x.device)
    weights = [w.t() for w in clones(o.weight, copies)]

    def product(x: Tensor, w: Tensor, fast: bool) -> Tensor:
        return torch._scaled_mm(
            x, w, scale_a=one, scale_b=one, out_dtype=o.dtype.out, use_fast_accum=fast
        )

    ways = [("_scaled_mm", o.x, True), ("_scaled_mm, exact sums", o.x, False)]
    if o.rows % 16:
        padded = padded_rows(o.x.view(torch.uint8), 16).view(o.x.dtype)
        ways.append(("_scaled_mm, 16 rows", padded, True))
    for name, x, fast in ways:
        xs = clones(x, copies)
        calls = [partial(product, x, w, fast) for x, w in zip(xs, weights, strict=True)]
        contender = Contender(name, DENSE, calls, lambda y: y[: o.rows])
        rivals.attempt(name, lambda contender=contender: contender)


def _add_int8(rivals: Rivals, o: Operands, copies: int) -> None:
    """Without the step from int32 sums to the layer's dtype, which would cost it more."""
    least = INT_MM_ROWS if o.rows < INT_MM_ROWS else 8
    xs, weights = clones(padded_rows(o.x, least), copies), clones(o.weight, copies)
    calls = [partial(torch._int_mm, x, w.t()) for x, w in zip(xs, weights, strict=True)]
    contender = Contender("_int_mm", DENSE, calls, lambda y: y[: o.rows])
    rivals.attempt("_int_mm", lambda: contender)


# ---- cuSPARSELt ----------------------------------------------------------------------------------


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
    **sweep_options: Any,
) -> list[Trial]:
    """cuSPARSELt as torch's class calls it, as its search says, and the best of all algorithms."""
    try:
        library = CusparseLt.make(o, copies)
        candidates, default, chosen = candidates_of(library)
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


# ---- others --------------------------------------------------------------------------------------


def add_cutlass(rivals: Rivals, o: Operands, copies: int, known: dict[GpuDtype, str]) -> None:
    """torch's CUTLASS kernels; ``known`` keeps the reason where they do not run at all."""
    name = "torch CUTLASS"

    def make(weight: Tensor, x: Tensor, count: int) -> Contender:
        sparse = torch.sparse.SparseSemiStructuredTensorCUTLASS.from_dense(weight)
        packed, meta = clones(sparse.packed, count), clones(sparse.meta, count)
        calls = [
            partial(torch._sparse_semi_structured_linear, x, p, m)
            for x, p, m in zip(clones(x, count), packed, meta, strict=True)
        ]
        return Contender(name, "cutlass", calls)

    if o.dtype not in known:
        # A small product first: to convert a large weight for kernels that refuse it takes long.
        trial = Rivals()
        weight = torch.tensor([1, 0, 0, 1], device=o.x.device).repeat(128, 32).to(o.dtype.dtype)
        trial.attempt(name, lambda: make(weight, weight, 1))
        known[o.dtype] = trial.missing.get(name, "")
    if known[o.dtype]:
        rivals.missing[name] = known[o.dtype]
    else:
        rivals.attempt(name, lambda: make(o.weight, o.x, copies))


def add_csr(rivals: Rivals, o: Operands, copies: int) -> None:
    """cuSPARSE's CSR product through CuPy, in float32: it has no 16-bit sparse matrices."""
    name = "cuSPARSE CSR float32"

    def make() -> Contender:
        from cupy_csr import CsrLinear, columns_of

        calls = []
        for _ in range(copies):
            csr = CsrLinear(o.weight)
            x = o.x.float()
            y = x.new_empty(o.rows, o.weight.shape[0])
            calls.append(partial(_csr_call, csr.product, columns_of(x), columns_of(y), y))
        return Contender(name, "csr", calls)

    rivals.attempt(name, make)


def _csr_call(product: Callable[[Any, Any], None], x: Any, y: Any, result: Tensor) -> Tensor:
    product(x, y)
    return result
