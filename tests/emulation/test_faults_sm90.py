"""Faults planted in the sample Hopper kernel, one at a time: each must be found."""

from __future__ import annotations

import pytest
from emulator import KernelFault, KernelLibrary
from sample_gemm import Gemm

STEPS = 6  # twice the stages


# Of seeds 0 to 9, how many show the fault at least.
@pytest.mark.parametrize(
    ("plant", "schedule", "seeds"),
    [
        ("let_go_before_wait", "late", 5),
        ("no_barrier_before_store", "late", 10),
        ("no_barrier_before_store", "early", 10),
    ],
)
def test_race_gives_wrong_numbers(
    samples_sm90: KernelLibrary, plant: str, schedule: str, seeds: int
) -> None:
    gemm = Gemm.of(64, 64, 128 * STEPS)
    found = sum(gemm.shows(samples_sm90, plant, schedule, seed) for seed in range(10))
    assert found >= seeds


@pytest.mark.parametrize(
    ("plant", "message"),
    [
        ("no_fence", "wgmma_sp: no wgmma_fence since the kernel began or last waited"),
        ("no_commit", "a wgmma that no wait covered before its thread ended"),
        ("read_before_wait", "lane 0 wrote to the registers of this wgmma before the wait for it"),
        ("no_wait_for_full", "deadlock|nobody waited for"),
        ("no_wait_for_empty", "deadlock"),
        ("too_many_bytes", r"deadlock: (.*\n)*.*phase 0 wants 0 of 1 arrivals and 16 bytes"),
        (
            "no_proxy_fence",
            r"tma_store_2d: reads shared memory at offset \d+, where a thread has stored something "
            "with no fence_proxy_async after it",
        ),
        ("unwaited_store", "a TMA store that no wait covered before its thread ended"),
        ("misplaced_tile", "tma_load_2d: shared memory offset 128 is not a multiple of 1024"),
        (
            "missing_warp",
            "wgmma number 3 .* differs from another warp's|was not executed by warp 2",
        ),
    ],
)
@pytest.mark.parametrize("schedule", ["late", "early"])
def test_fault_is_reported(
    samples_sm90: KernelLibrary, plant: str, message: str, schedule: str
) -> None:
    gemm = Gemm.of(64, 64, 128 * STEPS)
    with samples_sm90.schedule(schedule, 0), pytest.raises(KernelFault, match=message):
        gemm.run(samples_sm90, plant)
