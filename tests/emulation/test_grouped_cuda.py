"""The products of experts of a GPU, in float64's terms."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from cases import integers
from devices import SCHEDULES, Sanitizers
from emulator import CSRC, HERE, Emulator, KernelLibrary
from fragment_gemm import ACTIVATION_CODES, DTYPE_CODES
from gossamer import _C, reference
from gossamer.ops.grouped_cuda import grouped_choice
from grouped_cases import GroupedCase
from torch import Tensor
from voxel_conv import _after, _among_nans, _result, _whole

HALVES = (torch.bfloat16, torch.float16)
DTYPES = (*HALVES, torch.float32)
PRODUCTS = ("linear", "input", "weight")
TILES = ((128, 128), (64, 64))  # rows and columns of kMmaTiles, in its order
MARGIN = 8  # elements around rows, weights and results: 16 bytes of the smallest

# One for each mechanism. Features in eights are copied, the others go through registers.
CASES = {
    "copied": GroupedCase((9, 0, 40, 1), 72, 48),
    "several tiles both ways": GroupedCase((130, 3, 200), 136, 40),
    "experts that begin in every row of a tile": GroupedCase((63, 64, 65, 128, 127, 1), 8, 8),
    "none has a token": GroupedCase((0, 0, 0), 5, 7),
    "one of everything": GroupedCase((1,), 1, 1),
    "more experts than a warp has lanes": GroupedCase((3, 0, 1, 70) * 12, 16, 24),
    "features that end in a stage": GroupedCase((33, 17), 33, 17),
    "many features": GroupedCase((5, 0, 2), 9, 521),
    "many outputs": GroupedCase((5, 0, 2), 521, 9),
}


@dataclass
class Experts:
    """Products with their operands, of whole numbers, so that every sum is exact."""

    x: Tensor
    dy: Tensor
    weights: Tensor
    bias: Tensor | None
    offsets: Tensor
    activation: str | None = None

    @classmethod
    def of(cls, case: GroupedCase, dtype: torch.dtype, bias: bool = True) -> Experts:
        def numbers(*shape: int) -> Tensor:
            return integers(*shape, limit=3, dtype=dtype)

        tokens, experts = sum(case.counts), len(case.counts)
        rows = numbers(tokens, case.k), numbers(tokens, case.n)
        given = numbers(experts, case.n) if bias else None
        offsets = case.offsets.int() if case.n % 2 else case.offsets
        return cls(*rows, numbers(experts, case.n, case.k), given, offsets)

    def expected(self, product: str) -> Tensor:
        """In float64."""
        x, dy, weights = (t.double() for t in (self.x, self.dy, self.weights))
        if product == "linear":
            bias = None if self.bias is None else self.bias.double()
            return reference.grouped_linear(x, weights, self.offsets, bias, self.activation)
        if product == "input":
            return reference.grouped_linear(dy, weights.mT, self.offsets)
        begins = [0, *self.offsets.tolist()]
        each = [dy[b:e].t() @ x[b:e] for b, e in pairwise(begins)]
        return torch.stack(each)

    def run(
        self, library: KernelLibrary, product: str, tile: int = -1, margin: int = MARGIN
    ) -> Tensor:
        """The kernel's result. Around rows lie NaNs, around the result something that must stay."""
        experts, n, k = self.weights.shape
        dtype = self.x.dtype
        tokens, stride = _among_nans(margin, self.x if product == "linear" else self.dy)
        other, other_stride = _after(margin, self.weights), k
        if product == "weight":
            other, other_stride = _among_nans(margin, self.x)
        linear = product == "linear"
        shape = {
            "linear": (len(self.x), n), "input": (len(self.x), k), "weight": (experts, n, k)
        }[product]  # fmt: skip
        out, result = _result(margin, *shape, dtype=dtype)
        library.call(
            "product",
            *(DTYPE_CODES[dtype], PRODUCTS.index(product)),
            *([experts, len(self.x), n, k, stride, other_stride], self.offsets),
            *(int(self.offsets.dtype == torch.int64), tokens, other),
            0 if self.bias is None or not linear else self.bias,
            *(ACTIVATION_CODES[self.activation if linear else None], result, tile),
        )
        return _whole(margin, out, result)


@pytest.fixture(scope="module")
def kernels(emulator: Emulator) -> KernelLibrary:
    more = (CSRC / "grouped" / f"{name}.cu" for name in ("gemm_sm80", "gemm_fma"))
    return emulator.build(HERE / "kernels" / "grouped.cu", *more)


def check_exact(actual: Tensor, expected: Tensor) -> None:
    """Every sum is exact, so the result is the true one, rounded once."""
    assert torch.equal(actual, expected.to(actual.dtype))


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("name", CASES)
def test_matches_plain_torch(
    kernels: KernelLibrary, sanitizers: Sanitizers, name: str, product: str
) -> None:
    for seed, (dtype, tile) in enumerate(zip((*HALVES, DTYPES[2]), (0, 1, -1), strict=True)):
        if sanitizers.on and tile == 0:  # these differ in their sizes alone
            continue
        experts = Experts.of(CASES[name], dtype, bias=seed != 1)
        expected = experts.expected(product)
        for schedule in ("late", "early")[: 1 if sanitizers.on else 2]:
            with kernels.schedule(schedule, seed):
                check_exact(experts.run(kernels, product, tile), expected)


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_passes_in_any_order(kernels: KernelLibrary, dtype: torch.dtype, product: str) -> None:
    # More stages than there are in shared memory.
    experts = Experts.of(GroupedCase((66, 0, 200), 200, 232), dtype)
    expected = experts.expected(product)
    for schedule, seed in SCHEDULES[::3]:
        with kernels.schedule(schedule, seed):
            check_exact(experts.run(kernels, product, 1), expected)


@pytest.mark.parametrize("margin", [1, 3, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_memory_of_any_alignment(kernels: KernelLibrary, dtype: torch.dtype, margin: int) -> None:
    experts = Experts.of(GroupedCase((30, 0, 20), 24, 40), dtype)
    for product in PRODUCTS:
        check_exact(experts.run(kernels, product, margin=margin), experts.expected(product))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations(kernels: KernelLibrary, dtype: torch.dtype) -> None:
    roundoff = {torch.float32: 2.0**-21, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
    for activation in ("relu", "gelu", "silu"):
        experts = Experts.of(CASES["copied"], dtype)
        experts.x, experts.weights = experts.x / 16, experts.weights / 16
        experts.activation = activation
        y, expected = experts.run(kernels, "linear").double(), experts.expected("linear")
        torch.testing.assert_close(y, expected, rtol=roundoff[dtype], atol=2.0**-21)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_a_token_alone_decides_its_bits(kernels: KernelLibrary, dtype: torch.dtype) -> None:
    """Not the tile, nor the other tokens; a NaN stays where it is."""
    case = GroupedCase((70, 0, 130), 72, 100)
    experts = Experts.of(case, dtype)
    for name in ("x", "dy", "weights"):
        setattr(experts, name, torch.randn(getattr(experts, name).shape).to(dtype))
    for product in ("linear", "input"):
        y = experts.run(kernels, product)
        if dtype != torch.float32:
            assert all(torch.equal(experts.run(kernels, product, t), y) for t in (0, 1))
        kept = torch.arange(1, 200, 3)
        ends = torch.tensor([int((kept < e).sum()) for e in (70, 70, 200)])
        fewer = Experts(experts.x[kept], experts.dy[kept], experts.weights, experts.bias, ends)
        assert torch.equal(fewer.run(kernels, product), y[kept])
        fewer.x[5, 3] = fewer.dy[5, 3] = torch.nan
        others = torch.arange(len(kept)) != 5
        spoiled = fewer.run(kernels, product)
        assert torch.equal(spoiled[others], y[kept][others])
        assert not spoiled[5].isfinite().any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_offsets_that_nobody_checked_stay_in_memory(
    kernels: KernelLibrary, dtype: torch.dtype
) -> None:
    """What comes out is anything; that nothing else was read or written, the sanitizers say."""
    wild = torch.tensor([2**31 - 1, -(2**31), -7, 10**6, 0, 1000, 40])
    case = GroupedCase((9, 0, 70, 1, 60), 24, 40)
    for index in (torch.int32, torch.int64):
        for _ in range(4):
            experts = Experts.of(case, dtype)
            at = torch.randint(5, (3,))
            experts.offsets = experts.offsets.index_copy(
                0, at, wild[torch.randint(len(wild), (3,))].to(experts.offsets.dtype)
            ).to(index)
            for product in PRODUCTS:
                experts.run(kernels, product)


def test_rows_that_no_expert_has_stay(kernels: KernelLibrary) -> None:
    case = GroupedCase((9, 70, 60), 24, 40)
    experts = Experts.of(case, torch.bfloat16)
    expected = experts.expected("linear")
    experts.offsets = torch.tensor([9, 79, 100])
    y = experts.run(kernels, "linear")
    check_exact(y[:100], expected[:100])
    assert bool((y[100:] == 77).all())  # of before


# ---- the choice ---------------------------------------------------------------------------------

H200 = {"capability": 90, "multiprocessors": 132, "shared_bytes": 227 << 10, "l2_bytes": 50 << 20}
A100 = {**H200, "capability": 80, "multiprocessors": 108}


def choose(tokens: int, product: str = "linear", device: dict[str, int] = A100) -> str:
    """Of 64 experts of 1408 x 2048, in bfloat16."""
    shape = (64, 1408, 2048)
    chosen = grouped_choice(product, tokens, shape, torch.bfloat16, device)
    kernel: str = chosen["kernel"]
    if kernel == "mma":
        tile = chosen["tile_rows"], chosen["tile_columns"]
        across = -(-(1408 if product == "linear" else 2048) // tile[1])
        rows = 64 * (1408 // tile[0]) if product == "weight" else tokens // tile[0] + 64
        assert (tile in TILES, chosen["blocks"]) == (True, across * rows)
        kernel += str(tile[0])
    return kernel


def test_choice() -> None:
    assert [choose(64 * each) for each in (1, 64, 65, 1000)] == ["mma64"] * 2 + ["mma128"] * 2
    assert choose(64, "weight") == "mma128"
    # On Hopper torch's wgmma where a product is bound by its operations.
    assert choose(64 * 256, device=H200) == choose(64 * 256, "input", H200) == "grouped_mm"
    assert choose(64 * 255, device=H200) == choose(64 * 256, "weight", H200) == "mma128"
    odd = grouped_choice("linear", 10**5, (8, 1408, 2044), torch.bfloat16, H200)
    assert odd["kernel"] == "mma"
    # Few large tiles do not leave most multiprocessors idle.
    few = grouped_choice("linear", 1000, (2, 256, 64), torch.float16, H200)
    assert (few["tile_rows"], few["tile_columns"]) == (64, 64)
    exact = grouped_choice("linear", 10**5, (8, 64, 64), torch.float32, H200)
    assert (exact["kernel"], exact["tile_rows"], exact["tile_columns"]) == ("fma", 64, 64)
    with pytest.raises(ValueError, match=r"compute capability 7\.0"):
        grouped_choice("linear", 9, (1, 9, 9), torch.float16, {**A100, "capability": 70})
    with pytest.raises(TypeError, match="float64"):
        grouped_choice("linear", 9, (1, 9, 9), torch.float64, A100)
    with pytest.raises(ValueError, match="'forward' is unknown"):
        _C.grouped_choose_cuda("forward", "float32", 1, 9, 9, 9, A100)
