"""Unstructured sparse layers against every dense way torch has, and its own sparse product."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from bench_sparse24 import check_answer
from gossamer import _C, csr_linear
from gossamer.formats import SparseCsr
from gossamer.prune import magnitude_unstructured
from machine import Limits
from record import OURS, Case
from rivals import dense_linears, sparse_csr
from shapes import DTYPES, TOLERANCES, LinearShape
from timing import Contender, Effort, measure
from torch import Tensor

DENSITIES = (0.5, 0.2, 0.1, 0.05, 0.01)
ROWS, QUICK_ROWS = (1, 16, 128, 512), (1, 128)
LAYERS, QUICK_LAYERS = ("bert.up", "llama.attention", "llama.down"), ("llama.attention",)


@dataclass(frozen=True)
class CsrCase(Case):
    """A layer at one density."""

    density: float

    @property
    def name(self) -> str:
        return f"{super().name}/d{self.density:g}"

    @property
    def place(self) -> str:
        return f"{super().place}, {self.rows} rows"

    @property
    def point(self) -> tuple[str, str]:
        return f"{self.density:.0%}", "density"

    @property
    def params(self) -> dict[str, Any]:
        return super().params | {"density": self.density}


@dataclass(frozen=True)
class CsrPlan:
    """Which cases to run, and how."""

    shapes: Sequence[LinearShape]
    rows: Sequence[int]
    dtypes: Sequence[str]
    effort: Effort
    densities: Sequence[float] = DENSITIES
    most_csr_rows: int | None = None  # of torch's sparse product

    def __len__(self) -> int:
        sizes = (self.shapes, self.rows, self.dtypes, self.densities)
        return math.prod(len(size) for size in sizes)


def run_case(
    shape: LinearShape, dense: Tensor, rows: int, density: float, plan: CsrPlan, limits: Limits
) -> CsrCase:
    """Check one case, then time it."""
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, shape.in_features, generator=generator).to(dense.dtype)
    pruned = magnitude_unstructured(dense, density)
    weight = SparseCsr.from_dense(pruned)
    ours = Contender(OURS, partial(csr_linear, x, weight))
    expected = F.linear(x.float(), pruned.float())
    check = check_answer(ours.run(), expected, TOLERANCES[x.dtype])
    rivals = dense_linears([pruned], x)
    contenders = [ours, *rivals]
    few = plan.most_csr_rows is None or rows <= plan.most_csr_rows
    if few and x.dtype is torch.float32:
        contenders.append(sparse_csr([pruned], x))
    timings = measure(contenders, plan.effort)
    dtype = str(x.dtype).removeprefix("torch.")
    flops = 2 * rows * shape.out_features * shape.in_features
    real_flops = 2 * rows * weight.values.shape[0]
    activations = x.nbytes + rows * shape.out_features * x.itemsize
    nbytes = weight.nbytes + activations
    choice = _C.csr_choose(rows, dtype)
    return CsrCase(
        feature="csr",
        shape=shape,
        dtype=dtype,
        rows=rows,
        kernel=f"{choice['target']}/{choice['kernel']}",
        check=check,
        timings=timings,
        best_dense=min((c.name for c in rivals), key=lambda name: timings[name].median),
        dense_flops=flops,
        real_flops=real_flops,
        nbytes=nbytes,
        peak_flops=limits.flops[dtype],
        limit_seconds=limits.seconds(dtype, real_flops, nbytes),
        dense_limit_seconds=limits.seconds(dtype, flops, dense.nbytes + activations),
        density=density,
    )


def run(plan: CsrPlan, limits: Limits) -> Iterator[CsrCase]:
    """All cases of the plan, those of one shape and number of rows together."""
    with torch.no_grad():
        for dtype, shape in itertools.product(plan.dtypes, plan.shapes):
            generator = torch.Generator().manual_seed(0)
            size = (shape.out_features, shape.in_features)
            dense = (torch.randn(size, generator=generator) / size[1] ** 0.5).to(DTYPES[dtype])
            for rows, density in itertools.product(plan.rows, plan.densities):
                yield run_case(shape, dense, rows, density, plan, limits)


def break_even(cases: Sequence[CsrCase]) -> float:
    """The density at which we are as fast as the best dense way, of cases that differ in it alone.

    Between two densities that were timed the speedup is taken for a power of it; infinity where
    we were faster at all of them, and 0 where at none.
    """
    ordered = sorted(cases, key=lambda case: case.density)
    faster = [case for case in ordered if case.against_best.median >= 1]
    if not faster:
        return 0.0
    best = ordered.index(faster[-1])
    if best == len(ordered) - 1:
        return math.inf
    low, high = ordered[best], ordered[best + 1]
    above, below = math.log(low.against_best.median), math.log(high.against_best.median)
    share = above / (above - below)
    return math.exp((1 - share) * math.log(low.density) + share * math.log(high.density))
