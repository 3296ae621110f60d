"""Which kernel a GPU gets, and how a product is cut up for it: a pure function, so no GPU here."""

from __future__ import annotations

import random
from typing import Any

import pytest
from gossamer import _C

A100 = {"capability": 80, "multiprocessors": 108, "shared_bytes": 166912, "l2_bytes": 40 << 20}
RTX4090 = {"capability": 89, "multiprocessors": 128, "shared_bytes": 101376, "l2_bytes": 72 << 20}
H200 = {"capability": 90, "multiprocessors": 132, "shared_bytes": 232448, "l2_bytes": 60 << 20}
B200 = {"capability": 100, "multiprocessors": 148, "shared_bytes": 232448, "l2_bytes": 126 << 20}
DEVICES = {"A100": A100, "RTX 4090": RTX4090, "H200": H200, "B200": B200}
# Linear layers of Llama-3-8B and 70B.
WEIGHTS = [(1024, 4096), (4096, 4096), (14336, 4096), (4096, 14336), (28672, 8192), (8192, 28672)]
ROWS = [1, 2, 4, 8, 16, 32, 64, 65, 128, 256, 512, 1024, 2048, 4096, 8192]


def choose(m: int, n: int, k: int, dtype: str, device: dict[str, int]) -> dict[str, Any]:
    chosen: dict[str, Any] = _C.sparse24_choose_cuda(m, n, k, dtype, device)
    return chosen


@pytest.mark.parametrize(
    ("m", "n", "dtype", "device", "kernel", "target"),
    [
        (1, 4096, "bfloat16", "A100", "decode", "sm_80"),
        (1, 14336, "float16", "H200", "decode", "sm_80"),
        (64, 14336, "float16", "H200", "stream", "sm_90"),
        (128, 4096, "bfloat16", "H200", "stream", "sm_90"),  # 32 tiles of 128 x 128
        (128, 4096, "bfloat16", "A100", "decode", "sm_80"),
        (256, 1024, "int8", "A100", "decode", "sm_80"),
        (257, 1024, "bfloat16", "A100", "prefill", "sm_80"),
        (65, 14336, "bfloat16", "A100", "prefill", "sm_80"),
        (65, 14336, "bfloat16", "RTX 4090", "prefill", "sm_80"),
        (512, 14336, "bfloat16", "H200", "wgmma", "sm_90"),
        (4096, 4096, "float16", "H200", "wgmma", "sm_90"),
        (4096, 4096, "float16", "B200", "prefill", "sm_80"),
        (1, 4096, "float32", "H200", "float32", "sm_80"),
        (4096, 4096, "float32", "A100", "float32", "sm_80"),
        (1, 14336, "int8", "A100", "decode", "sm_80"),
        (65, 14336, "int8", "B200", "prefill", "sm_80"),
        (1024, 14336, "int8", "H200", "wgmma", "sm_90"),
        (1, 14336, "float8_e4m3fn", "RTX 4090", "decode", "sm_80"),
        (65, 14336, "float8_e4m3fn", "RTX 4090", "prefill", "sm_80"),
        (1, 14336, "float8_e4m3fn", "H200", "stream", "sm_90"),
        (1024, 14336, "float8_e4m3fn", "H200", "wgmma", "sm_90"),
        (1, 14336, "uint8", "H200", "decode", "sm_80"),
        (64, 14336, "uint8", "H200", "stream", "sm_90"),
        (2048, 14336, "uint8", "H200", "stream", "sm_90"),
        (64, 14336, "uint8", "A100", "decode", "sm_80"),
    ],
)
def test_kernel(m: int, n: int, dtype: str, device: str, kernel: str, target: str) -> None:
    chosen = choose(m, n, 4096, dtype, DEVICES[device])
    assert (chosen["kernel"], chosen["target"]) == (kernel, target)
    assert chosen["why"]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_blocks_fill_the_gpu(dtype: str, device: str) -> None:
    multiprocessors = DEVICES[device]["multiprocessors"]
    for n, k in WEIGHTS:
        for m in ROWS:
            chosen = choose(m, n, k, dtype, DEVICES[device])
            tiles = -(-n // chosen["tile_n"]) * -(-m // chosen["tile_m"])
            blocks = tiles * chosen["split_k"]
            rounds = -(-blocks // multiprocessors)
            # Of many rounds the last may be anything; one of few should not be nearly empty. Half
            # the GPU may idle over a small weight, where to share tiles would take longer.
            if chosen["kernel"] in ("decode", "float32"):
                assert blocks / (rounds * multiprocessors) > 0.4, (m, n, k, chosen)
            assert chosen["workspace_bytes"] <= 64 << 20, (m, n, k, chosen)
            if chosen["kernel"] == "stream":
                assert 0 < chosen["blocks"] <= max(tiles, multiprocessors)
                assert (chosen["workspace_bytes"] > 0) == (tiles % chosen["blocks"] > 0)
            else:
                assert (chosen["workspace_bytes"] > 0) == (chosen["split_k"] > 1)
            if chosen["workspace_bytes"] > 0:
                assert tiles <= _C.cuda_counters


def test_hopper_cuts_up_what_leaves_multiprocessors_idle() -> None:
    def chosen(m: int, n: int, k: int = 4096) -> tuple[str, int, int]:
        found = choose(m, n, k, "bfloat16", H200)
        return found["kernel"], found["tile_n"], found["tile_m"]

    assert chosen(8192, 14336) == ("wgmma", 128, 256)  # many rounds: the tile that reads least
    assert chosen(300, 4096)[0] == "stream"
    # The fastest of all ways on an H200: a tile for every multiprocessor, and weights shared.
    assert chosen(128, 4096) == ("stream", 128, 32)
    assert chosen(128, 4096, 14336) == ("stream", 128, 64)
    assert chosen(64, 28672) == ("stream", 128, 64)


@pytest.mark.parametrize("size", [1, 1 << 40])
def test_extreme_sizes(size: int) -> None:
    for dtype in ("float32", "bfloat16"):
        assert choose(size, 1, 1, dtype, H200)["split_k"] == 1
        assert choose(1, 57344, 65536, dtype, H200)["kernel"] in ("decode", "float32", "stream")


def test_every_product_has_a_way() -> None:
    generator = random.Random(0)
    for dtype in ("bfloat16", "float8_e4m3fn", "int8", "uint8"):
        for _ in range(500):
            m, n, k = (int(2 ** generator.uniform(0, most)) for most in (18, 18, 17))
            chosen = choose(m, n, k, dtype, H200)
            tiles = -(-n // chosen["tile_n"]) * -(-m // chosen["tile_m"])
            assert chosen["workspace_bytes"] <= 64 << 20, (m, n, k, chosen)
            if chosen["workspace_bytes"] > 0:
                assert tiles <= _C.cuda_counters, (m, n, k, chosen)


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match=r"compute capability 7\.5, the kernels need 8\.0"):
        choose(1, 16, 16, "bfloat16", {**A100, "capability": 75})
    with pytest.raises(ValueError, match="m is 0"):
        choose(0, 16, 16, "bfloat16", A100)
    with pytest.raises(TypeError, match="float64"):
        choose(1, 16, 16, "float64", A100)
    for device, has in ((A100, r"8\.0"), (B200, r"10\.0")):
        with pytest.raises(ValueError, match=rf"{has} has no .*float8_e4m3fn.*has those of int8"):
            choose(1, 16, 16, "float8_e4m3fn", device)
