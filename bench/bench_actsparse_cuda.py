"""Linear layers whose input is partly zero on a GPU, against cuBLAS and our own without zeros."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from bench_sparse24_cuda import Bench, check
from cuda_cases import run_each, timed
from cuda_machine import GpuLimits
from cuda_record import CudaCase
from cuda_report import group_table
from cuda_rivals import DENSE, Rivals, clones
from cuda_shapes import DTYPES
from cuda_timing import Contender, Rounds, copies_for
from gossamer import _C, actsparse_linear
from record import OURS
from shapes import ACTIVE_ROWS, SPARSITIES, LinearShape
from timing import Ratio, speedup

NOTHING_ZERO, INPUT_MAJOR = "gossamer, nothing zero", "x @ W, W [K, N]"

COLUMNS = (
    "rows", "zeros", "read", "kernel", "ours us", "spread", "best dense", "us", "vs dense",
    "(quartiles)", "vs nothing zero", "ideal", "of DRAM", "right",
)  # fmt: skip


@dataclass(frozen=True)
class CudaActiveCase(CudaCase):
    """A layer at one share of zeros, drawn for each token by itself; ``nbytes`` of rows read."""

    sparsity: float = 0.0
    read: float = 1.0  # share of the weight's rows that some token has active
    chosen: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"actsparse/{self.dtype}/{self.shape.name}/m{self.rows}/{self.sparsity:.0%}"

    @property
    def params(self) -> dict[str, Any]:
        return super().params | {"sparsity": self.sparsity}

    @property
    def against_full(self) -> Ratio | None:
        full = self.timings.get(NOTHING_ZERO)
        return speedup(self.ours, full) if full else None

    def finding(self, limits: GpuLimits) -> dict[str, Any]:
        full = self.against_full
        found = {"read": self.read, "chosen": self.chosen}
        against = {"against_nothing_zero": asdict(full) if full else None}
        return super().finding(limits) | found | against

    def row(self, dram: float) -> list[str]:
        full, chosen = self.against_full, self.chosen
        kernel = f"{chosen['tile_tokens']} / {chosen['split_k']}" if chosen else "torch"
        return [
            str(self.rows),
            f"{self.sparsity:.0%}",
            f"{self.read:.0%}",
            kernel,
            *self.timing_cells(),
            f"{full.median:.2f}x" if full else "-",
            f"{1 / (1 - self.sparsity):.2f}x",
            f"{self.nbytes / self.ours.median / dram:.0%}",
            "yes" if self.check and self.check.passed else "NO",
        ]


@dataclass(frozen=True)
class CudaActivePlan:
    """Which cases to run, and how long; what does not fit into ``most_seconds`` is named."""

    dtypes: Sequence[str]
    shapes: Sequence[LinearShape]
    rows: Sequence[int] = ACTIVE_ROWS
    sparsities: Sequence[float] = SPARSITIES
    rounds: Rounds = field(default_factory=Rounds)
    most_seconds: float = math.inf

    def cases(self) -> Iterator[CudaActiveCase]:
        for dtype in self.dtypes:
            for shape in self.shapes:
                for rows in self.rows:
                    flops = 2 * rows * shape.out_features * shape.in_features
                    for sparsity in self.sparsities:
                        yield CudaActiveCase(shape, dtype, rows, flops, sparsity=sparsity)


def run_case(case: CudaActiveCase, rounds: Rounds, bench: Bench) -> CudaActiveCase:
    """Check one case, then time it."""
    shape, dtype, rows = case.shape, DTYPES[case.dtype], case.rows
    assert isinstance(shape, LinearShape)
    generator = torch.Generator(bench.device).manual_seed(rows)

    def drawn(draw: Callable[..., torch.Tensor], *size: int) -> torch.Tensor:
        return draw(size, generator=generator, device=bench.device)

    scale = math.sqrt(shape.in_features)
    weight = (drawn(torch.randn, shape.out_features, shape.in_features) / scale).to(dtype.dtype)
    full = drawn(torch.randn, rows, shape.in_features).to(dtype.dtype)
    zero = drawn(torch.rand, rows, shape.in_features) < case.sparsity
    x = full.masked_fill(zero, 0)
    read = float((x != 0).any(0).float().mean())
    others = x.nbytes + rows * shape.out_features * x.element_size()
    nbytes, dense_bytes = round(read * weight.nbytes) + others, weight.nbytes + others
    copies = copies_for(weight.nbytes, bench.limits.l2)
    weights = clones(weight, copies)
    rows_of = [w.t().contiguous() for w in weights]
    chosen = {}
    if bench.device.type == "cuda" and rows <= int(_C.actsparse_cuda_rows(rows_of[0])):
        sizes = (rows, shape.out_features, shape.in_features)
        name = str(dtype.dtype).removeprefix("torch.")
        chosen = _C.actsparse_choose_cuda(*sizes, name, True, bench.device.index)
    case = dataclasses.replace(
        case, read=read, nbytes=nbytes, dense_bytes=dense_bytes, chosen=chosen,
        limit=bench.limits.seconds(case.dtype, case.flops, nbytes),
        dense_limit=bench.limits.seconds(case.dtype, case.flops, dense_bytes),
    )  # fmt: skip
    rivals = Rivals()
    ways: dict[str, tuple[str, list[Callable[[], torch.Tensor]]]] = {
        OURS: ("ours", [partial(actsparse_linear, x, w) for w in rows_of]),
        NOTHING_ZERO: ("full", [partial(actsparse_linear, full, w) for w in rows_of]),
        "F.linear": (DENSE, [partial(F.linear, x, w) for w in weights]),
        INPUT_MAJOR: (DENSE, [partial(torch.mm, x, w) for w in rows_of]),
    }
    for name, (family, calls) in ways.items():
        contender = Contender(name, family, calls)
        rivals.attempt(name, lambda contender=contender: contender)
    if OURS in rivals.missing:
        return dataclasses.replace(case, unavailable=rivals.missing[OURS], failed=True)
    expected = F.linear(x.double(), weight.double()).float()
    expected_full = F.linear(full.double(), weight.double()).float()

    def right(answer: torch.Tensor) -> Any:
        """Of either input: which one it was, the nearer shows."""
        return min(
            (check(answer, e, dtype) for e in (expected, expected_full)),
            key=lambda found: found.worst if found.worst == found.worst else math.inf,
        )

    case = dataclasses.replace(case, check=check(actsparse_linear(x, rows_of[0]), expected, dtype))
    return timed(case, rivals, right, rounds, bench)


def run(
    plan: CudaActivePlan, bench: Bench, clock: Callable[[], float] = perf_counter
) -> Iterator[CudaActiveCase]:
    """All cases of the plan in its order; those after ``most_seconds`` come out as left out."""
    each = partial(run_case, rounds=plan.rounds, bench=bench)
    return run_each(plan.cases(), each, plan.most_seconds, clock)


def active_table(cases: Sequence[CudaActiveCase], dram: float) -> str:
    """The cases of one layer and dtype; below, what is missing and why."""
    head = f"zero inputs, {cases[0].dtype} {cases[0].shape}"
    return group_table(head, COLUMNS, cases, lambda case: case.row(dram))
