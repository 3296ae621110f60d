"""Linear layers whose input is partly zero, against dense ones and their own kernel at no zeros."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import block_case
import torch
import torch.nn.functional as F
from bench_sparse24 import check_answer
from gossamer import _C, actsparse_linear
from machine import Limits
from record import OURS, Case
from rivals import dense_linears
from shapes import DTYPES, TOLERANCES, LinearShape
from timing import Contender, Effort, Ratio, measure, speedup
from torch import Tensor

INPUT_MAJOR = "x @ W, W [K, N]"
NOTHING_ZERO = "gossamer, nothing zero"
DRAWS = 8  # inputs that take turns, so that other rows of the weight are read at each call


@dataclass(frozen=True)
class ActiveCase(Case):
    """A layer at one sparsity of its input, drawn for each token by itself."""

    sparsity: float
    read: float  # share of the weight's rows that some token has active

    @property
    def name(self) -> str:
        return f"{super().name}/{self.sparsity:.0%}"

    @property
    def place(self) -> str:
        return f"{super().place}, {self.rows} rows"

    @property
    def point(self) -> tuple[str, str]:
        return f"{self.sparsity:.0%}", "zero"

    @property
    def rates(self) -> dict[str, str]:
        """What is left of the bytes, and of the time of the kernel without any zero."""
        return {"bytes": f"{self.read:.0%}", "time": f"{1 / self.against_full.median:.0%}"}

    @property
    def params(self) -> dict[str, Any]:
        return super().params | {"sparsity": self.sparsity}

    @property
    def density(self) -> float:
        return 1 - self.sparsity

    @property
    def ideal(self) -> float:
        """Times faster, were time saved as the multiply-adds are."""
        return 1 / (1 - self.sparsity)

    @property
    def against_full(self) -> Ratio:
        return speedup(self.ours, self.timings[NOTHING_ZERO])

    def finding(self) -> dict[str, Any]:
        full = self.against_full
        against = {"median": full.median, "low": full.low, "high": full.high}
        return super().finding() | {"rows_read": self.read, "against_nothing_zero": against}


@dataclass(frozen=True)
class ActivePlan:
    """Which cases to run, and how."""

    shapes: Sequence[LinearShape]
    rows: Sequence[int]
    dtypes: Sequence[str]
    sparsities: Sequence[float]
    effort: Effort

    def __len__(self) -> int:
        sizes = (self.shapes, self.rows, self.dtypes, self.sparsities)
        return math.prod(len(size) for size in sizes)


def draw_inputs(rows: int, features: int, sparsity: float, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rows)
    inputs = []
    for _ in range(DRAWS):
        x = torch.randn(rows, features, generator=generator)
        x[torch.rand(x.shape, generator=generator) < sparsity] = 0.0
        inputs.append(x.to(dtype))
    return inputs


def _in_turn(
    function: Callable[[Tensor], Tensor], inputs: Sequence[Tensor]
) -> Callable[[], Tensor]:
    turns = itertools.cycle(inputs)
    return lambda: function(next(turns))


def run_layer(
    shape: LinearShape,
    weight: Tensor,
    weight_kn: Tensor,
    rows: int,
    plan: ActivePlan,
    limits: Limits,
) -> Iterator[ActiveCase]:
    """Checks all sparsities of a layer, then times them and the dense ways in the same rounds."""
    dtype = weight.dtype
    name = str(dtype).removeprefix("torch.")
    inputs = {s: draw_inputs(rows, shape.in_features, s, dtype) for s in (0.0, *plan.sparsities)}
    ours = partial(actsparse_linear, weight_kn=weight_kn)
    checks = {}
    for sparsity in plan.sparsities:
        x = inputs[sparsity][0]
        expected = F.linear(x.float(), weight.float())
        checks[sparsity] = check_answer(ours(x), expected, TOLERANCES[dtype])
    subjects = {s: f"{OURS} {s:.0%}" for s in inputs}
    dense = dense_linears([weight], inputs[0.0][0])
    dense.append(Contender(INPUT_MAJOR, lambda: inputs[0.0][0] @ weight_kn))
    timings = measure(
        [
            *(Contender(subjects[s], _in_turn(ours, x), subject=True) for s, x in inputs.items()),
            *dense,
        ],
        plan.effort,
    )
    best = min((c.name for c in dense), key=lambda way: timings[way].median)
    elements = shape.out_features * shape.in_features
    others = (rows * (shape.in_features + shape.out_features)) * dtype.itemsize
    for sparsity in plan.sparsities:
        masks = torch.stack([x != 0 for x in inputs[sparsity]])
        read, active = (float(m.float().mean()) for m in (masks.any(1), masks))
        nbytes = round(read * weight.nbytes) + others
        real_flops = round(2 * rows * elements * active)
        yield ActiveCase(
            feature="actsparse",
            shape=shape,
            dtype=name,
            rows=rows,
            kernel=f"{_C.actsparse_target(name)}/rows",
            check=checks[sparsity],
            timings={
                OURS: timings[subjects[sparsity]],
                NOTHING_ZERO: timings[subjects[0.0]],
                **{c.name: timings[c.name] for c in dense},
            },
            best_dense=best,
            dense_flops=2 * rows * elements,
            real_flops=real_flops,
            nbytes=nbytes,
            peak_flops=limits.flops[name],
            limit_seconds=limits.seconds(name, real_flops, nbytes),
            dense_limit_seconds=limits.seconds(name, 2 * rows * elements, weight.nbytes + others),
            sparsity=sparsity,
            read=read,
        )


def run(plan: ActivePlan, limits: Limits) -> Iterator[ActiveCase]:
    """All cases of the plan, those of one layer together."""
    with torch.no_grad():
        for dtype, shape in itertools.product(plan.dtypes, plan.shapes):
            generator = torch.Generator().manual_seed(0)
            size = (shape.out_features, shape.in_features)
            weight = torch.randn(size, generator=generator) / size[1] ** 0.5
            weight = weight.to(DTYPES[dtype])
            weight_kn = weight.t().contiguous()
            for rows in plan.rows:
                yield from run_layer(shape, weight, weight_kn, rows, plan, limits)


def break_even(cases: Sequence[ActiveCase]) -> tuple[str, float]:
    """The sparsity from which on a layer is as fast as dense, from its cases at several.

    Returns
    -------
    relation : str
        "" where it lies between two sparsities that were measured, and is interpolated on the
        times; else "<" or ">".
    sparsity : float
        It, or the one measured that it is below or above.
    """
    relation, density = block_case.break_even(cases)
    return {"<": ">", ">": "<"}.get(relation, ""), 1 - density
