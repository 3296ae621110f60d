"""Decoding k-sparse codes, against embedding_bag and the dense product of the scattered codes."""

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
from gossamer import _C, topk_decode
from gossamer._wide import has_loops_only
from machine import Limits
from record import OURS, Case
from shapes import DTYPES, TOLERANCES, CodeShape
from timing import Contender, Effort, measure
from torch import Tensor

DENSE, BAG = "codes @ W", "F.embedding_bag"
DENSE_GFLOP = 120.0  # above it the dense product takes seconds, and says nothing new


@dataclass(frozen=True)
class CodeCase(Case):
    """A dictionary and so many codes of k entries each."""

    k: int

    @property
    def name(self) -> str:
        return f"{super().name}/k{self.k}"

    @property
    def default(self) -> str:
        return BAG

    @property
    def place(self) -> str:
        return f"{super().place}, k = {self.k}"

    @property
    def point(self) -> tuple[str, str]:
        return str(self.rows), "tokens"

    @property
    def params(self) -> dict[str, Any]:
        return super().params | {"k": self.k, "uses_of_a_row": self.uses}

    @property
    def uses(self) -> float:
        """How often a row of the dictionary is named, on average."""
        return self.rows * self.k / self.shape.sizes["width"]


@dataclass(frozen=True)
class CodePlan:
    """Which cases to run, and how."""

    shapes: Sequence[CodeShape]
    tokens: Sequence[int]
    ks: Sequence[int]
    dtypes: Sequence[str]
    effort: Effort

    def __len__(self) -> int:
        return math.prod(len(part) for part in (self.shapes, self.tokens, self.ks, self.dtypes))


def rivals(values: Tensor, indices: Tensor, weight: Tensor) -> list[Contender]:
    """The ways of torch; the codes of the dense one are scattered beforehand.

    That multiplies in float32 where torch has only loops for the type on this CPU.
    """
    bag = partial(F.embedding_bag, indices, weight, mode="sum", per_sample_weights=values)
    found = [Contender(BAG, bag)]
    if 2e-9 * len(values) * weight.numel() <= DENSE_GFLOP:
        codes = values.new_zeros(len(values), len(weight)).scatter_add_(1, indices, values)
        wide = torch.float32 if has_loops_only(weight) else weight.dtype
        operands = (codes.to(wide), weight.to(wide))
        found.append(Contender(DENSE, lambda: torch.mm(*operands).to(weight.dtype)))
    return found


def run_case(
    shape: CodeShape, weight: Tensor, tokens: int, k: int, plan: CodePlan, limits: Limits
) -> CodeCase:
    """Check one case, then time it."""
    generator = torch.Generator().manual_seed(tokens)
    indices = torch.randint(0, shape.width, (tokens, k), generator=generator)
    values = torch.rand((tokens, k), generator=generator).to(weight.dtype)
    ours = Contender(OURS, partial(topk_decode, values, indices, weight))
    checked = slice(0, 64)  # in float32 the rows of all would take a hundred times the dictionary
    rows = weight[indices[checked]].float()
    wanted = torch.einsum("tj,tjd->td", values[checked].float(), rows)
    check = check_answer(ours.run()[checked], wanted, TOLERANCES[weight.dtype])
    others = rivals(values, indices, weight)
    timings = measure([ours, *others], plan.effort)
    dtype = str(weight.dtype).removeprefix("torch.")
    flops, size = 2 * tokens * k * shape.d, weight.itemsize
    used = min(tokens * k, shape.width)
    nbytes = used * shape.d * size + tokens * (k * (size + 8) + shape.d * size)
    limit = limits.seconds(dtype, flops, nbytes)
    dense_bytes = weight.nbytes + tokens * (shape.width + shape.d) * size
    dense_flops = 2 * tokens * weight.numel()
    return CodeCase(
        feature="codes",
        shape=shape,
        dtype=dtype,
        rows=tokens,
        kernel=_C.target(),
        check=check,
        timings=timings,
        best_dense=min((c.name for c in others), key=lambda name: timings[name].median),
        dense_flops=dense_flops,
        real_flops=flops,
        nbytes=nbytes,
        peak_flops=limits.flops[dtype],
        limit_seconds=limit,
        dense_limit_seconds=limits.seconds(dtype, dense_flops, dense_bytes),
        k=k,
    )


def run(plan: CodePlan, limits: Limits) -> Iterator[CodeCase]:
    """All cases of the plan, those of one shape together."""
    with torch.no_grad():
        for dtype, shape in itertools.product(plan.dtypes, plan.shapes):
            generator = torch.Generator().manual_seed(0)
            weight = torch.empty(shape.width, shape.d, dtype=DTYPES[dtype])
            for part in weight.split(4096):
                part.copy_(torch.randn(part.shape, generator=generator) / shape.d**0.5)
            for k, tokens in itertools.product(plan.ks, plan.tokens):
                yield run_case(shape, weight, tokens, k, plan, limits)
