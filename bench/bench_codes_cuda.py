"""k-sparse codes on a GPU: decoding, the decoder's gradient, and the selection of an encoder."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from bench_sparse24_cuda import Bench, check
from cuda_cases import run_each, timed
from cuda_record import CudaCase
from cuda_report import group_table
from cuda_rivals import DENSE, Rivals, clones
from cuda_shapes import DTYPES
from cuda_timing import Contender, Rounds, copies_for
from gossamer import _C, topk_decode
from record import OURS
from shapes import CODE_KS, CODE_SHAPES, CODE_TOKENS, CodeShape
from torch import Tensor

BAG, SCATTERED, TOPK = "F.embedding_bag", "dense codes", "torch.topk"
JOBS = ("decode", "weight gradient", "selection")
CHECKED = 64  # tokens, or rows of a gradient

COLUMNS = (
    "job", "tokens", "k", "ours us", "spread", "best rival", "us", "vs rival", "(quartiles)",
    "of limit", "right",
)  # fmt: skip


@dataclass(frozen=True)
class CudaCodeCase(CudaCase):
    """One job with so many codes, ``rows``, of k entries each."""

    job: str = "decode"
    k: int = 0

    @property
    def name(self) -> str:
        return f"codes/{self.dtype}/{self.shape.name}/m{self.rows}/{self.job}/k{self.k}"

    @property
    def params(self) -> dict[str, Any]:
        return super().params | {"job": self.job, "k": self.k}

    def row(self) -> list[str]:
        return [
            *(self.job, str(self.rows), str(self.k)),
            *self.timing_cells(),
            f"{self.limit / self.ours.median:.0%}",
            "yes" if self.check and self.check.passed else "NO",
        ]


@dataclass(frozen=True)
class CudaCodePlan:
    """Which cases to run, and how long; what does not fit into ``most_seconds`` is named."""

    dtypes: Sequence[str]
    shapes: Sequence[CodeShape] = CODE_SHAPES
    tokens: Sequence[int] = CODE_TOKENS
    ks: Sequence[int] = CODE_KS
    jobs: Sequence[str] = JOBS
    rounds: Rounds = field(default_factory=Rounds)
    most_seconds: float = math.inf

    def cases(self) -> Iterator[CudaCodeCase]:
        for dtype in self.dtypes:
            for shape in self.shapes:
                for job in self.jobs:
                    for tokens in self.tokens:
                        for k in self.ks:
                            yield CudaCodeCase(shape, dtype, tokens, 0, job=job, k=k)


# ---- contenders: a call for each copy of what has to come from memory ----------------------------

Calls = dict[str, Callable[[Tensor], Tensor]]


def _decode(values: Tensor, indices: Tensor, scattered: Tensor) -> Calls:
    return {
        OURS: lambda w: topk_decode(values, indices, w),
        BAG: lambda w: F.embedding_bag(indices, w, mode="sum", per_sample_weights=values),
        SCATTERED: lambda w: scattered @ w,
    }


def _weight_gradient(values: Tensor, indices: Tensor, scattered: Tensor) -> Calls:
    """Of the dense product, without the time it takes to scatter the codes."""
    width = scattered.shape[1]
    return {
        OURS: lambda dy: torch.ops.gossamer.topk_weight(values, indices, dy, width),
        SCATTERED: lambda dy: scattered.t() @ dy,
    }


def _selection(k: int) -> Calls:
    def ours(dense: Tensor) -> Tensor:
        values = dense.new_empty(len(dense), k)
        indices = torch.empty(len(dense), k, dtype=torch.int64, device=dense.device)
        if dense.is_cuda:
            _C.topk_select_cuda(values, indices, dense, False)
        else:
            _C.topk_select(values, indices, dense, False, 1)
        return values

    return {OURS: ours, TOPK: lambda dense: dense.topk(k).values}


def run_case(case: CudaCodeCase, rounds: Rounds, bench: Bench) -> CudaCodeCase:
    """Check one case, then time it."""
    assert isinstance(case.shape, CodeShape)
    dtype, tokens, k = DTYPES[case.dtype], case.rows, case.k
    width, d = case.shape.width, case.shape.d
    generator = torch.Generator(bench.device).manual_seed(tokens)

    def drawn(*size: int) -> Tensor:
        numbers = torch.randn(size, generator=generator, device=bench.device)
        return numbers.to(dtype.dtype)

    indices = torch.randint(0, width, (tokens, k), generator=generator, device=bench.device)
    values, size = drawn(tokens, k).abs(), dtype.dtype.itemsize
    codes = tokens * k * (size + 8)
    if case.job == "selection":
        copied, calls = drawn(tokens, width), _selection(k)
        expected = copied[:CHECKED].float().sort(-1, descending=True).values[:, :k]
        flops, nbytes, dense_flops = 0, copied.nbytes + codes, 0
    else:
        scattered = values.new_zeros(tokens, width).scatter_add_(1, indices, values)
        flops, dense_flops = 2 * tokens * k * d, 2 * tokens * width * d
        if case.job == "decode":
            copied, calls = drawn(width, d), _decode(values, indices, scattered)
            rows = copied[indices[:CHECKED]].float()
            expected = torch.einsum("tj,tjd->td", values[:CHECKED].float(), rows)
            nbytes = codes + min(tokens * k, width) * d * size + tokens * d * size
        else:
            copied, calls = drawn(tokens, d), _weight_gradient(values, indices, scattered)
            # In whole: a case has few rows with entries.
            exact = torch.zeros(tokens, CHECKED, dtype=torch.float64, device=bench.device)
            inside = indices < CHECKED
            exact.scatter_add_(1, indices.where(inside, 0), values.double() * inside)
            expected = (exact.t() @ copied.double()).float()
            nbytes = codes + (tokens + width) * d * size
    limit = bench.limits.seconds(case.dtype, 0, nbytes)  # its sums are not the tensor cores'
    dense_bytes = copied.nbytes
    case = dataclasses.replace(
        case, flops=flops, nbytes=nbytes, dense_bytes=dense_bytes, limit=limit,
        dense_limit=bench.limits.seconds(case.dtype, dense_flops, dense_bytes),
    )  # fmt: skip
    rivals, copies = Rivals(), clones(copied, copies_for(nbytes, bench.limits.l2))
    for name, call in calls.items():
        family = "ours" if name == OURS else DENSE
        contender = Contender(name, family, [partial(call, t) for t in copies])
        rivals.attempt(name, lambda contender=contender: contender)
    if OURS in rivals.missing:
        return dataclasses.replace(case, unavailable=rivals.missing[OURS], failed=True)

    def right(answer: Tensor) -> Any:
        return check(answer[: len(expected)], expected, dtype)

    case = dataclasses.replace(case, check=right(rivals.contenders[0].calls[0]()))
    return timed(case, rivals, right, rounds, bench)


def run(
    plan: CudaCodePlan, bench: Bench, clock: Callable[[], float] = perf_counter
) -> Iterator[CudaCodeCase]:
    """All cases of the plan in its order; those after ``most_seconds`` come out as left out."""
    each = partial(run_case, rounds=plan.rounds, bench=bench)
    return run_each(plan.cases(), each, plan.most_seconds, clock)


def code_table(cases: Sequence[CudaCodeCase]) -> str:
    """The cases of one shape and dtype; below, what is missing and why."""
    return group_table(f"codes {cases[0].dtype} {cases[0].shape}", COLUMNS, cases)
