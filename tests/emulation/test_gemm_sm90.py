"""The Hopper GEMM of csrc/sparse24/gemm_sm90.cu under every schedule, against float64 torch."""

from __future__ import annotations

import pytest
import torch
from cases import Oracle, sparse_24
from devices import SCHEDULES
from emulator import KernelFault, KernelLibrary
from sm90_gemm import ACTIVATIONS, DTYPES, TILES, WGMMA, Call, Quantized, check_whole_numbers

# (m, n, k): tails of every kind, and one to six records of 256 columns: 1030 and 1500 run through
# the pipelined loop twice and leave one and two records.
SHAPES = (
    (65, 16, 64),
    (100, 1, 1),
    (128, 128, 256),
    (200, 100, 8),
    (256, 130, 63),
    (300, 257, 65),
    (65, 100, 520),
    (128, 130, 1030),
    (100, 16, 1500),
    (520, 128, 300),
)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
@pytest.mark.parametrize("schedule", ["late", "early"])
def test_matches_dense(
    gemm_sm90: KernelLibrary, m: int, n: int, k: int, tile: tuple[int, int], schedule: str
) -> None:
    with gemm_sm90.schedule(schedule, m + n + k):
        check_whole_numbers(gemm_sm90, m, n, k, Call(tile))


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(("schedule", "seed"), SCHEDULES)
def test_a_block_goes_from_tile_to_tile(
    gemm_sm90: KernelLibrary, tile: tuple[int, int], schedule: str, seed: int
) -> None:
    # Steps that no number of stages divides, and a producer that runs ahead of the stores.
    for blocks, k in ((1, 65), (2, 600), (3, 200)):
        with gemm_sm90.schedule(schedule, seed):
            check_whole_numbers(gemm_sm90, 300, 264, k, Call(tile, blocks))


def test_passes_in_any_order(gemm_sm90: KernelLibrary) -> None:
    for seed in range(6):
        for schedule in ("late", "early"):
            with gemm_sm90.schedule(schedule, seed):
                tile = TILES[seed % len(TILES)]
                check_whole_numbers(gemm_sm90, 130, 136, 700, Call(tile, 1))


@pytest.mark.parametrize("tile", TILES)
def test_tiles_in_groups(gemm_sm90: KernelLibrary, tile: tuple[int, int]) -> None:
    # More tiles of x than a group of the order has, the last group narrower.
    check_whole_numbers(gemm_sm90, 10 * tile[1] - 3, tile[0] + 8, 16, Call(tile, 5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("tile", TILES)
def test_close_to_float64(
    gemm_sm90: KernelLibrary, dtype: torch.dtype, activation: str | None, tile: tuple[int, int]
) -> None:
    weight = sparse_24(130, 330, dtype)
    x, bias = torch.randn(140, 330).to(dtype), torch.randn(130).to(dtype)
    call = Call(tile, bias=bias, activation=activation)
    Oracle(x, weight, bias, activation).check(call.run(gemm_sm90, x, weight.values, weight.indices))


@pytest.mark.parametrize("n", [64, 65, 72])
@pytest.mark.parametrize("shift", [0, 1, 4])
def test_any_alignment_of_the_result(gemm_sm90: KernelLibrary, n: int, shift: int) -> None:
    check_whole_numbers(gemm_sm90, 70, n, 40, Call(shift=shift))


@pytest.mark.parametrize("k", [1, 60, 64, 100, 256, 257])
@pytest.mark.parametrize("tile", TILES)
def test_reads_no_x_between_rows(gemm_sm90: KernelLibrary, k: int, tile: tuple[int, int]) -> None:
    check_whole_numbers(gemm_sm90, 67, 48, k, Call(tile, gap=24))


def test_propagates_what_is_not_finite(gemm_sm90: KernelLibrary) -> None:
    weight = sparse_24(40, 300, torch.bfloat16)
    x = torch.randn(70, 300).bfloat16()
    x[3, 17], x[66, 299] = torch.inf, torch.nan
    Oracle(x, weight).check(Call().run(gemm_sm90, x, weight.values, weight.indices))


def test_refuses_other_tiles(gemm_sm90: KernelLibrary) -> None:
    with pytest.raises(KernelFault, match="no tiles of 64 x 96"):
        check_whole_numbers(gemm_sm90, 65, 16, 16, Call((64, 96)))


@pytest.mark.parametrize(
    ("m", "stride", "message"),
    [
        (1 << 31, 64, "2147483648 rows of x by a weight"),
        # CUDA's manual wants each stride of a tensor map as long as what it steps over.
        (70, 0, "a stride of 0 bytes, less than the 128 of dimension 0"),
        (70, 56, "a stride of 112 bytes, less than the 128 of dimension 0"),
    ],
)
def test_refuses_before_it_reads(
    gemm_sm90: KernelLibrary, m: int, stride: int, message: str
) -> None:
    n, k, bfloat16 = 16, 64, DTYPES[torch.bfloat16]
    x = torch.zeros(16, dtype=torch.bfloat16)  # smaller than what the call speaks of
    settings = [bfloat16, bfloat16, 0, m, n, k, stride, *TILES[0], 0, WGMMA]
    with pytest.raises(KernelFault, match=message):
        gemm_sm90.call("gemm_sm90", x.clone(), x, *[torch.zeros(4)] * 6, settings, [False] * 3)


def test_refuses_scales_of_16_bit_types(gemm_sm90: KernelLibrary) -> None:
    with pytest.raises(KernelFault, match="scales with bfloat16"):
        check_whole_numbers(gemm_sm90, 65, 16, 16, Call(row_scales=torch.ones(16)))


# ---- 8-bit types --------------------------------------------------------------------------------


# One to five records of two steps: the pipelined loop runs from three on.
SHAPES_8BIT = ((65, 16, 128), (130, 100, 1), (70, 130, 257), (260, 40, 640), (66, 16, 1100))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES_8BIT)
def test_8_bit_types(
    gemm_sm90: KernelLibrary, m: int, n: int, k: int, tile: tuple[int, int], dtype: torch.dtype
) -> None:
    for seed, schedule in enumerate(("late", "early")):
        with gemm_sm90.schedule(schedule, seed):
            call = Call(tile, blocks=2, gap=16, out_dtype=torch.float32)
            quantized = Quantized.of(m, n, k, dtype, call)
            assert torch.equal(quantized.run(gemm_sm90), quantized.y.float())


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("tile", TILES)
def test_8_bit_types_with_scales(
    gemm_sm90: KernelLibrary, dtype: torch.dtype, out_dtype: torch.dtype, tile: tuple[int, int]
) -> None:
    m, n, k = 132, 72, 300
    call = Call(tile, blocks=1, bias=torch.randn(n).to(out_dtype), activation="silu")
    call.out_dtype = out_dtype
    call.x_scales, call.row_scales = torch.rand(m) / 100, torch.rand(n) / 10
    quantized = Quantized.of(m, n, k, dtype, call)
    half_ulp = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-22}
    torch.testing.assert_close(
        quantized.run(gemm_sm90).double(), quantized.y, rtol=half_ulp[out_dtype] * 1.01, atol=1e-5
    )


# ---- on a GPU -----------------------------------------------------------------------------------


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(("m", "n", "k"), [*SHAPES, (4099, 2056, 1416)])
def test_matches_dense_on_gpu(
    gpu_gemm_sm90: KernelLibrary, m: int, n: int, k: int, tile: tuple[int, int]
) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        for blocks in (0, 5, 132):
            call = Call(tile, blocks, gap=24, device="cuda")
            check_whole_numbers(gpu_gemm_sm90, m, n, k, call, dtype)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES_8BIT)
def test_8_bit_types_on_gpu(
    gpu_gemm_sm90: KernelLibrary, m: int, n: int, k: int, tile: tuple[int, int], dtype: torch.dtype
) -> None:
    call = Call(tile, blocks=2, gap=16, out_dtype=torch.float32, device="cuda")
    quantized = Quantized.of(m, n, k, dtype, call)
    assert torch.equal(quantized.run(gpu_gemm_sm90), quantized.y.float())
