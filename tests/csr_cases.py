"""Cases of unstructured weights, by what a kernel or the split of its work has to get right."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from cases import SumOracle
from gossamer import reference
from gossamer.formats import SparseCsr
from torch import Tensor


@dataclass(frozen=True)
class CsrCase:
    m: int
    n: int
    k: int
    density: float

    def __str__(self) -> str:
        return f"{self.m}-{self.n}-{self.k}-{self.density}"

    def operands(self, dtype: torch.dtype) -> tuple[Tensor, SparseCsr, Tensor]:
        """x, a weight with stored zeros and empty rows, and a bias."""
        x, dense = torch.randn(self.m, self.k), torch.randn(self.n, self.k)
        live = torch.rand(self.n, self.k) < self.density
        live[3::7] = False
        dense = torch.where(live & (torch.rand_like(dense) < 0.95), dense, 0)
        weight = SparseCsr.from_dense(dense.to(dtype), live)
        return x.to(dtype), weight, torch.randn(self.n).to(dtype)


CASES = (
    CsrCase(1, 1, 1, 1.0),
    CsrCase(0, 5, 7, 0.5),  # no row of x
    CsrCase(2, 3, 5, 0.0),  # nothing stored
    CsrCase(3, 17, 33, 0.3),  # the most rows that are gathered, tails of lanes along W
    CsrCase(4, 40, 100, 0.1),  # the fewest that lie along the lanes
    CsrCase(16, 33, 129, 1.0),  # full rows, and more places in one than are taken at a time
    CsrCase(17, 300, 257, 0.2),  # several blocks of rows of W, a column past what int8 numbers
    CsrCase(65, 70, 900, 0.5),  # passes over columns that L1 holds, panels that are not full
    CsrCase(130, 270, 1300, 0.3),  # several groups of rows of x
    CsrCase(9, 5, 40_000, 0.01),  # int32 columns
    CsrCase(70, 40, 33_000, 0.02),  # the same with passes
)


class CsrOracle(SumOracle):
    """A dense layer in float64, and how far a kernel may be from it."""

    def __init__(
        self,
        x: Tensor,
        weight: SparseCsr,
        bias: Tensor | None = None,
        activation: str | None = None,
    ) -> None:
        dense = weight.to_dense()
        exact = [None if t is None else t.detach().double() for t in (x, dense, bias)]
        sizes = [None if t is None else t.abs() for t in exact]
        y = reference.activate(F.linear(*exact), activation)
        super().__init__(y, F.linear(*sizes), weight.in_features, weight.dtype)
