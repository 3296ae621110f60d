"""The GEMM kernel for int4 weights, and the choice of how to cut it up."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
import torch
from cases import integers, sparse_24
from devices import SCHEDULES, Sanitizers
from emulator import HERE, Emulator, KernelFault, KernelLibrary
from fragment_gemm import ACTIVATION_CODES, DTYPE_CODES, PAIRS, with_poison
from fragments import fragments_of_int4
from gossamer import reference
from torch import Tensor

KERNELS = HERE / "kernels" / "sparse24_gemm_int4.cu"
DTYPES = (torch.bfloat16, torch.float16)

# (M, N, K), by what the kernel has to get right.
SHAPES = (
    (1, 1, 1),  # nothing but padding
    (1, 100, 1030),  # one row of x, five records, a K tail within 16 bytes
    (2, 15, 4),
    (7, 17, 64),  # one row past a tile
    (8, 32, 256),  # the tiles of a warp without padding, one record exactly
    (8, 130, 7),
    (9, 16, 255),  # one row past a tile of x; no second tile of W
    (16, 257, 300),
    (17, 100, 257),
    (33, 128, 96),  # the largest tile of x
    (64, 257, 520),
    (64, 33, 1030),
    (65, 33, 300),  # two tiles of x, one row in the last
    (130, 17, 520),
)
GROUPS = (32, 64, 96, 128, 256)


@dataclass(frozen=True)
class Config:
    """A ``CudaGemmConfig`` of the decode kernel."""

    tile_n: int
    tile_m: int
    warps_k: int
    split_k: int

    @classmethod
    def of(cls, m: int, warps_k: int, split_k: int) -> Config:
        tile_m = next(tile for tile in (8, 16, 32, 64) if m <= tile or tile == 64)
        row_tiles = 3 if tile_m == 32 else 2
        return cls(16 * row_tiles * 8 // warps_k, tile_m, warps_k, split_k)


@dataclass
class Int4Gemm:
    """Operands of whole numbers and scales of powers of two, so that every sum is exact."""

    x: Tensor  # [m, k], rows further apart than k, with NaN after each and the last
    numbers: Tensor  # [n, 2G] int8
    indices: Tensor
    scales: Tensor  # [n, ceil(k / group)]
    group: int
    bias: Tensor | None = None
    activation: str | None = None
    counters: Tensor = field(default_factory=lambda: torch.zeros(4096, dtype=torch.int32))

    @classmethod
    def of(cls, m: int, n: int, k: int, group: int, dtype: torch.dtype) -> Int4Gemm:
        groups = -(-k // 4)
        nibbles = PAIRS[torch.randint(6, (n, groups + groups % 2))]
        nibbles[:, groups:] = 0
        indices = nibbles[:, 0::2] | nibbles[:, 1::2] << 4
        numbers = integers(n, 2 * groups, limit=7, dtype=torch.int8)
        numbers[reference.sparse24_columns(indices, k) >= k] = 0  # there is no such column
        x = with_poison(integers(m, k, limit=4, dtype=torch.float32).to(dtype))
        scales = 2.0 ** integers(n, -(-k // group), limit=2, dtype=torch.float32)
        return cls(x, numbers, indices, scales, group)

    def expected(self) -> Tensor:
        x, scales = self.x.double(), self.scales.double()
        bias = None if self.bias is None else self.bias.double()
        return reference.sparse24_linear_quantized(
            x, None, self.numbers, self.indices, scales, bias, x.shape[1], self.group,
            self.activation,
        )  # fmt: skip

    def run(self, library: KernelLibrary, config: Config, out_offset: int = 0) -> Tensor:
        """The kernel's result. Around it, and in the counters, nothing must have changed."""
        (m, k), n, dtype = self.x.shape, self.numbers.shape[0], self.x.dtype
        workspace = torch.full(
            (-(-n // config.tile_n) * config.split_k * m * config.tile_n,), torch.nan
        )
        out = torch.full((out_offset + m * n + 16,), 77.0, dtype=dtype)
        panels = fragments_of_int4(reference.pack_int4(self.numbers), self.indices, k)
        library.call(
            "gemm_int4",
            *(DTYPE_CODES[dtype], m, n, k, self.group, panels, self.x, self.x.stride(0)),
            *(0 if self.bias is None else self.bias, ACTIVATION_CODES[self.activation]),
            *(out[out_offset:], DTYPE_CODES[dtype], self.scales),
            [config.tile_n, config.tile_m, config.warps_k, config.split_k],
            *(workspace, self.counters),
        )
        assert not self.counters.any()
        y, around = out[out_offset:][: m * n], (out[:out_offset], out[out_offset + m * n :])
        assert all(bool((part == 77).all()) for part in around)
        return y.view(m, n)


def choose(
    library: KernelLibrary, m: int, n: int, k: int, device: tuple[int, int] = (132, 227 << 10)
) -> tuple[Config, int, int]:
    """What ``choose_cuda_gemm_config`` says, the bytes of its workspace and of shared memory."""
    chosen = torch.zeros(6, dtype=torch.int64)
    library.call("choose_int4", m, n, k, *device, chosen)
    tile_n, tile_m, warps_k, split_k, workspace, shared = chosen.tolist()
    return Config(tile_n, tile_m, warps_k, split_k), workspace, shared


@pytest.fixture(scope="module")
def kernels(emulator: Emulator) -> KernelLibrary:
    return emulator.build(KERNELS)


def check_exact(actual: Tensor, expected: Tensor) -> None:
    """Every sum is exact, so the result is the true one, rounded once."""
    assert torch.equal(actual, expected.float().to(actual.dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_matches_reference(
    kernels: KernelLibrary, sanitizers: Sanitizers, m: int, n: int, k: int, dtype: torch.dtype
) -> None:
    config = choose(kernels, m, n, k)[0]
    groups = (32, 128) if sanitizers.on else GROUPS
    for group in (*(g for g in groups if g < k), k):  # k: one scale a row
        gemm = Int4Gemm.of(m, n, k, group, dtype)
        expected = gemm.expected()
        chosen = SCHEDULES[::3] if sanitizers.on or group not in (32, 128) else SCHEDULES
        for schedule, seed in chosen:
            with kernels.schedule(schedule, seed):
                check_exact(gemm.run(kernels, config), expected)


# For more than 32 rows no GPU has the shared memory that eight warps along K would need.
CUTS = [(m, w) for m in (3, 11, 25, 50, 70) for w in (1, 2, 4, 8) if m <= 32 or w <= 4]


@pytest.mark.parametrize(("m", "warps_k"), CUTS)
def test_matches_reference_however_it_is_cut(kernels: KernelLibrary, m: int, warps_k: int) -> None:
    # 35 rows leave warps without rows, 11 records leave warps without a last record.
    for split_k, group in zip((1, 2, 5, 11), (128, 32, 160, 2590), strict=True):
        gemm = Int4Gemm.of(m, 35, 256 * 10 + 30, group, DTYPES[split_k % 2])
        expected = gemm.expected()
        for schedule in ("late", "early"):
            with kernels.schedule(schedule, warps_k):
                check_exact(gemm.run(kernels, Config.of(m, warps_k, split_k)), expected)


@pytest.mark.parametrize("m", [5, 100])
@pytest.mark.parametrize("split_k", [2, 3, 4])
def test_blocks_finish_in_any_order(kernels: KernelLibrary, split_k: int, m: int) -> None:
    gemm = Int4Gemm.of(m, 100, 800, 64, torch.bfloat16)
    expected = gemm.expected()
    for seed in range(6):
        with kernels.schedule("early", seed):
            check_exact(gemm.run(kernels, Config.of(m, 4, split_k)), expected)


@pytest.mark.parametrize("split_k", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", [None, "relu", "gelu", "silu"])
def test_bias_and_activation(
    kernels: KernelLibrary, split_k: int, dtype: torch.dtype, activation: str | None
) -> None:
    for group in (32, 128, 300):
        gemm = Int4Gemm.of(20, 44, 300, group, dtype)
        gemm.activation = activation
        gemm.scales *= 2.0**-6  # to where the activations bend
        gemm.bias = (torch.randint(-64, 65, (44,)) * 2.0**-6).to(dtype)
        actual, expected = gemm.run(kernels, Config.of(20, 2, split_k)), gemm.expected()
        if activation in (None, "relu"):
            check_exact(actual, expected)
        else:
            roundoff = torch.finfo(dtype).eps
            torch.testing.assert_close(actual.double(), expected, rtol=roundoff, atol=2e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", [32, 128, 1030])
def test_sums_close_to_float64(kernels: KernelLibrary, group: int, dtype: torch.dtype) -> None:
    m, n, k = 20, 70, 1030
    weight = sparse_24(n, k)
    numbers = integers(*weight.values.shape, limit=7, dtype=torch.int8)
    x = torch.randn(m, k).to(dtype)
    scales = torch.rand(n, -(-k // group)) + 0.1
    gemm = Int4Gemm(with_poison(x), numbers, weight.indices, scales, group)
    gemm.bias = torch.randn(n).to(dtype)
    actual, expected = gemm.run(kernels, Config.of(m, 2, 2)).double(), gemm.expected()
    # As cases.Oracle: the products are exact, each addition and each scale rounds its partial sum,
    # which |x| |W|ᵀ + |b| bounds, by 2^-24; independent ones add up by the root of their number.
    parts = Int4Gemm(x.abs(), numbers.abs(), weight.indices, scales, group, gemm.bias.abs())
    size = parts.expected()
    limit = (8 + math.sqrt(numbers.shape[1] + scales.shape[1])) * 2.0**-24 * size
    limit += torch.finfo(dtype).eps / 2 * expected.abs()
    assert bool(((actual - expected).abs() <= limit).all())


def test_every_number_is_widened_exactly(kernels: KernelLibrary) -> None:
    # Each slot of a step holds each number once: with an identity of x the result is the weight.
    n, k = 16, 256
    numbers = (torch.arange(n * k // 2) % 15 - 7).to(torch.int8).view(n, k // 2)
    numbers = numbers.roll(3, 1)
    indices = torch.full((n, k // 8), 0xE4, dtype=torch.uint8)  # columns 0, 1, then 2, 3
    for dtype in DTYPES:
        gemm = Int4Gemm(with_poison(torch.eye(k).to(dtype)), numbers, indices, torch.ones(n, 1), k)
        dense = reference.sparse24_to_dense(numbers.float(), indices, k)
        assert torch.equal(gemm.run(kernels, Config.of(k, 2, 1)).float(), dense.t())


@pytest.mark.parametrize("group", [32, 128, 260])
def test_not_finite_goes_through_stored_positions_only(kernels: KernelLibrary, group: int) -> None:
    gemm = Int4Gemm.of(20, 40, 260, group, torch.bfloat16)
    gemm.x[3, 7], gemm.x[4, 8], gemm.x[19, 259] = torch.inf, -torch.inf, torch.nan
    gemm.numbers[5, :] = 0  # times an infinity: NaN where it is stored, 0 elsewhere
    expected = gemm.expected()
    assert expected[:, 5].isnan().any()
    assert (expected[:, 5] == 0).any()
    assert expected.isinf().any()
    actual = gemm.run(kernels, Config.of(20, 2, 2))
    torch.testing.assert_close(actual, expected.bfloat16(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("out_offset", [1, 4, 8])
def test_writes_rows_of_any_alignment(kernels: KernelLibrary, out_offset: int) -> None:
    for m, n in ((20, 40), (20, 41), (70, 44)):
        gemm = Int4Gemm.of(m, n, 40, 32, torch.float16)
        check_exact(gemm.run(kernels, Config.of(m, 2, 1), out_offset), gemm.expected())


def test_refuses_what_it_has_no_kernel_for(kernels: KernelLibrary) -> None:
    gemm = Int4Gemm.of(1, 16, 64, 4, torch.bfloat16)
    with pytest.raises(KernelFault, match="a group of 4 columns is neither a multiple of 32"):
        gemm.run(kernels, Config.of(1, 1, 1))
    gemm = Int4Gemm.of(1, 16, 64, 64, torch.float32)
    with pytest.raises(
        KernelFault, match="int4 weights multiply bfloat16 or float16, x is float32"
    ):
        gemm.run(kernels, Config.of(1, 1, 1))


# ---- the choice ---------------------------------------------------------------------------------

DEVICES = ((132, 227 << 10), (108, 163 << 10), (84, 99 << 10), (1, 99 << 10))
SIZES = (1, 16, 33, 257, 1024, 4096, 14336, 57344)


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_choice_is_legal(kernels: KernelLibrary, device: tuple[int, int]) -> None:
    for m in (1, 8, 9, 31, 64, 65, 300, 8192):
        for n in SIZES:
            for k in (*SIZES, 65536):
                shape = (m, n, k)
                config, workspace, shared = choose(kernels, *shape, device)
                assert config == Config.of(m, config.warps_k, config.split_k), shape
                assert shared <= device[1], (shape, config)
                assert config.split_k <= -(-k // 256), (shape, config)
                tiles = -(-n // config.tile_n)
                blocks = tiles * -(-m // config.tile_m)
                assert config.split_k == 1 or blocks <= 4096, (shape, config)
                expected = tiles * config.split_k * m * config.tile_n * 4
                assert workspace == (0 if config.split_k == 1 else expected) <= 32 << 20, shape


@pytest.mark.parametrize("m", [1, 8, 16, 32, 64])
def test_choice_keeps_multiprocessors_busy(kernels: KernelLibrary, m: int) -> None:
    for n, k in ((1024, 8192), (4096, 4096), (4096, 14336), (6144, 4096), (28672, 4096)):
        config = choose(kernels, m, n, k)[0]
        blocks = -(-n // config.tile_n) * config.split_k
        # While the sums of blocks that share a tile would meet, a few read all of these.
        if m <= 16 and n * k <= 4096 * 4096 and config.split_k == 1:
            assert blocks >= 32, (n, k, config)
            continue
        # At 32 rows large tiles save reading x again, which is dear beside weights this small.
        assert min(1.0, blocks / 132) >= (0.55 if m == 32 else 0.7), (n, k, config)
