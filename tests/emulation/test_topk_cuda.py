"""The kernels of k-sparse codes of a GPU, one by one, on whole numbers whose sums are exact."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from cases import integers
from devices import Sanitizers
from emulator import HERE, Emulator, KernelLibrary
from fragment_gemm import DTYPE_CODES
from gossamer import reference
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MARGIN = 8  # elements before and between rows: 16 bytes of the smallest


@pytest.fixture(scope="module")
def kernels(emulator: Emulator) -> KernelLibrary:
    return emulator.build(HERE / "kernels" / "topk.cu")


def spread(t: Tensor, margin: int) -> tuple[Tensor, int]:
    """The same rows, their distance, and NaNs between."""
    memory = torch.full((len(t), t.shape[1] + margin), torch.nan).to(t.dtype)
    memory[:, margin:] = t
    return memory.flatten()[margin:], memory.shape[1]


@dataclass
class Codes:
    """Codes of so many tokens over a matrix of whole numbers."""

    tokens: int
    k: int
    width: int
    columns: int
    dtype: torch.dtype
    margin: int = MARGIN

    def __post_init__(self) -> None:
        self.indices = torch.randint(0, self.width, (self.tokens, self.k))
        if self.width % 2:
            self.indices = self.indices.int()
        self.values = integers(self.tokens, self.k, limit=2, dtype=self.dtype)
        self.matrix = integers(self.width, self.columns, limit=2, dtype=self.dtype)
        self.bias = integers(self.columns, limit=2, dtype=self.dtype)
        self.dy = integers(self.tokens, self.columns, limit=2, dtype=self.dtype)

    def sizes(self) -> list[int]:
        return [self.tokens, self.k, int(self.indices.dtype == torch.int64)]

    def sums(self, kernels: KernelLibrary, together: bool = False) -> Tensor:
        rows, stride = spread(self.matrix, self.margin)
        out = self.matrix.new_full((self.tokens, self.columns), 77)
        kernels.call(
            "sum_bags",
            DTYPE_CODES[self.dtype],
            [*self.sizes(), self.tokens, self.columns, self.width, stride, int(together)],
            *(self.indices, self.values, 0, 0, rows, self.bias, out),
        )
        return out

    def sums_by_row(self, kernels: KernelLibrary) -> Tensor:
        sorted_rows, order = self.indices.flatten().sort(stable=True)
        begins = torch.searchsorted(
            sorted_rows, torch.arange(self.width + 1, dtype=sorted_rows.dtype)
        )
        rows, stride = spread(self.dy, self.margin)
        out = self.matrix.new_full((self.width, self.columns), 77)
        kernels.call(
            "sum_bags",
            DTYPE_CODES[self.dtype],
            [*self.sizes(), self.width, self.columns, self.tokens, stride, 0],
            *(self.indices, self.values, begins, order, rows, 0, out),
        )
        return out

    def dots(self, kernels: KernelLibrary) -> Tensor:
        (dy, dy_stride), (rows, stride) = (spread(t, self.margin) for t in (self.dy, self.matrix))
        out = self.matrix.new_full((self.tokens, self.k), 77)
        kernels.call(
            "dot_rows",
            DTYPE_CODES[self.dtype],
            [*self.sizes(), self.columns, dy_stride, self.width, stride],
            *(self.indices, dy, rows, out),
        )
        return out

    def check(self, kernels: KernelLibrary, together: bool = False) -> None:
        values, matrix, dy = self.values.double(), self.matrix.double(), self.dy.double()
        wanted = reference.topk_decode(values, self.indices, matrix, self.bias.double())
        assert torch.equal(self.sums(kernels, together), wanted.to(self.dtype)), self
        dense = torch.zeros(self.tokens, self.width, dtype=torch.float64)
        dense.scatter_add_(1, self.indices.long(), values)
        assert torch.equal(self.sums_by_row(kernels), (dense.t() @ dy).to(self.dtype)), self
        wanted = torch.einsum("td,tjd->tj", dy, matrix[self.indices.long()])
        assert torch.equal(self.dots(kernels), wanted.to(self.dtype)), self


# tokens, k, width, columns
SHAPES = (
    (1, 1, 1, 1),
    (3, 33, 40, 264),  # pieces, a second slice that is nearly empty
    (5, 8, 7, 130),  # rows that are no whole pieces
    (9, 3, 2, 8),  # several bags a block, and lanes without a column
)


def test_matches_plain_torch(kernels: KernelLibrary, sanitizers: Sanitizers) -> None:
    for seed, dtype in enumerate(DTYPES[1:] if sanitizers.on else DTYPES):
        for shape in SHAPES:
            for schedule in ("late", "early")[: 1 if sanitizers.on else 2]:
                with kernels.schedule(schedule, seed):
                    Codes(*shape, dtype).check(kernels, together=schedule == "early")


@pytest.mark.parametrize("margin", [1, 3, 4])
def test_memory_of_any_alignment(kernels: KernelLibrary, margin: int) -> None:
    for dtype in DTYPES[1:]:
        Codes(3, 9, 6, 72, dtype, margin).check(kernels)


def test_long_bags_are_shared(kernels: KernelLibrary) -> None:
    """A bag of more pairs than a warp takes, among short and empty ones; and a sum is the same
    whatever runs beside it."""
    for seed, dtype in enumerate(DTYPES[:2]):
        codes = Codes(300, 4, 12, 40, dtype)
        codes.indices[:, :2] = 5
        codes.indices[codes.indices == 3] = 4
        codes.check(kernels)
        codes.values, codes.dy = (torch.randn(t.shape).to(dtype) for t in (codes.values, codes.dy))
        once = codes.sums_by_row(kernels)
        assert not once[3].any()
        for schedule in ("late", "early"):
            with kernels.schedule(schedule, seed + 1):
                assert torch.equal(codes.sums_by_row(kernels), once)
    Codes(2, 520, 30, 16, torch.float32).check(kernels)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_wild_indices_give_nan_and_stay_in_memory(
    kernels: KernelLibrary, dtype: torch.dtype
) -> None:
    codes = Codes(40, 5, 30, 40, dtype)
    clean = codes.sums(kernels), codes.dots(kernels)
    wild = torch.tensor([2**31, 2**63 - 1, -1, -(2**63), 30, 2**32 + 3])
    codes.indices[:6, 2] = wild
    for together in (False, True):
        y = codes.sums(kernels, together)
        assert y[:6].isnan().all()
        assert torch.equal(y[6:], clean[0][6:])
    dots = codes.dots(kernels)
    assert dots[:6, 2].isnan().all()
    dots[:6, 2] = clean[1][:6, 2]
    assert torch.equal(dots, clean[1])
