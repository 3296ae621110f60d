"""Block-sparse layers on a GPU against cuDNN, cuBLAS and torch's own block-sparse product.

2:4 convolutions are among them, by the kernels also where ``pack()`` leaves a layer to torch: what
is ``chosen`` says whether that would pay.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter

import torch
import torch.nn.functional as F
from bench_sparse24_cuda import Bench, check, cloned
from block_case import densities_of
from cuda_block_case import BSR, CudaBlockCase, Pattern
from cuda_cases import run_each, timed
from cuda_rivals import DENSE, Rivals, clones
from cuda_shapes import DTYPES
from cuda_timing import Contender, Rounds, copies_for
from gossamer import Block, blocksparse_conv, blocksparse_linear
from gossamer.formats import BlockSparse, Sparse24Conv, Sparse24ConvPanels
from gossamer.ops import sparse24_conv
from gossamer.ops.blocksparse_choice import blocksparse_choice
from gossamer.ops.sparse24_conv import sparse24_conv_choice
from gossamer.prune import magnitude_24, magnitude_blocks
from record import OURS
from shapes import ConvShape, Shape
from torch import Tensor

CUDNN_LAST = "cuDNN channels_last"
Stored = BlockSparse | Sparse24ConvPanels


@dataclass(frozen=True)
class CudaBlockPlan:
    """Which cases to run, and how long; what does not fit into ``most_seconds`` is named."""

    problems: Sequence[tuple[str, Shape, int]]  # dtype, shape, and rows or images
    blocks: Sequence[Pattern]
    densities: Sequence[float]
    rounds: Rounds = field(default_factory=Rounds)
    most_seconds: float = math.inf

    def cases(self) -> Iterator[CudaBlockCase]:
        for dtype, shape, rows in self.problems:
            for block in self.blocks:
                for density in densities_of(block, shape, self.densities):
                    yield CudaBlockCase(shape, dtype, rows, 0, block=block, density=density)


@dataclass(frozen=True)
class Problem:
    """A layer and its x, and how torch computes it densely; a 2-D answer of everything."""

    shape: Shape
    x: Tensor

    @property
    def geometry(self) -> dict[str, int]:
        if not isinstance(self.shape, ConvShape):
            return {}
        return {"stride": self.shape.stride, "padding": self.shape.padding}

    @property
    def weight_size(self) -> tuple[int, ...]:
        shape = self.shape
        if not isinstance(shape, ConvShape):
            return shape.out_features, shape.in_features
        return shape.out_channels, shape.in_channels // shape.groups, shape.kernel, shape.kernel

    @property
    def groups(self) -> int:
        return self.shape.groups if isinstance(self.shape, ConvShape) else 1

    def dense(self, x: Tensor, weight: Tensor) -> Tensor:
        if isinstance(self.shape, ConvShape):
            return F.conv2d(x, weight, **self.geometry, groups=self.groups)
        return F.linear(x, weight)

    @staticmethod
    def matrix(y: Tensor) -> Tensor:
        """[pixels, C_out]."""
        return y.movedim(1, -1).flatten(0, -2) if y.dim() == 4 else y

    def expected(self, weight: Tensor) -> Tensor:
        """By float64 sums, some images at a time, kept in float32."""
        parts = [self.dense(x.double(), weight.double()).float() for x in self.x.split(8)]
        return self.matrix(torch.cat(parts))


def problem_of(shape: Shape, rows: int, dtype: torch.dtype, device: torch.device) -> Problem:
    generator = torch.Generator(device).manual_seed(rows)
    size: tuple[int, ...] = (rows,)
    if isinstance(shape, ConvShape):
        size += (shape.in_channels, shape.extent, shape.extent)
    else:
        size += (shape.in_features,)
    return Problem(shape, torch.randn(size, generator=generator, device=device).to(dtype))


def pruned(problem: Problem, block: Pattern, density: float) -> Tensor:
    size, x = problem.weight_size, problem.x
    generator = torch.Generator(x.device).manual_seed(0)
    weight = torch.randn(size, generator=generator, device=x.device)
    weight /= math.sqrt(math.prod(size[1:]))
    if isinstance(block, str):
        return magnitude_24(weight, dim=1).to(x.dtype)
    kept = magnitude_blocks(weight, Block(*block), density, problem.groups)
    assert isinstance(kept, Tensor)
    return kept.to(x.dtype)


def stored_as(problem: Problem, weight: Tensor, block: Pattern) -> Stored:
    """The weight as the kernels read it."""
    if isinstance(block, str):
        return Sparse24ConvPanels.from_sparse24(Sparse24Conv.from_dense(weight, problem.groups))
    return BlockSparse.from_dense(weight, Block(*block), groups=problem.groups)


def product_of(problem: Problem, stored: Stored) -> Callable[..., Tensor]:
    """What multiplies an x by such a weight."""
    if not problem.geometry:
        return blocksparse_linear
    conv = sparse24_conv if isinstance(stored, Sparse24ConvPanels) else blocksparse_conv
    return partial(conv, **problem.geometry)


# ---- who computes it ----------------------------------------------------------------------------


def channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t


def add_ours(rivals: Rivals, problem: Problem, stored: Stored, copies: int) -> None:
    weights = [stored, *(cloned(stored) for _ in range(1, copies))]
    xs = clones(channels_last(problem.x), copies)
    product = product_of(problem, stored)
    calls = [partial(product, x, w) for x, w in zip(xs, weights, strict=True)]
    rivals.attempt(OURS, lambda: Contender(OURS, "ours", calls, problem.matrix))


def add_dense(rivals: Rivals, problem: Problem, weight: Tensor, copies: int) -> None:
    """cuDNN in both memory formats, with the algorithm that it finds best, or cuBLAS."""
    formats: dict[str, Callable[[Tensor], Tensor]] = {"F.linear": lambda t: t}
    if problem.geometry:
        formats = {CUDNN_LAST: channels_last, "cuDNN NCHW": lambda t: t}
    for name, given in formats.items():
        xs, weights = clones(given(problem.x), copies), clones(given(weight), copies)
        calls = [partial(problem.dense, x, w) for x, w in zip(xs, weights, strict=True)]
        contender = Contender(name, DENSE, calls, problem.matrix)
        rivals.attempt(name, lambda contender=contender: contender)


def add_bsr(rivals: Rivals, problem: Problem, weight: Tensor, block: Pattern, copies: int) -> None:
    """torch's block-sparse linear layer: Triton kernels, for square blocks from 16 on."""
    name = "torch BSR"
    if problem.geometry or isinstance(block, str):
        rivals.missing[name] = "there are no block-sparse convolutions in torch"
        return

    def make() -> Contender:
        stored = [weight.to_sparse_bsr(block) for _ in range(copies)]
        xs = clones(problem.x, copies)
        calls = [partial(F.linear, x, w) for x, w in zip(xs, stored, strict=True)]
        return Contender(name, BSR, calls)

    rivals.attempt(name, make)


# ---- a case -------------------------------------------------------------------------------------


def run_case(case: CudaBlockCase, plan: CudaBlockPlan, bench: Bench) -> CudaBlockCase:
    """Check one case, then time it."""
    dtype = DTYPES[case.dtype]
    problem = problem_of(case.shape, case.rows, dtype.dtype, bench.device)
    weight = pruned(problem, case.block, case.density)
    stored = stored_as(problem, weight, case.block)
    choice = sparse24_conv_choice if isinstance(stored, Sparse24ConvPanels) else blocksparse_choice
    last = problem.x.dim() == 4
    chosen = choice(problem.x.shape, stored, **problem.geometry, channels_last=last)
    if chosen["kernel"] == "dense":
        return dataclasses.replace(case, unavailable=f"no kernel: {chosen['why']}")
    expected = problem.expected(weight)
    activations = problem.x.nbytes + expected.numel() * dtype.out.itemsize
    flops = 2 * expected.shape[0] * weight.numel()
    kept = max(2 * expected.shape[0] * int(weight.count_nonzero()), 1)
    nbytes, dense_bytes = stored.nbytes + activations, weight.nbytes + activations
    limits = bench.limits
    case = dataclasses.replace(
        case, flops=flops, kept_flops=kept, nbytes=nbytes, dense_bytes=dense_bytes,
        limit=limits.seconds(case.dtype, kept, nbytes),
        dense_limit=limits.seconds(case.dtype, flops, dense_bytes), chosen=chosen,
    )  # fmt: skip
    rivals = Rivals()
    add_ours(rivals, problem, stored, copies_for(nbytes, limits.l2))
    if not rivals.contenders:
        return dataclasses.replace(case, unavailable=rivals.missing[OURS], failed=True)
    add_dense(rivals, problem, weight, copies_for(dense_bytes, limits.l2))
    add_bsr(rivals, problem, weight, case.block, copies_for(nbytes, limits.l2))
    ours = rivals.contenders[0]
    found = check(ours.answer(ours.calls[0]()), expected, dtype)
    case = dataclasses.replace(case, check=found)

    return timed(case, rivals, lambda y: check(y, expected, dtype), plan.rounds, bench)


def run(
    plan: CudaBlockPlan, bench: Bench, clock: Callable[[], float] = perf_counter
) -> Iterator[CudaBlockCase]:
    """All cases of the plan in its order; those after ``most_seconds`` come out as left out."""
    tuned = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True  # dense gets the best algorithm that cuDNN has
    try:
        each = partial(run_case, plan=plan, bench=bench)
        yield from run_each(plan.cases(), each, plan.most_seconds, clock)
    finally:
        torch.backends.cudnn.benchmark = tuned
