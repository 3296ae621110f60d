"""Convolutions drawn at random, and torch's dense one on the same weights as their oracle."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from cases import DTYPES, SumOracle
from gossamer import Block, reference
from gossamer.formats import BlockSparse
from torch import Tensor

CONVS = (F.conv1d, F.conv2d, F.conv3d)
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
BLOCKS = (
    Block(1, 1), Block(1, 4), Block(2, 3), Block(4, 4), Block(8, 8), Block(5, 16),
    Block(16, 2), Block(16, 16), Block(48, 16), Block(64, 32),
)  # fmt: skip


@dataclass(frozen=True)
class ConvCase:
    """One convolution: shapes, what is done at the edges, and which blocks are live."""

    batch: int
    groups: int
    group_in: int
    group_out: int
    kernel: tuple[int, ...]
    extents: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    block: Block
    density: float
    dtype: torch.dtype = torch.float32
    channels_last: bool = False
    bias: bool = True

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return (self.groups * self.group_out, self.group_in, *self.kernel)

    @property
    def geometry(self) -> dict[str, Any]:
        return {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}

    def weight(self) -> BlockSparse:
        return block_sparse(self.shape, self.block, self.density, self.groups, self.dtype)

    def x(self) -> Tensor:
        x = torch.randn(self.batch, self.groups * self.group_in, *self.extents).to(self.dtype)
        last = self.channels_last and x.dim() in LAST
        return x.to(memory_format=LAST[x.dim()]) if last else x

    def dense(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        conv = CONVS[len(self.kernel) - 1]
        return conv(x, weight, bias, **self.geometry, groups=self.groups)

    def oracle(self, x: Tensor, weight: BlockSparse, bias: Tensor | None) -> SumOracle:
        dense, x = weight.to_dense().detach().double(), x.detach().double()
        bias = None if bias is None else bias.detach().double()
        sizes = self.dense(x.abs(), dense.abs(), None if bias is None else bias.abs())
        products = dense[0].numel()
        return SumOracle(self.dense(x, dense, bias), sizes, products, self.dtype)


def block_sparse(
    shape: tuple[int, ...],
    block: Block,
    density: float = 0.5,
    groups: int = 1,
    dtype: torch.dtype = torch.float32,
) -> BlockSparse:
    """A weight with some of its blocks live, one of them 0 throughout and some entries -0.0."""
    mask = torch.rand(block.grid(shape, groups)) < density
    weight = torch.randn(shape)
    weight[torch.rand(shape) < 0.1] = -0.0
    weight = torch.where(reference.block_cover(mask, shape, block, groups), weight, 0)
    if mask.any():
        zeroed = torch.zeros_like(mask)
        zeroed[tuple(mask.nonzero()[0])] = True
        weight[reference.block_cover(zeroed, shape, block, groups)] = 0
    return BlockSparse.from_dense(weight.to(dtype), block, mask, groups)


def draw(seed: int) -> ConvCase:
    """A convolution that torch can do too: kernels 1 to 7, everything else to match."""
    r = random.Random(seed)
    axes = r.choice((1, 2, 2, 2, 3))
    largest = (7, 7, 4)[axes - 1]
    kernel = tuple(r.choice((1, 1, 3, 3, 2, r.randint(1, largest))) for _ in range(axes))
    dilation = tuple(r.choice((1, 1, 1, 2, 3)) for _ in range(axes))
    stride = tuple(r.choice((1, 1, 2, 3)) for _ in range(axes))
    padding: tuple[int, ...] | str = tuple(r.randint(0, 3) for _ in range(axes))
    kind = r.random()
    if kind < 0.15:
        padding, stride = "same", (1,) * axes
    elif kind < 0.25:
        padding = "valid"
    extents = []
    for k, d, i in zip(kernel, dilation, range(axes), strict=True):
        room = 2 * padding[i] if isinstance(padding, tuple) else 0
        extents.append(max(1, d * (k - 1) + 1 - room) + r.randint(0, (30, 9, 4)[axes - 1]))
    return ConvCase(
        batch=r.choice((0, 1, 1, 3, 3)),
        groups=r.choice((1, 1, 1, 2, 3)),
        group_in=r.choice((1, 3, 4, 16, 17, 40)),
        group_out=r.choice((1, 2, 5, 16, 50)),
        kernel=kernel,
        extents=tuple(extents),
        stride=stride,
        padding=padding,
        dilation=dilation,
        block=r.choice(BLOCKS),
        density=r.choice((0.0, 0.25, 0.5, 1.0)),
        dtype=r.choice((torch.float32, *DTYPES)),
        channels_last=r.random() < 0.5,
        bias=r.random() < 0.5,
    )


CASES = tuple(draw(seed) for seed in range(300))

# What the mechanisms of a kernel hang on: a 3 x 3 with tails everywhere.
TYPICAL = ConvCase(
    2, 1, 19, 21, (3, 3), (9, 7), (1, 1), (1, 1), (1, 1), Block(8, 8), 0.5, channels_last=True
)


def typical(**changes: Any) -> ConvCase:
    return replace(TYPICAL, **changes)
