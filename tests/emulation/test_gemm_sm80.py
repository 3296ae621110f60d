"""The 2:4 GEMM kernels with portable instructions, and the choice between them."""

from __future__ import annotations

import pytest
import torch
from cases import Oracle, sparse_24
from devices import SCHEDULES, Sanitizers
from emulator import Emulator, KernelLibrary
from fragment_gemm import (
    DECODE,
    DTYPES,
    GEMM_SM80,
    PREFILL,
    Config,
    FragmentGemm,
    choose,
    with_poison,
)
from gossamer.formats import Sparse24
from torch import Tensor

FLOATS = (torch.bfloat16, torch.float16, torch.float32)

# (M, N, K), by what a kernel has to get right.
DECODE_SHAPES = (
    (1, 1, 1),  # nothing but padding
    (1, 100, 1030),  # one row of x, five records, a K tail within 16 bytes
    (2, 15, 4),
    (7, 17, 64),  # one row past a tile
    (8, 16, 256),  # tiles without padding, one record exactly
    (8, 130, 7),
    (9, 16, 255),  # one row past a tile of x
    (16, 257, 300),
    (17, 100, 257),
    (33, 128, 96),  # the largest tile of x
    (64, 257, 520),
    (64, 33, 1030),
)
PREFILL_SHAPES = (
    (65, 1, 1),
    (65, 128, 64),  # a single step
    (129, 15, 255),
    (65, 257, 520),  # more steps than stages; tails of both tiles
    (200, 100, 7),
    (129, 130, 300),
    (300, 17, 96),
    (65, 16, 1030),
)


@pytest.fixture(scope="module")
def kernels(emulator: Emulator) -> KernelLibrary:
    return emulator.build(GEMM_SM80)


def check_exact(actual: Tensor, expected: Tensor) -> None:
    """Every sum is exact, so the result is the true one, rounded once."""
    assert torch.equal(actual, expected.float().to(actual.dtype))


def schedules(sanitizers: Sanitizers) -> list[tuple[str, int]]:
    return SCHEDULES[::3] if sanitizers.on else SCHEDULES


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "n", "k"), DECODE_SHAPES)
def test_decode_matches_dense(
    kernels: KernelLibrary, sanitizers: Sanitizers, m: int, n: int, k: int, dtype: torch.dtype
) -> None:
    gemm = FragmentGemm.of(m, n, k, dtype)
    expected = gemm.expected()
    config = choose(kernels, m, n, k, dtype)[0]
    assert config.kernel == DECODE
    for schedule, seed in schedules(sanitizers):
        with kernels.schedule(schedule, seed):
            check_exact(gemm.run(kernels, config), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "n", "k"), [*DECODE_SHAPES, *PREFILL_SHAPES, (64, 4096, 4096)])
def test_matches_dense_on_gpu(
    gpu_gemm_sm80: KernelLibrary, m: int, n: int, k: int, dtype: torch.dtype
) -> None:
    if dtype == torch.float8_e4m3fn and torch.cuda.get_device_capability() == (9, 0):
        pytest.skip("mma.sp does not take float8_e4m3fn on sm_90")
    gemm = FragmentGemm.of(m, n, k, dtype).cuda()
    properties = torch.cuda.get_device_properties(0)
    device = (properties.multi_processor_count, properties.shared_memory_per_block_optin)
    config = choose(gpu_gemm_sm80, m, n, k, dtype, *device)[0]
    actual = gemm.run(gpu_gemm_sm80, config)
    check_exact(actual, gemm.expected())
    assert torch.equal(gemm.run(gpu_gemm_sm80, config), actual)


@pytest.mark.parametrize("warps_k", [1, 2, 4, 8])
@pytest.mark.parametrize("m", [3, 11, 25, 50])
def test_decode_matches_dense_however_it_is_cut(
    kernels: KernelLibrary, m: int, warps_k: int
) -> None:
    # 35 rows leave warps without rows, 11 records leave warps without a last record.
    for split_k, dtype in zip((1, 2, 5, 11), DTYPES, strict=True):
        n, k = 35, 256 * 10 + 30
        gemm = FragmentGemm.of(m, n, k, dtype)
        expected = gemm.expected()
        for schedule in ("late", "early"):
            with kernels.schedule(schedule, warps_k):
                config = Config.decode(m, warps_k, split_k)
                check_exact(gemm.run(kernels, config), expected)


@pytest.mark.parametrize("split_k", [2, 3])
def test_several_tiles_meet_in_the_workspace(kernels: KernelLibrary, split_k: int) -> None:
    gemm = FragmentGemm.of(5, 100, 800, torch.bfloat16)
    expected = gemm.expected()
    for seed in range(6):
        with kernels.schedule("early", seed):
            check_exact(gemm.run(kernels, Config.decode(5, 4, split_k)), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tile_m", [128, 256])
@pytest.mark.parametrize(("m", "n", "k"), PREFILL_SHAPES)
def test_prefill_matches_dense(
    kernels: KernelLibrary, m: int, n: int, k: int, tile_m: int, dtype: torch.dtype
) -> None:
    gemm = FragmentGemm.of(m, n, k, dtype)
    expected = gemm.expected()
    for schedule in ("late", "early"):
        with kernels.schedule(schedule, 0):
            check_exact(gemm.run(kernels, Config.prefill(tile_m)), expected)


def test_prefill_passes_in_any_order(kernels: KernelLibrary, sanitizers: Sanitizers) -> None:
    # 9 tiles of W are a patch and a bit.
    gemm = FragmentGemm.of(140, 1040, 330, torch.int8)
    expected = gemm.expected()
    for schedule, seed in schedules(sanitizers):
        with kernels.schedule(schedule, seed):
            check_exact(gemm.run(kernels, Config.prefill(128)), expected)


CUTS = (Config.decode(20, 2, 2), Config.decode(20, 8, 1), Config.prefill(128))


@pytest.mark.parametrize("config", CUTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", [None, "relu", "gelu", "silu"])
def test_bias_scales_and_activation(
    kernels: KernelLibrary, config: Config, dtype: torch.dtype, activation: str | None
) -> None:
    for out_dtype in (dtype,) if dtype.itemsize == 2 else FLOATS:
        gemm = FragmentGemm.of(20, 44, 300, dtype, out_dtype)
        gemm.activation = activation
        # Scaled down to where the activations bend.
        scale = 2.0**-6
        gemm.x_scales = (torch.ones(20) if gemm.x_scales is None else gemm.x_scales) * scale
        gemm.bias = torch.randint(-64, 65, (44,)).float().mul(scale).to(out_dtype)
        actual, expected = gemm.run(kernels, config), gemm.expected()
        if activation in (None, "relu"):
            check_exact(actual, expected)
        else:
            roundoff = torch.finfo(out_dtype).eps
            torch.testing.assert_close(actual.double(), expected, rtol=roundoff, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("config", CUTS, ids=str)
def test_sums_close_to_float64(kernels: KernelLibrary, config: Config, dtype: torch.dtype) -> None:
    weight = sparse_24(70, 1030, dtype)
    x, bias = torch.randn(20, 1030).to(dtype), torch.randn(70).to(dtype)
    gemm = FragmentGemm(with_poison(x), *portable(weight), bias, "silu", dtype)
    Oracle(x, weight, bias, "silu").check(gemm.run(kernels, config))


def portable(weight: Sparse24) -> tuple[Tensor, Tensor]:
    """The values and the nibbles of a weight, the last one of a row possibly without a group."""
    nibbles = torch.stack([weight.indices & 15, weight.indices >> 4], dim=-1).flatten(1)
    return weight.values, nibbles[:, : weight.values.shape[1] // 2]


@pytest.mark.parametrize("config", CUTS, ids=str)
def test_not_finite_goes_through_stored_positions_only(
    kernels: KernelLibrary, config: Config
) -> None:
    gemm = FragmentGemm.of(20, 40, 260, torch.bfloat16)
    gemm.x[3, 7], gemm.x[4, 8], gemm.x[19, 259] = torch.inf, -torch.inf, torch.nan
    gemm.values[5, :] = 0  # times an infinity: NaN where it is stored, 0 elsewhere
    actual, expected = gemm.run(kernels, config), gemm.expected()
    assert expected[:, 5].isnan().any()
    assert (expected[:, 5] == 0).any()
    assert expected.isinf().any()
    torch.testing.assert_close(actual, expected.bfloat16(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("config", CUTS, ids=str)
@pytest.mark.parametrize("out_offset", [1, 4, 8])
def test_writes_rows_of_any_alignment(
    kernels: KernelLibrary, config: Config, out_offset: int
) -> None:
    for n in (40, 41, 44):
        gemm = FragmentGemm.of(20, n, 40, torch.float16)
        check_exact(gemm.run(kernels, config, out_offset), gemm.expected())


def test_refuses_types_without_a_kernel(kernels: KernelLibrary) -> None:
    gemm = FragmentGemm.of(1, 16, 16, torch.bfloat16)
    gemm.x = gemm.x.float()
    with pytest.raises(RuntimeError, match="no tensor-core kernel for float32"):
        gemm.run(kernels, Config.decode(1, 1, 1))


# ---- the choice ---------------------------------------------------------------------------------


def busy(config: Config, n: int, multiprocessors: int = 132) -> float:
    """The share of the multiprocessors that have a block, at best."""
    return min(1.0, -(-n // config.tile_n) * config.split_k / multiprocessors)


DEVICES = ((132, 227 << 10), (108, 163 << 10), (84, 99 << 10), (1, 99 << 10))
SIZES = (1, 16, 33, 257, 1024, 4096, 14336, 57344)


@pytest.mark.parametrize(("multiprocessors", "shared_bytes"), DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8], ids=str)
def test_choice_is_legal(
    kernels: KernelLibrary, dtype: torch.dtype, multiprocessors: int, shared_bytes: int
) -> None:
    device = (multiprocessors, shared_bytes)
    for m in (1, 8, 9, 31, 64, 65, 300, 8192):
        for n in SIZES:
            for k in (*SIZES, 65536):
                shape = (m, n, k)
                config, workspace, shared = choose(kernels, m, n, k, dtype, *device)
                assert choose(kernels, m, n, k, dtype, *device)[0] == config
                assert shared <= shared_bytes, (shape, config)
                assert workspace <= 32 << 20, (shape, config)
                if config.kernel == PREFILL:
                    assert m > 64
                    assert config in (Config.prefill(128), Config.prefill(256))
                    continue
                assert config == Config.decode(min(m, 64), config.warps_k, config.split_k), shape
                assert config.split_k <= -(-k // 256), (shape, config)
                tiles_n, tiles_m = -(-n // config.tile_n), -(-m // config.tile_m)
                assert config.split_k == 1 or tiles_n * tiles_m <= 1024, (shape, config)
                expected = tiles_n * config.split_k * m * config.tile_n * 4
                assert workspace == (0 if config.split_k == 1 else expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("m", [1, 8, 16, 32, 64])
def test_choice_keeps_multiprocessors_busy(
    kernels: KernelLibrary, m: int, dtype: torch.dtype
) -> None:
    # Weights of at least 4 MB; all the blocks of few and of many rows, of little and of much depth.
    for n, k in ((1024, 8192), (4096, 4096), (4096, 14336), (6144, 4096), (28672, 4096)):
        assert busy(choose(kernels, m, n, k, dtype)[0], n) >= 0.7, (n, k)
    for n, k in ((16, 65536), (512, 65536), (57344, 8192)):
        assert busy(choose(kernels, m, n, k, dtype)[0], n) >= 0.84, (n, k)


@pytest.mark.parametrize("m", [65, 128, 129, 1000, 8192])
def test_choice_prefers_tiles_that_fill(kernels: KernelLibrary, m: int) -> None:
    # The smaller tile only where it ends sooner, counting it as a fifth dearer.
    for n in (128, 4096, 8192, 57344):
        config = choose(kernels, m, n, 4096, torch.bfloat16)[0]
        tile_m = config.tile_m
        if config.kernel == DECODE:  # the other tiles would leave most idle
            assert m <= 256
            assert 2 * -(-n // 128) * -(-m // 128) <= 132
            continue
        ends = {t: t * -(-(-(-n // 128) * -(-m // t)) // 132) for t in (128, 256)}
        assert tile_m == (128 if 1.2 * ends[128] < ends[256] else 256)
        assert choose(kernels, m, n, 4096, torch.bfloat16, 84, 99 << 10)[0].tile_m == 128
