"""The kernels of k-sparse codes of a GPU, one by one, on whole numbers whose sums are exact."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from cases import integers
from devices import Sanitizers
from emulator import CSRC, HERE, Emulator, KernelLibrary
from fragment_gemm import DTYPE_CODES
from gossamer import reference
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MARGIN = 8  # elements before and between rows: 16 bytes of the smallest


@pytest.fixture(scope="module")
def kernels(emulator: Emulator) -> KernelLibrary:
    more = CSRC / "actsparse" / "topk_select_cuda.cu"
    return emulator.build(HERE / "kernels" / "topk.cu", more)


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


def check_selection(kernels: KernelLibrary, dense: Tensor, k: int, relu: bool) -> None:
    """Bit for bit a stable sort's, whatever lies around the row."""
    rows, width = dense.shape
    values, indices = dense.new_full((rows, k), 77), torch.full((rows, k), -1)
    operands = (DTYPE_CODES[dense.dtype], rows, width, k, dense, int(relu))
    kernels.call("select_largest", *operands, values, indices)
    wanted, order = dense.sort(dim=-1, descending=True, stable=True)
    assert torch.equal(indices, order[:, :k]), (dense.shape, k)
    wanted = wanted.relu() if relu else wanted
    torch.testing.assert_close(values, wanted[:, :k], rtol=0, atol=0, equal_nan=True)


def drawn(rows: int, width: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(rows, width).to(dtype)


def test_selection_is_a_stable_sort(kernels: KernelLibrary, sanitizers: Sanitizers) -> None:
    few = [(1, 1, 1), (2, 90, 90), (2, 1027, 7)]
    many = [(1, 2048, 1000), (2, 6000, 32), (1, 9001, 300), (1, 40000, 256)]
    for seed, dtype in enumerate(DTYPES[1:] if sanitizers.on else DTYPES):
        for rows, width, k in few if sanitizers.on else few + many:
            with kernels.schedule("early" if width % 2 else "late", seed):
                check_selection(kernels, drawn(rows, width, dtype), k, relu=k > 32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_selection_among_equal_and_special_entries(
    kernels: KernelLibrary, dtype: torch.dtype
) -> None:
    """Rows where more are as large as the bound than can be sorted are read digit by digit."""
    equal = torch.randint(-1, 2, (1, 9000)).to(dtype)
    equal[torch.rand_like(equal) < 0.2] = -0.0
    special = drawn(1, 5000, dtype)
    for entry in (torch.nan, torch.inf, -torch.inf, 1e-30):
        special[torch.rand_like(special) < 0.02] = entry
    rising = torch.arange(5003.0)[None].to(dtype)
    for dense, k in (
        (equal, 40),
        (equal[:, 3:8000].contiguous(), 1024),
        (special, 300),
        (torch.full_like(special, torch.nan), 5),
        (torch.full_like(special, -torch.inf), 5),
        (rising, 900),
        (-rising, 70),
    ):
        check_selection(kernels, dense, k, relu=k == 300)
