"""Experts on a GPU: a layer, and a step of training, against a loop of dense layers and grouped_mm.

The loop knows the tokens of each expert beforehand, which a mixture would have to wait for.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from bench_grouped import GROUPED_MM, LOADS, LOOP, draw_counts
from bench_sparse24_cuda import Bench, check
from cuda_cases import run_each, timed
from cuda_record import CudaCase
from cuda_report import group_table
from cuda_rivals import DENSE, Rivals, clones
from cuda_shapes import DTYPES
from cuda_timing import Contender, Rounds, copies_for
from gossamer import grouped_linear
from gossamer.ops import grouped_cuda
from record import OURS
from shapes import ExpertShape
from torch import Tensor

OUR_KERNEL = f"{OURS}, its own kernel"  # where grouped_choice may take torch's
JOBS = ("forward", "forward+backward")

COLUMNS = (
    "job", "load", "tokens each", "kernel", "ours us", "spread", "own kernel us", "best rival",
    "us", "vs rival", "(quartiles)", "TFLOP/s", "of limit", "right",
)  # fmt: skip


@dataclass(frozen=True)
class CudaGroupedCase(CudaCase):
    """A layer under one load; ``rows`` are its tokens altogether."""

    load: str = "even"
    job: str = "forward"
    tokens: int = 0  # an expert, on average
    active: int = 0  # experts that have a token
    kernel: str = ""

    @property
    def name(self) -> str:
        return f"grouped/{self.dtype}/{self.shape.name}/m{self.rows}/{self.load}/{self.job}"

    @property
    def params(self) -> dict[str, Any]:
        load = {"load": self.load, "tokens": self.tokens, "active": self.active}
        return super().params | load | {"job": self.job, "kernel": self.kernel}

    def row(self) -> list[str]:
        own, cells = self.timings.get(OUR_KERNEL), self.timing_cells()
        return [
            *(self.job, self.load, str(self.tokens), self.kernel),
            *cells[:2],
            f"{1e6 * own.median:.1f}" if own else "-",
            *cells[2:],
            f"{self.flops / self.ours.median / 1e12:.1f}",
            f"{self.limit / self.ours.median:.0%}",
            "yes" if self.check and self.check.passed else "NO",
        ]


@dataclass(frozen=True)
class CudaGroupedPlan:
    """Which cases to run, and how long; what does not fit into ``most_seconds`` is named."""

    shapes: Sequence[ExpertShape]
    tokens: Sequence[int]  # an expert, on average
    dtypes: Sequence[str]
    loads: Sequence[str] = LOADS
    jobs: Sequence[str] = JOBS
    rounds: Rounds = field(default_factory=Rounds)
    most_seconds: float = math.inf

    def cases(self) -> Iterator[CudaGroupedCase]:
        for dtype, shape in product(self.dtypes, self.shapes):
            for job, load, tokens in product(self.jobs, self.loads, self.tokens):
                rows = shape.experts * tokens
                yield CudaGroupedCase(shape, dtype, rows, 0, load=load, job=job, tokens=tokens)


# ---- contenders ---------------------------------------------------------------------------------


@contextmanager
def _own_kernel() -> Iterator[None]:
    before, grouped_cuda._kernel = grouped_cuda._kernel, lambda *of: "own"
    try:
        yield
    finally:
        grouped_cuda._kernel = before


def _loop(x: Tensor, weights: Tensor, counts: Sequence[int]) -> Tensor:
    groups = zip(x.split(counts), weights, strict=True)
    return torch.cat([F.linear(group, weight) for group, weight in groups if len(group)])


def _kernel(x: Tensor, weights: Tensor) -> str:
    if not x.is_cuda:
        return "-"
    shape = tuple(weights.shape)
    chosen = grouped_cuda.grouped_choice("linear", len(x), shape, x.dtype, x.get_device())
    tile = f" {chosen['tile_rows']}x{chosen['tile_columns']}" if "tile_rows" in chosen else ""
    return f"{chosen['kernel']}{tile}"


def run_case(case: CudaGroupedCase, rounds: Rounds, bench: Bench) -> CudaGroupedCase:
    """Check one case, then time it."""
    shape, dtype = case.shape, DTYPES[case.dtype]
    assert isinstance(shape, ExpertShape)
    counts = draw_counts(shape.experts, case.tokens, case.load)
    each, ends = counts.tolist(), counts.cumsum(0).to(bench.device)
    generator = torch.Generator(bench.device).manual_seed(case.tokens)

    def drawn(*size: int) -> Tensor:
        numbers = torch.randn(size, generator=generator, device=bench.device)
        return (numbers / size[-1] ** 0.5).to(dtype.dtype)

    n, k = shape.out_features, shape.in_features
    x, dy, weights = drawn(case.rows, k), drawn(case.rows, n), drawn(shape.experts, n, k)
    training = case.job != "forward"
    products, active = (3 if training else 1), int((counts > 0).sum())
    flops = products * 2 * case.rows * n * k
    nbytes = products * (active * weights[0].nbytes + x.nbytes + dy.nbytes)
    limit = bench.limits.seconds(case.dtype, flops, nbytes)
    case = dataclasses.replace(
        case, active=active, flops=flops, nbytes=nbytes, dense_bytes=nbytes, limit=limit,
        dense_limit=limit, kernel=_kernel(x, weights),
    )  # fmt: skip
    groups = zip(x.split(each), dy.split(each), weights, strict=True)
    if training:
        expected = torch.cat([b.float().t() @ a.float() for a, b, _ in groups])
    else:
        expected = torch.cat([a.float() @ w.float().t() for a, _, w in groups])

    def call(way: Callable[[Tensor, Tensor], Tensor], w: Tensor) -> Tensor:
        if not training:
            return way(x, w)
        leaves = x.detach().requires_grad_(), w.detach().requires_grad_()
        with torch.enable_grad():
            return torch.autograd.grad(way(*leaves), leaves, dy)[1].flatten(0, 1)

    int32 = ends.int()
    ways: dict[str, tuple[str, Callable[[Tensor, Tensor], Tensor]]] = {
        OURS: ("ours", lambda x, w: grouped_linear(x, w, ends)),
        OUR_KERNEL: ("ours", lambda x, w: grouped_linear(x, w, ends)),
        LOOP: (DENSE, lambda x, w: _loop(x, w, each)),
        GROUPED_MM: (DENSE, lambda x, w: F.grouped_mm(x, w.mT, offs=int32)),
    }
    rivals, copies = Rivals(), clones(weights, copies_for(nbytes, bench.limits.l2))
    for name, (family, way) in ways.items():
        calls = [partial(call, way, w) for w in copies]
        session: dict[str, Any] = {"session": _own_kernel} if name == OUR_KERNEL else {}
        contender = Contender(name, family, calls, **session)
        rivals.attempt(name, lambda contender=contender: contender)
    answer = rivals.contenders[0].calls[0]()
    case = dataclasses.replace(case, check=check(answer, expected, dtype))
    return timed(case, rivals, lambda answer: check(answer, expected, dtype), rounds, bench)


def run(
    plan: CudaGroupedPlan, bench: Bench, clock: Callable[[], float] = perf_counter
) -> Iterator[CudaGroupedCase]:
    """All cases of the plan in its order; those after ``most_seconds`` come out as left out."""
    each = partial(run_case, rounds=plan.rounds, bench=bench)
    return run_each(plan.cases(), each, plan.most_seconds, clock)


def grouped_table(cases: Sequence[CudaGroupedCase]) -> str:
    """The cases of one shape and dtype; below, what is missing and why."""
    return group_table(f"experts {cases[0].dtype} {cases[0].shape}", COLUMNS, cases)
