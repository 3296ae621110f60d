"""The Hopper GEMM of csrc/sparse24/gemm_sm90_stream.cuh under every schedule, against float64."""

from __future__ import annotations

import pytest
import torch
from cases import Oracle, sparse_24
from devices import SCHEDULES
from emulator import KernelLibrary
from sm90_gemm import ACTIVATIONS, STREAM, STREAM_TILES, Call, Quantized, check_whole_numbers


def call(tile_m: int, blocks: int, **fused: object) -> Call:
    return Call((128, tile_m), blocks, kernel=STREAM, **fused)  # type: ignore[arg-type]


# (m, n, k, blocks): tails of every kind; a tile of one block, of several, blocks with the end of a
# tile and the beginning of the next, and blocks in the middle of one.
SHAPES = (
    (1, 1, 1, 1),
    (9, 130, 300, 1),
    (16, 100, 1030, 3),
    (33, 257, 700, 4),
    (40, 300, 1300, 7),
    (70, 130, 2060, 16),
    (130, 264, 520, 5),
)


@pytest.mark.parametrize("tile_m", STREAM_TILES)
@pytest.mark.parametrize(("m", "n", "k", "blocks"), SHAPES)
@pytest.mark.parametrize("schedule", ["late", "early"])
def test_matches_dense(
    gemm_sm90: KernelLibrary, m: int, n: int, k: int, blocks: int, tile_m: int, schedule: str
) -> None:
    with gemm_sm90.schedule(schedule, m + n + k):
        check_whole_numbers(gemm_sm90, m, n, k, call(tile_m, blocks, gap=8))


@pytest.mark.parametrize(("schedule", "seed"), SCHEDULES)
def test_every_number_of_blocks(gemm_sm90: KernelLibrary, schedule: str, seed: int) -> None:
    # Six tiles of five records: more stages than the ring has, in blocks that begin anywhere.
    for blocks in (1, 2, 4, 7, 11, 29, 30):
        with gemm_sm90.schedule(schedule, seed):
            check_whole_numbers(gemm_sm90, 20, 300, 1200, call(16, blocks))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_close_to_float64(
    gemm_sm90: KernelLibrary, dtype: torch.dtype, activation: str | None
) -> None:
    weight = sparse_24(130, 1330, dtype)
    x, bias = torch.randn(37, 1330).to(dtype), torch.randn(130).to(dtype)
    for shift in (0, 1):
        fused = call(32, 5, bias=bias, activation=activation, shift=shift)
        found = fused.run(gemm_sm90, x, weight.values, weight.indices)
        Oracle(x, weight, bias, activation).check(found)


def test_the_order_of_sums_is_that_of_the_blocks(gemm_sm90: KernelLibrary) -> None:
    weight = sparse_24(128, 2000, torch.bfloat16)
    x = torch.randn(20, 2000).bfloat16()
    runs = []
    for seed in range(4):
        with gemm_sm90.schedule("late" if seed % 2 else "early", seed):
            runs.append(call(32, 5).run(gemm_sm90, x, weight.values, weight.indices))
    assert all(torch.equal(run, runs[0]) for run in runs)


def test_propagates_what_is_not_finite(gemm_sm90: KernelLibrary) -> None:
    weight = sparse_24(40, 600, torch.bfloat16)
    x = torch.randn(10, 600).bfloat16()
    x[3, 17], x[6, 599] = torch.inf, torch.nan
    found = call(16, 2).run(gemm_sm90, x, weight.values, weight.indices)
    Oracle(x, weight).check(found)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("tile_m", STREAM_TILES)
def test_8_bit_types(gemm_sm90: KernelLibrary, tile_m: int, dtype: torch.dtype) -> None:
    for m, n, k, blocks in ((1, 16, 128, 1), (35, 130, 1100, 3), (130, 200, 640, 5)):
        exact = call(tile_m, blocks, gap=16, out_dtype=torch.float32)
        quantized = Quantized.of(m, n, k, dtype, exact)
        assert torch.equal(quantized.run(gemm_sm90), quantized.y.float())


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_8_bit_types_with_scales(
    gemm_sm90: KernelLibrary, dtype: torch.dtype, out_dtype: torch.dtype
) -> None:
    m, n, k = 40, 72, 700
    scaled = call(32, 4, bias=torch.randn(n).to(out_dtype), activation="silu", out_dtype=out_dtype)
    scaled.x_scales, scaled.row_scales = torch.rand(m) / 100, torch.rand(n) / 10
    quantized = Quantized.of(m, n, k, dtype, scaled)
    half_ulp = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-22}
    torch.testing.assert_close(
        quantized.run(gemm_sm90).double(), quantized.y, rtol=half_ulp[out_dtype] * 1.01, atol=1e-5
    )


@pytest.mark.parametrize("tile_m", STREAM_TILES)
def test_matches_dense_on_gpu(gpu_gemm_sm90: KernelLibrary, tile_m: int) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        for m, n, k, blocks in (*SHAPES, (200, 2056, 4100, 132), (64, 700, 9000, 131)):
            on_gpu = call(tile_m, blocks, gap=24, device="cuda")
            check_whole_numbers(gpu_gemm_sm90, m, n, k, on_gpu, dtype)
