"""A whole kernel under every schedule: cp.async, ldmatrix and mma.sp against float64 torch."""

from __future__ import annotations

import pytest
import torch
from conftest import SCHEDULES, Sanitizers
from emulator import KernelLibrary
from sample_gemm import Gemm

# (M, N, K): one step; the tails of both row tiles; more steps than stages; several blocks.
SHAPES = ((64, 64, 64), (5, 70, 128), (64, 64, 448), (130, 129, 192))


@pytest.mark.parametrize(("schedule", "seed"), SCHEDULES)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_matches_dense(
    samples: KernelLibrary, m: int, n: int, k: int, schedule: str, seed: int
) -> None:
    gemm = Gemm.of(m, n, k)
    with samples.schedule(schedule, seed):
        assert torch.equal(gemm.run(samples), gemm.expected)


@pytest.mark.parametrize("schedule", ["late", "early"])
def test_passes_in_any_order(samples: KernelLibrary, sanitizers: Sanitizers, schedule: str) -> None:
    gemm = Gemm.of(70, 66, 256)
    for seed in range(5 if sanitizers.on else 40):
        with samples.schedule(schedule, seed):
            assert torch.equal(gemm.run(samples), gemm.expected), seed


def test_sums_close_to_float64(samples: KernelLibrary) -> None:
    gemm = Gemm.of(64, 64, 256)
    gemm.x = torch.randn(64, 256).bfloat16()
    expected = gemm.x.double() @ gemm.weight.to_dense().double().t()
    torch.testing.assert_close(gemm.run(samples).double(), expected, rtol=1e-5, atol=1e-4)
