"""2:4 sparse linear layers on a GPU against cuBLAS, cuSPARSELt and others, on models' layers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter
from typing import Any

import gossamer
import torch
from bench_sparse24 import check_answer
from cuda_machine import GpuLimits
from cuda_record import CudaCase
from cuda_rivals import (
    DEFAULT,
    DENSE,
    WRONG,
    Operands,
    Rivals,
    add_csr,
    add_cutlass,
    add_dense,
    clones,
)
from cuda_shapes import DTYPES, GpuDtype
from cuda_timing import (
    Contender,
    Rounds,
    Stopwatch,
    copies_for,
    eager_seconds,
    first_line,
    measure,
    repeats_for,
)
from cusparselt import add_cusparselt
from gossamer.formats import (
    Sparse24,
    Sparse24Panels,
    Sparse24Quantized,
    Sparse24QuantizedPanels,
)
from record import OURS, Check
from shapes import LinearShape
from torch import Tensor

EAGER_ROWS = 16  # up to here the time to launch a layer shows beside the time to run it
RIVALS_SLACK = 8.0  # a rival may err so much more than we may: it is a wrong kernel that must show
SAMPLED_ROWS = 256
CHUNK = 2**27  # numbers of an answer that are compared at once
GROUP = 128  # columns of an int4 weight that share a scale
RAW_MOST = {torch.int8: 127, torch.float8_e4m3fn: 448}


@dataclass(frozen=True)
class CudaPlan:
    """Which cases to run, and how long; what does not fit into ``most_seconds`` is named."""

    cases: Sequence[tuple[str, LinearShape, int]]  # dtype, shape and rows
    rounds: Rounds = field(default_factory=Rounds)
    sweep_seconds: float = 10.0  # of a case, for cuSPARSELt's algorithms
    csr_rows: int = 16  # with more, CSR takes longer than all the others together
    most_seconds: float = math.inf

    def __len__(self) -> int:
        return len(self.cases)


@dataclass(frozen=True)
class Bench:
    """Where cases run and what measures them; tests put a CPU and a stopwatch of theirs here."""

    device: torch.device
    limits: GpuLimits
    stopwatch: Callable[[], AbstractContextManager[Any]]
    sensors: Callable[[], dict[str, float]] = dict
    synchronise: Callable[[], None] = lambda: None


@dataclass
class Ours:
    """What gossamer computes a case with: weights packed once, and a call on them."""

    stored: Any
    dtype: GpuDtype

    @property
    def nbytes(self) -> int:
        return int(self.stored.nbytes)

    def contender(self, x: Tensor, copies: int) -> Contender:
        stored = [self.stored, *(cloned(self.stored) for _ in range(1, copies))]
        if self.dtype.weights:
            linear = gossamer.sparse24_linear_quantized
        elif self.dtype.quantised:
            ones = torch.ones(x.shape[0], device=x.device)
            linear = partial(
                gossamer.sparse24_linear_quantized, x_scale=ones, out_dtype=self.dtype.out
            )
        else:
            linear = gossamer.sparse24_linear
        calls = [partial(linear, x, s) for x, s in zip(clones(x, copies), stored, strict=True)]
        return Contender(OURS, "ours", calls)


def cloned(weight: Any) -> Any:
    """A weight of one of gossamer's formats on memory of its own."""
    tensors = {
        f.name: getattr(weight, f.name).clone()
        for f in dataclasses.fields(weight)
        if isinstance(getattr(weight, f.name), Tensor)
    }
    return dataclasses.replace(weight, **tensors)


def pack(weight: Tensor, dtype: GpuDtype) -> Ours:
    """The weight as gossamer's kernels read it; NotImplementedError where there is none."""
    if dtype.weights:
        return Ours(as_read(quantised(weight, dtype.weights)), dtype)
    if not dtype.quantised:
        return Ours(Sparse24Panels.from_sparse24(Sparse24.from_dense(weight)), dtype)
    sparse = Sparse24.from_dense(weight.float())
    name = str(dtype.dtype).removeprefix("torch.")
    return Ours(as_read(Sparse24Quantized.from_sparse24(sparse, name)), dtype)


def as_read(weight: Sparse24Quantized) -> Sparse24Quantized | Sparse24QuantizedPanels:
    """As a GPU's kernels read it; a CPU, on which the tests run this, has no such panels."""
    on_gpu = weight.values.is_cuda
    return Sparse24QuantizedPanels.from_quantized(weight) if on_gpu else weight


def quantised(weight: Tensor, name: str) -> Sparse24Quantized:
    """Scales are powers of two, so that every weight is a bfloat16 as well."""
    found = Sparse24Quantized.from_sparse24(Sparse24.from_dense(weight), name, group=GROUP)
    return dataclasses.replace(found, scales=torch.exp2(found.scales.log2().ceil()))


@dataclass
class Weight:
    """A layer's weight, 2:4, in every form that is measured."""

    shape: LinearShape
    dtype: GpuDtype
    device: torch.device
    dense: Tensor = field(init=False)
    ours: Ours | None = field(init=False, default=None)
    reason: str = field(init=False, default="")  # why there is no `ours`
    failed: bool = field(init=False, default=False)  # and it is not for want of a kernel

    def __post_init__(self) -> None:
        size = (self.shape.out_features, self.shape.in_features)
        self.dense = raw_numbers(size, self.dtype, self.device, seed=0, pruned=True)
        if self.dtype.weights:  # dense layers get the numbers that are left
            self.dense = quantised(self.dense, self.dtype.weights).to_dense(self.dtype.dtype)
        try:
            self.ours = pack(self.dense, self.dtype)
        except Exception as error:
            self.reason = first_line(error)
            self.failed = not isinstance(error, NotImplementedError)


def raw_numbers(
    size: tuple[int, int], dtype: GpuDtype, device: torch.device, seed: int, pruned: bool = False
) -> Tensor:
    """Normal random numbers in the dtype; of 8-bit ones, each row reaches the largest there is.

    To quantise such a row again gives the same numbers and a scale of one, so that layers which
    quantise and products which do not compute the same.
    """
    generator = torch.Generator(device).manual_seed(seed)
    numbers = torch.randn(size, generator=generator, device=device)
    if (most := RAW_MOST.get(dtype.dtype)) is not None:
        numbers = (numbers * (most / 4)).clamp(-most, most)
        numbers[:, 0] = most
        numbers = numbers.round() if dtype.dtype is torch.int8 else numbers
    elif pruned:
        numbers /= math.sqrt(size[1])
    return (gossamer.prune.magnitude_24(numbers) if pruned else numbers).to(dtype.dtype)


def reference(x: Tensor, weight: Tensor) -> Tensor:
    """x Wᵀ by float64 sums, kept in float32: [M, N]."""
    return (x.double() @ weight.double().t()).float()


def check(answer: Tensor, expected: Tensor, dtype: GpuDtype) -> Check:
    """``check_answer``, a part of the rows at a time: it needs several numbers for each."""
    if answer.shape != expected.shape:
        return Check(max_error=math.inf, worst=math.inf)
    rows = max(1, CHUNK // expected.shape[1])
    found = [
        check_answer(a, e, dtype.tolerance)
        for a, e in zip(answer.split(rows), expected.split(rows), strict=True)
    ]
    worst = [c.worst for c in found]
    return Check(
        max_error=max(c.max_error for c in found),
        worst=math.nan if any(math.isnan(w) for w in worst) else max(worst),
    )


def run_case(weight: Weight, rows: int, plan: CudaPlan, bench: Bench, known: dict) -> CudaCase:
    """Check one case, then time it."""
    shape, dtype = weight.shape, weight.dtype
    x = raw_numbers((rows, shape.in_features), dtype, bench.device, seed=1 + rows)
    expected = reference(x, weight.dense)
    operands = Operands(dtype, weight.dense, x)
    activations = x.nbytes + rows * shape.out_features * dtype.out.itemsize
    flops = 2 * rows * shape.out_features * shape.in_features
    dense_bytes = weight.dense.nbytes + activations
    case = CudaCase(
        shape, dtype.name, rows, flops, dense_bytes=dense_bytes,
        dense_limit=bench.limits.seconds(dtype.name, flops, dense_bytes),
    )  # fmt: skip
    if weight.ours is None:
        return dataclasses.replace(case, unavailable=weight.reason, failed=weight.failed)
    nbytes = weight.ours.nbytes + activations
    case = dataclasses.replace(
        case, nbytes=nbytes, limit=bench.limits.seconds(dtype.name, flops, nbytes, sparse=True)
    )

    def copies(size: int) -> int:
        return copies_for(size, bench.limits.l2)

    rivals = Rivals()
    ours = rivals.attempt(OURS, lambda: weight.ours.contender(x, copies(nbytes)))
    if ours is None:
        reason = rivals.missing[OURS]
        missing = reason.startswith("NotImplementedError")
        return dataclasses.replace(case, unavailable=reason, failed=not missing)
    case = dataclasses.replace(case, check=check(ours.calls[0](), expected, dtype))

    def right(answer: Tensor) -> bool:
        return check(answer, expected, dtype).worst <= RIVALS_SLACK

    # The sweep looks at some rows of each answer; who is timed in the end is checked in full.
    step = max(1, rows // SAMPLED_ROWS)

    def right_in_part(answer: Tensor) -> bool:
        return check(answer[::step], expected[::step], dtype).worst <= RIVALS_SLACK

    add_dense(rivals, operands, copies(dense_bytes))
    add_cutlass(rivals, operands, copies(nbytes), known)
    if rows <= plan.csr_rows and dtype.name == "bf16":
        add_csr(rivals, operands, copies(3 * dense_bytes))
    before = bench.sensors()
    with bench.stopwatch() as stopwatch:
        begin = perf_counter()
        trials = add_cusparselt(
            rivals, operands, copies(nbytes), right_in_part, stopwatch, 1,
            out_of_time=lambda: perf_counter() - begin > plan.sweep_seconds,
            drop=getattr(stopwatch, "drop", lambda replay: None),
        )  # fmt: skip
        case = _timed(case, rivals, stopwatch, plan, right)
    eager = {}
    if rows <= EAGER_ROWS:
        names = [c.name for c in rivals.contenders]
        library = "default" if "cuSPARSELt default" in names else "best"
        wanted = (OURS, _default(names), f"cuSPARSELt {library}")
        eager = {
            c.name: eager_seconds(c.calls[0], bench.synchronise)
            for c in rivals.contenders
            if c.name in wanted
        }
    return dataclasses.replace(
        case, missing=rivals.missing, trials=tuple(trials), eager=eager,
        sensors={"before": before, "after": bench.sensors()},
    )  # fmt: skip


def _default(names: Sequence[str]) -> str:
    """The dense product that a user of torch would call."""
    return next((name for name in (DEFAULT, "_scaled_mm", "_int_mm") if name in names), "")


def _timed(
    case: CudaCase,
    rivals: Rivals,
    stopwatch: Stopwatch,
    plan: CudaPlan,
    right: Callable[[Tensor], bool],
) -> CudaCase:
    """Every contender prepared, its replay checked, then all timed together."""
    replays = {}
    for contender in list(rivals.contenders):
        least = case.limit if contender.family != DENSE else case.dense_limit
        try:
            replay = stopwatch.prepare(contender, repeats_for(len(contender.calls), least))
            stopwatch.seconds([(replay, 1)])
            answer_is_right = right(contender.answer(replay.last))
        except Exception as error:
            rivals.missing[contender.name] = first_line(error)
            continue
        if contender.name == OURS and not answer_is_right:
            # The call by itself was right: the replay computes something else.
            case = dataclasses.replace(case, check=Check(math.inf, math.inf))
        elif not answer_is_right:
            rivals.missing[contender.name] = WRONG
            continue
        replays[contender.name] = replay
    if OURS not in replays:
        return dataclasses.replace(case, unavailable=rivals.missing[OURS], failed=True)
    timings = measure(replays, stopwatch, plan.rounds)
    families = {c.name: c.family for c in rivals.contenders}
    settings = {c.name: c.settings for c in rivals.contenders if c.settings and c.name in timings}
    return dataclasses.replace(
        case,
        timings=timings,
        families={name: families[name] for name in timings},
        not_graphs={name: r.eager for name, r in replays.items() if r.eager},
        settings=settings,
    )


def run(
    plan: CudaPlan, bench: Bench, clock: Callable[[], float] = perf_counter
) -> Iterator[CudaCase]:
    """All cases of the plan in its order, a weight made once for consecutive cases.

    Cases after ``most_seconds`` come out as left out, not at all measured; so do those after a
    kernel, anybody's, that took CUDA's context with it: nothing runs in this process any more.
    """
    begin = clock()
    lost = ""
    weight: Weight | None = None
    known: dict[GpuDtype, str] = {}
    with torch.no_grad():
        for name, shape, rows in plan.cases:
            if lost or clock() - begin > plan.most_seconds:
                yield CudaCase(shape, name, rows, 0, unavailable=lost or "left out: no time")
                continue
            dtype = DTYPES[name]
            try:
                if weight is None or (weight.shape, weight.dtype) != (shape, dtype):
                    weight = None  # frees the one before
                    weight = Weight(shape, dtype, bench.device)
                case = run_case(weight, rows, plan, bench, known)
            except Exception as error:  # so that the record of the others is written
                case = CudaCase(shape, name, rows, 0, unavailable=first_line(error), failed=True)
                try:
                    bench.synchronise()
                except Exception:
                    lost = f"left out: CUDA's context was lost in {case.name}"
            yield case
