"""Block-sparse layers, and 2:4 convolutions, against every dense way torch has."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from bench_sparse24 import check_answer
from block_case import BlockCase, densities_of
from conv_rivals import dense_convs
from gossamer import Block
from gossamer.nn import SparseConv2d, SparseLinear
from gossamer.ops.blocksparse_choice import blocksparse_choice
from gossamer.ops.sparse24_conv import sparse24_conv_choice
from machine import Limits
from record import OURS, Check
from rivals import BSR, CSR, dense_linears, sparse_bsr, sparse_csr
from shapes import DTYPES, TOLERANCES, ConvShape, Shape
from timing import Contender, Effort, measure
from torch import Tensor, nn

DENSITIES = (0.75, 0.5, 0.25, 0.1, 0.05)
Pattern = Block | str  # the one word is "2:4", whose density is a half
# Kept operations up to which torch's sparse products are timed: they reach a tenth of the peak.
MOST_SPARSE_FLOP = 0.5e9


@dataclass(frozen=True)
class BlockPlan:
    """Which cases to run, and how."""

    problems: Sequence[tuple[Shape, int]]  # with rows or images
    dtypes: Sequence[str]
    blocks: Sequence[Pattern]
    effort: Effort
    densities: Sequence[float] = DENSITIES

    def __len__(self) -> int:
        cases = sum(
            len(densities_of(block, shape, self.densities))
            for (shape, _), block in itertools.product(self.problems, self.blocks)
        )
        return len(self.dtypes) * cases


@dataclass
class Dense:
    """The layer of a shape before it is pruned."""

    shape: Shape
    dtype: str

    def __post_init__(self) -> None:
        shape = self.shape
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            made: nn.Conv2d | nn.Linear
            if isinstance(shape, ConvShape):
                made = nn.Conv2d(
                    shape.in_channels, shape.out_channels, shape.kernel, shape.stride,
                    shape.padding, groups=shape.groups, bias=False,
                )  # fmt: skip
            else:
                made = nn.Linear(shape.in_features, shape.out_features, bias=False)
        self.layer = made.to(DTYPES[self.dtype]).eval()

    def x(self, rows: int) -> Tensor:
        shape = self.shape
        size: tuple[int, ...] = (rows,)
        if isinstance(shape, ConvShape):
            size += (shape.in_channels, shape.extent, shape.extent)
        else:
            size += (shape.in_features,)
        generator = torch.Generator().manual_seed(rows)
        return torch.randn(size, generator=generator).to(DTYPES[self.dtype])

    def rivals(self, x: Tensor) -> list[Contender]:
        if isinstance(self.layer, nn.Conv2d):
            return dense_convs(self.layer, x)
        return dense_linears([self.layer.weight.detach()], x)

    def pruned(self, block: Pattern, density: float) -> SparseConv2d | SparseLinear:
        kind = SparseConv2d if isinstance(self.layer, nn.Conv2d) else SparseLinear
        share = density if isinstance(block, Block) else None
        sparse = kind.from_dense(self.layer, block, "magnitude", share)  # type: ignore[arg-type]
        return sparse.eval()


class Subject:
    """Our layer at one density: its numbers, and torch's sparse products with the same weight."""

    def __init__(self, dense: Dense, x: Tensor, block: Pattern, density: float) -> None:
        self.density = density
        self.layer = dense.pruned(block, density)
        weight = self.layer.weight
        self.nbytes = weight.nbytes
        pruned = self.layer.to_dense()
        names = ("stride", "padding") if isinstance(pruned, nn.Conv2d) else ()
        geometry = {name: getattr(pruned, name) for name in names}
        self.kept = int((pruned.weight != 0).sum())
        expected = pruned.double()(x.double()).float()
        self.y_shape = expected.shape
        self.layer.pack()
        choose = blocksparse_choice if isinstance(block, Block) else sparse24_conv_choice
        held: Any = self.layer.weight
        choice = choose(x.shape, held, **geometry, channels_last=True)
        self.kernel = f"{choice['target']}/{choice['kernel']}"
        given = x.to(memory_format=torch.channels_last) if x.dim() == 4 else x
        self.contenders = [Contender(self.label(OURS), partial(self.layer, given), subject=True)]
        self.check: Check = check_answer(self.layer(given), expected, TOLERANCES[x.dtype])
        flop = 2 * x.shape[0] * self.kept
        if x.dim() == 2 and x.dtype is torch.float32 and flop <= MOST_SPARSE_FLOP:
            matrix = pruned.weight.detach().float()
            others = [sparse_csr([matrix], x)]
            if isinstance(block, Block):
                others.append(sparse_bsr(matrix, block.rows, block.cols, x))
            self.contenders += [
                Contender(self.label(other.name), other.run) for other in others if other
            ]

    def label(self, name: str) -> str:
        return f"{name} {self.density:.0%}"


def run_problem(
    dense: Dense, rows: int, block: Pattern, plan: BlockPlan, limits: Limits
) -> list[BlockCase]:
    """Check and time a layer at every density, all in the same rounds as the dense ways."""
    x, densities = dense.x(rows), densities_of(block, dense.shape, plan.densities)
    subjects = [Subject(dense, x, block, density) for density in densities]
    if not subjects:
        return []
    rivals = dense.rivals(x)
    ours = [contender for subject in subjects for contender in subject.contenders]
    timings = measure([*ours, *rivals], plan.effort)
    best = min((rival.name for rival in rivals), key=lambda name: timings[name].median)
    weight, y_shape = dense.layer.weight, subjects[0].y_shape
    # Each weight meets every pixel of y, or every row.
    meetings = y_shape.numel() // y_shape[1]
    activations = x.nbytes + y_shape.numel() * x.element_size()
    flops, dense_nbytes = 2 * meetings * weight.numel(), weight.nbytes + activations
    cases = []
    for subject in subjects:
        kept, nbytes = 2 * meetings * max(subject.kept, 1), subject.nbytes + activations
        mine = {
            name: timings[subject.label(name)]
            for name in (OURS, CSR, BSR)
            if subject.label(name) in timings
        }
        case = BlockCase(
            feature="blocksparse",
            shape=dense.shape,
            dtype=dense.dtype,
            rows=rows,
            kernel=subject.kernel,
            check=subject.check,
            timings=mine | {rival.name: timings[rival.name] for rival in rivals},
            best_dense=best,
            dense_flops=flops,
            real_flops=kept,
            nbytes=nbytes,
            peak_flops=limits.flops[dense.dtype],
            limit_seconds=limits.seconds(dense.dtype, kept, nbytes),
            dense_limit_seconds=limits.seconds(dense.dtype, flops, dense_nbytes),
            block=str(block),
            density=subject.density,
            bytes_seconds=limits.seconds(dense.dtype, 0, nbytes),
        )
        cases.append(case)
    return cases


def run(plan: BlockPlan, limits: Limits) -> Iterator[BlockCase]:
    """All cases of the plan, those of one shape together."""
    with torch.no_grad():
        for dtype, (shape, problems) in itertools.product(
            plan.dtypes, _by_shape(plan.problems).items()
        ):
            dense = Dense(shape, dtype)
            for rows, block in itertools.product(problems, plan.blocks):
                yield from run_problem(dense, rows, block, plan, limits)


def _by_shape(problems: Sequence[tuple[Shape, int]]) -> dict[Shape, list[int]]:
    found: dict[Shape, list[int]] = {}
    for shape, rows in problems:
        found.setdefault(shape, []).append(rows)
    return found
