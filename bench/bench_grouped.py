"""Grouped linear layers of mixtures of experts, against a loop of dense layers and grouped_mm."""

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
from gossamer import _C, grouped_linear
from machine import Limits
from record import OURS, Case
from rivals import THROUGH_FLOAT32, has_instructions_for
from shapes import DTYPES, TOLERANCES, ExpertShape
from timing import Contender, Effort, measure
from torch import Tensor

LOOP, GROUPED_MM = "loop of F.linear", "F.grouped_mm"
LOADS = ("even", "zipf")


@dataclass(frozen=True)
class GroupedCase(Case):
    """A layer under one load: ``rows`` tokens altogether, spread over its experts."""

    load: str  # even: as many for each; zipf: the r-th busiest expert is drawn with weight 1 / r
    tokens: int  # an expert, on average
    active: int  # experts that have a token

    @property
    def name(self) -> str:
        return f"{super().name}/{self.load}"

    @property
    def default(self) -> str:
        return LOOP

    @property
    def place(self) -> str:
        return f"{super().place}, {self.load} load"

    @property
    def point(self) -> tuple[str, str]:
        return str(self.tokens), "tokens each"

    @property
    def params(self) -> dict[str, Any]:
        spread = {"load": self.load, "tokens": self.tokens, "active": self.active}
        return super().params | spread


@dataclass(frozen=True)
class GroupedPlan:
    """Which cases to run, and how."""

    shapes: Sequence[ExpertShape]
    tokens: Sequence[int]  # an expert, on average
    dtypes: Sequence[str]
    effort: Effort
    loads: Sequence[str] = LOADS

    def __len__(self) -> int:
        sizes = (self.shapes, self.tokens, self.dtypes, self.loads)
        return math.prod(len(size) for size in sizes)


def draw_counts(experts: int, tokens: int, load: str) -> Tensor:
    """How many tokens each expert gets, ``tokens`` on average: the same at every call."""
    if load == "even":
        return torch.full((experts,), tokens)
    generator = torch.Generator().manual_seed(experts)
    order = torch.randperm(experts, generator=generator)
    weights = 1 / (order + 1.0)
    drawn = torch.multinomial(weights, experts * tokens, replacement=True, generator=generator)
    return torch.bincount(drawn, minlength=experts)


def _loop(x: Tensor, weights: Tensor, counts: Sequence[int]) -> Tensor:
    groups = zip(x.split(counts), weights, strict=True)
    return torch.cat([F.linear(group, weight) for group, weight in groups if len(group)])


def rivals(x: Tensor, weights: Tensor, counts: Tensor) -> list[Contender]:
    """The dense ways of torch, on the same weights."""
    contenders = [Contender(LOOP, partial(_loop, x, weights, counts.tolist()))]
    if not has_instructions_for(x.dtype):
        wide = weights.float()
        through = lambda: _loop(x.float(), wide, counts.tolist()).to(x.dtype)  # noqa: E731
        contenders.append(Contender(THROUGH_FLOAT32, through))
    ends = counts.cumsum(0, dtype=torch.int32)
    try:
        grouped_mm = partial(F.grouped_mm, x, weights.mT, offs=ends)
        grouped_mm()
    except (AttributeError, RuntimeError, ValueError):
        return contenders  # an older torch, or a shape or dtype that it refuses
    return [*contenders, Contender(GROUPED_MM, grouped_mm)]


def run_case(
    shape: ExpertShape, weights: Tensor, tokens: int, load: str, plan: GroupedPlan, limits: Limits
) -> GroupedCase:
    """Check one case, then time it."""
    counts = draw_counts(shape.experts, tokens, load)
    generator = torch.Generator().manual_seed(tokens)
    size = (int(counts.sum()), shape.in_features)
    x = torch.randn(size, generator=generator).to(weights.dtype)
    ours = Contender(OURS, partial(grouped_linear, x, weights, counts.cumsum(0)))
    expected = torch.cat(
        [
            F.linear(group.float(), weight.float())
            for group, weight in zip(x.split(counts.tolist()), weights, strict=True)
        ]
    )
    check = check_answer(ours.run(), expected, TOLERANCES[x.dtype])
    dense = rivals(x, weights, counts)
    timings = measure([ours, *dense], plan.effort)
    active = int((counts > 0).sum())
    dtype = str(x.dtype).removeprefix("torch.")
    flops = 2 * len(x) * shape.out_features * shape.in_features
    nbytes = active * weights[0].nbytes + x.nbytes + len(x) * shape.out_features * x.itemsize
    limit = limits.seconds(dtype, flops, nbytes)
    choice = _C.grouped_choose(dtype)
    return GroupedCase(
        feature="grouped",
        shape=shape,
        dtype=dtype,
        rows=len(x),
        kernel=f"{choice['target']}/{choice['kernel']}",
        check=check,
        timings=timings,
        best_dense=min((c.name for c in dense), key=lambda name: timings[name].median),
        dense_flops=flops,
        real_flops=flops,
        nbytes=nbytes,
        peak_flops=limits.flops[dtype],
        limit_seconds=limit,
        dense_limit_seconds=limit,
        load=load,
        tokens=tokens,
        active=active,
    )


def run(plan: GroupedPlan, limits: Limits) -> Iterator[GroupedCase]:
    """All cases of the plan, those of one shape together."""
    with torch.no_grad():
        for dtype, shape in itertools.product(plan.dtypes, plan.shapes):
            generator = torch.Generator().manual_seed(0)
            size = (shape.experts, shape.out_features, shape.in_features)
            weights = torch.empty(size, dtype=DTYPES[dtype])
            for weight in weights:
                weight.copy_(torch.randn(size[1:], generator=generator) / size[2] ** 0.5)
            for load, tokens in itertools.product(plan.loads, plan.tokens):
                yield run_case(shape, weights, tokens, load, plan, limits)
