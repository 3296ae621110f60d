"""2:4 sparse linear layers against every dense way torch has, on the layers of real models."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import gossamer
import torch
import torch.nn.functional as F
from gossamer import _C
from gossamer.formats import Sparse24, Sparse24Panels
from machine import Limits, last_level_cache
from record import OURS, Case, Check
from rivals import CSR, DEFAULT, dense_linears, sparse_csr
from shapes import DTYPES, TOLERANCES, LinearShape, Tolerance
from timing import Contender, Effort, measure
from torch import Tensor

HOPELESS = 10.0  # a rival this many times slower than the best is left out for more rows
HOPELESS_FROM = 16  # rows; with fewer, calls are so short that it costs nothing to be thorough
MOST_COPIES = 128  # of a weight that is to be cold; smaller ones than a layer's stay in the caches


@dataclass(frozen=True)
class Plan:
    """Which cases to run, and how.

    ``most_csr_rows`` and ``most_gflop`` (of the dense product) keep a quick run quick.
    """

    shapes: Sequence[LinearShape]
    rows: Sequence[int]
    dtypes: Sequence[str]
    effort: Effort
    cold: bool = False
    most_csr_rows: int | None = None
    most_gflop: float = math.inf

    def rows_of(self, shape: LinearShape) -> list[int]:
        flop_per_row = 2 * shape.out_features * shape.in_features
        return [m for m in self.rows if m * flop_per_row <= self.most_gflop * 1e9]

    def left_out(self) -> list[str]:
        """The cases that only ``most_gflop`` keeps from being run."""
        return [
            f"{shape.name} at {m} rows"
            for shape in self.shapes
            for m in self.rows
            if m not in self.rows_of(shape)
        ]

    def __len__(self) -> int:
        return len(self.dtypes) * sum(len(self.rows_of(shape)) for shape in self.shapes)


@dataclass
class Weight:
    """One layer's weight in every form that the contenders read.

    The copies of each form are used in turn: one when the caches may keep it, as in a layer that
    is called over and over, and else enough of them to push each other out.
    """

    shape: LinearShape
    dtype: str
    cold: bool
    dense: list[Tensor] = field(init=False)
    packed: list[Sparse24Panels] = field(init=False)
    hopeless: set[str] = field(init=False, default_factory=set)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        size = (self.shape.out_features, self.shape.in_features)
        weight = torch.randn(size, generator=generator) / math.sqrt(self.shape.in_features)
        pruned = gossamer.prune.magnitude_24(weight.to(DTYPES[self.dtype]))
        panels = Sparse24Panels.from_sparse24(Sparse24.from_dense(pruned))
        self.dense = [pruned]
        self.dense += [pruned.clone() for _ in range(1, self._copies(pruned.nbytes))]
        self.packed = [panels]
        self.packed += [
            Sparse24Panels(panels.panels.clone(), panels.shape, panels.dtype)
            for _ in range(1, self._copies(panels.nbytes))
        ]

    def _copies(self, nbytes: int) -> int:
        if not self.cold:
            return 1
        return min(MOST_COPIES, math.ceil(2 * last_level_cache() / nbytes))


def check_answer(answer: Tensor, reference: Tensor, tolerance: Tolerance) -> Check:
    """Compare with the dense answer, element by element; a NaN or a wrong shape fails."""
    if answer.shape != reference.shape:
        return Check(max_error=math.inf, worst=math.inf)
    rms = reference.square().mean().sqrt()
    allowed = tolerance.relative * reference.abs() + tolerance.of_rms * rms
    error = (answer.float() - reference).abs()
    return Check(max_error=error.max().item(), worst=(error / allowed).max().item())


def _sparse24(packed: Sequence[Sparse24Panels], x: Tensor) -> Callable[[], Tensor]:
    linear = gossamer.sparse24_linear
    if len(packed) == 1:
        weight = packed[0]
        return lambda: linear(x, weight)
    turns = itertools.cycle(packed)
    return lambda: linear(x, next(turns))


def run_case(weight: Weight, rows: int, plan: Plan, limits: Limits) -> Case:
    """Check one case, then time it."""
    shape, dtype = weight.shape, DTYPES[weight.dtype]
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, shape.in_features, generator=generator).to(dtype)
    reference = F.linear(x.float(), weight.dense[0].float())
    ours = Contender(OURS, _sparse24(weight.packed, x))
    check = check_answer(ours.run(), reference, TOLERANCES[dtype])

    dense = [c for c in dense_linears(weight.dense, x) if c.name not in weight.hopeless]
    contenders = [ours, *dense]
    wanted = plan.most_csr_rows is None or rows <= plan.most_csr_rows
    if wanted and dtype is torch.float32 and CSR not in weight.hopeless:
        contenders.append(sparse_csr(weight.dense, x))
    timings = measure(contenders, plan.effort)

    best = min((c.name for c in dense), key=lambda name: timings[name].median)
    if rows >= HOPELESS_FROM:
        limit = HOPELESS * timings[best].median
        weight.hopeless |= {name for name, timing in timings.items() if timing.median > limit}
        weight.hopeless -= {OURS, DEFAULT}

    flops = 2 * rows * shape.out_features * shape.in_features
    # A tile unit, whose peak is then the measured one, multiplies the zeros as well.
    tiles = dtype is torch.bfloat16 and "amx_bf16" in _C.machine_targets()
    kept = shape.in_features if tiles else 2 * math.ceil(shape.in_features / 4)
    real_flops = 2 * rows * shape.out_features * kept
    activations = x.nbytes + rows * shape.out_features * dtype.itemsize
    nbytes = weight.packed[0].nbytes + activations
    dense_nbytes = weight.dense[0].nbytes + activations
    choice = _C.sparse24_choose(
        rows, shape.out_features, shape.in_features, weight.dtype, limits.threads
    )
    return Case(
        feature="sparse24",
        shape=shape,
        dtype=weight.dtype,
        rows=rows,
        kernel=f"{choice['target']}/{choice['kernel']}",
        check=check,
        timings=timings,
        best_dense=best,
        dense_flops=flops,
        real_flops=real_flops,
        nbytes=nbytes,
        peak_flops=limits.flops[weight.dtype],
        limit_seconds=limits.seconds(weight.dtype, real_flops, nbytes, cold=plan.cold),
        dense_limit_seconds=limits.seconds(weight.dtype, flops, dense_nbytes, cold=plan.cold),
    )


def run(plan: Plan, limits: Limits) -> Iterator[Case]:
    """All cases of the plan, those of one weight together."""
    with torch.no_grad():
        for dtype, shape in itertools.product(plan.dtypes, plan.shapes):
            rows = plan.rows_of(shape)
            weight = Weight(shape, dtype, plan.cold) if rows else None
            for m in rows:
                assert weight is not None
                yield run_case(weight, m, plan, limits)
