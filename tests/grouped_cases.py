"""Cases of grouped linear layers, by what a kernel or the split of its work has to get right."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from cases import SumOracle
from gossamer import reference
from torch import Tensor


@dataclass(frozen=True)
class GroupedCase:
    counts: tuple[int, ...]  # tokens of each expert
    n: int
    k: int

    def __str__(self) -> str:
        return f"{'+'.join(map(str, self.counts))}-{self.n}-{self.k}"

    @property
    def offsets(self) -> Tensor:
        return torch.tensor(self.counts).cumsum(0)

    def operands(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """x, weights and bias."""
        shapes = ((sum(self.counts), self.k), (len(self.counts), self.n, self.k))
        x, weights = (torch.randn(shape).to(dtype) for shape in shapes)
        return x, weights, torch.randn(shapes[1][:2]).to(dtype)


CASES = (
    GroupedCase((1,), 1, 1),
    GroupedCase((0, 0, 0), 5, 7),  # no token at all
    GroupedCase((1, 0, 2, 0), 3, 5),  # experts without one
    GroupedCase((2, 3), 17, 33),  # tails in n and k, of vectors and of tiles of 16
    GroupedCase((6, 7, 13), 65, 32),  # a tile of tokens exactly, one more, uneven tiles
    GroupedCase((16, 17, 33, 1), 130, 96),  # the same of AMX, and several blocks of outputs
    GroupedCase((90, 0, 5), 67, 1031),  # tokens of several tiles, a column past a pass in float32
    GroupedCase((2, 1), 9, 4130),  # passes of every dtype
    GroupedCase((1100,), 12, 40),  # more tokens than are packed at once
    GroupedCase(tuple(range(12)), 40, 20),  # tasks of one thread that span experts
)


class GroupedOracle(SumOracle):
    """``reference.grouped_linear`` in float64, and how far a kernel may be from it."""

    def __init__(
        self,
        x: Tensor,
        weights: Tensor,
        offsets: Tensor,
        bias: Tensor | None = None,
        activation: str | None = None,
    ) -> None:
        exact = [None if t is None else t.detach().double() for t in (x, weights, bias)]
        # What is not finite only meets zeros where the result is finite.
        sizes = [None if t is None else t.abs().nan_to_num(nan=0.0, posinf=0.0) for t in exact]
        y = reference.grouped_linear(exact[0], exact[1], offsets, exact[2], activation)
        size = reference.grouped_linear(sizes[0], sizes[1], offsets, sizes[2])
        super().__init__(y, size, x.shape[1], x.dtype)
