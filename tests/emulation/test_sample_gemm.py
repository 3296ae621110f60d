"""Whole kernels under every schedule, against float64 torch.

One has cp.async, ldmatrix and mma.sp, the other TMA, mbarriers and wgmma.sp.
"""

from __future__ import annotations

import pytest
import torch
from devices import SCHEDULES, Sanitizers
from emulator import KernelLibrary
from sample_gemm import Gemm

# (M, N, K): one step; the tails of both row tiles; more steps than stages; several blocks. N is a
# multiple of four for TMA to write rows of y.
SHAPES = ((64, 64, 128), (5, 68, 256), (64, 64, 896), (130, 132, 384))


@pytest.mark.parametrize(("schedule", "seed"), SCHEDULES)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_matches_dense(
    sample: KernelLibrary, m: int, n: int, k: int, schedule: str, seed: int
) -> None:
    gemm = Gemm.of(m, n, k)
    with sample.schedule(schedule, seed):
        assert torch.equal(gemm.run(sample), gemm.expected)


@pytest.mark.parametrize("schedule", ["late", "early"])
def test_passes_in_any_order(sample: KernelLibrary, sanitizers: Sanitizers, schedule: str) -> None:
    gemm = Gemm.of(70, 72, 640)
    for seed in range(3 if sanitizers.on else 20):
        with sample.schedule(schedule, seed):
            assert torch.equal(gemm.run(sample), gemm.expected), seed


def test_sums_close_to_float64(sample: KernelLibrary) -> None:
    gemm = Gemm.of(64, 64, 256)
    gemm.x = torch.randn(64, 256).bfloat16()
    expected = gemm.x.double() @ gemm.weight.to_dense().double().t()
    torch.testing.assert_close(gemm.run(sample).double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
@pytest.mark.parametrize("library", ["gpu_samples", "gpu_samples_sm90"])
def test_matches_dense_on_gpu(
    request: pytest.FixtureRequest, library: str, m: int, n: int, k: int
) -> None:
    built = request.getfixturevalue(library)
    gemm = Gemm.of(m, n, k).cuda()
    assert torch.equal(gemm.run(built), gemm.expected)
