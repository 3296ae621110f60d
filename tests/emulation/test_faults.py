"""Faults planted in the sample kernel, one at a time: each must be found, and said where."""

from __future__ import annotations

import contextlib
import re

import pytest
import torch
from devices import Sanitizers
from emulator import KernelFault, KernelLibrary
from sample_gemm import SAMPLE_GEMM, Gemm, line_of

# Each fault needs as many steps as there are stages, and one more.
STEPS = 4


# What only shows in the numbers: poison is -2.7e7, far more than any rounding; where the data of an
# older step are read instead, the results differ by whole numbers. Of seeds 0 to 9, how many show
# the fault at least: in the other schedule, copies that are never late hide a lax wait.
@pytest.mark.parametrize(
    ("plant", "schedule", "seeds"),
    [
        ("no_barrier_after_wait", "late", 8),
        ("no_barrier_after_wait", "early", 10),
        ("no_barrier_at_loop_end", "late", 5),
        ("no_barrier_at_loop_end", "early", 10),
        ("lax_wait", "late", 10),
        ("read_before_wait", "late", 10),
    ],
)
def test_race_gives_wrong_numbers(
    samples: KernelLibrary, plant: str, schedule: str, seeds: int
) -> None:
    gemm = Gemm.of(64, 64, 64 * STEPS)
    found = sum(gemm.shows(samples, plant, schedule, seed) for seed in range(10))
    assert found >= seeds


@pytest.mark.parametrize(
    ("plant", "message"),
    [
        ("no_commit", r"metadata of lane|never committed nor waited for"),
        (
            "divergent_warp",
            r"__shfl_xor_sync .*meets __ballot_sync|__ballot_sync .*meets __shfl_xor",
        ),
        ("skipped_barrier", "deadlock: no thread can go on|metadata of lane"),
        ("early_return", "deadlock: no thread can go on"),
        (
            "illegal_metadata",
            r"mma_sp_m16n8k32: metadata of lane 5, bits 4 to 7 are 0x0: the two columns must be in "
            "increasing order",
        ),
        ("misaligned_matrix", r"ldmatrix: shared memory offset \d+ is not a multiple of 16"),
        ("matrix_past_tile", "ldmatrix: 16 bytes at offset .* past the end of the shared tile"),
        ("unwaited_copy", "a cp.async that no wait covered before its thread ended"),
        ("partial_warp", "needs all 32 lanes, and the block's last warp has fewer"),
        ("narrow_mask", r"__shfl_sync: lane \d reads lane 9, which the mask leaves out"),
        ("shared_write_past_tile", "wrote past the end of the shared tile .*byte 3 after it"),
    ],
)
@pytest.mark.parametrize("schedule", ["late", "early"])
def test_fault_is_reported(
    samples: KernelLibrary, sanitizers: Sanitizers, plant: str, message: str, schedule: str
) -> None:
    gemm = Gemm.of(64, 64, 64 * STEPS)
    with samples.schedule(schedule, 1), pytest.raises(KernelFault, match=message):
        gemm.run(samples, plant)
    sanitizers.take()  # where they are on, they see the write past the tile first


def test_fault_names_block_thread_and_line(samples: KernelLibrary) -> None:
    with pytest.raises(KernelFault) as caught:
        Gemm.of(65, 64, 64).run(samples, "misaligned_matrix")
    line = line_of(SAMPLE_GEMM, "ptx::ldmatrix(w[i][half]")
    thread = r"block \(0, \d, 0\) thread \(\d+, 0, 0\) \(warp \d+ lane \d+\)"
    assert re.match(rf"{thread} at sparse24_gemm.cu:{line}: ldmatrix", str(caught.value))


def test_mismatch_names_both_lines(samples: KernelLibrary) -> None:
    with pytest.raises(KernelFault) as caught:
        Gemm.of(64, 64, 64).run(samples, "divergent_warp")
    for text in ("__ballot_sync(0xff", "__shfl_xor_sync(0xff"):
        assert f"sparse24_gemm.cu:{line_of(SAMPLE_GEMM, text)}" in str(caught.value)


def test_deadlock_says_where_every_thread_is(samples: KernelLibrary) -> None:
    with pytest.raises(KernelFault) as caught:
        Gemm.of(64, 64, 64).run(samples, "early_return")
    report = str(caught.value)
    first_barrier = line_of(SAMPLE_GEMM, "threadIdx.x / 32 != 1)) {") + 1
    for warp in (0, 1, 2):
        assert (
            f"warp {warp}: all lanes: __syncthreads at sparse24_gemm.cu:{first_barrier}" in report
        )
    assert "warp 3: all lanes: returned" in report
    assert "barrier 0: 96 of 128 threads are there" in report


def test_next_launch_is_clean_after_a_fault(samples: KernelLibrary) -> None:
    gemm = Gemm.of(64, 64, 128)
    for plant in ("skipped_barrier", "divergent_warp", "illegal_metadata"):
        with pytest.raises(KernelFault):
            gemm.run(samples, plant)
        assert torch.equal(gemm.run(samples), gemm.expected)


# What a read past the end of memory gives is only known to AddressSanitizer. Global memory ends
# where its allocation ends, shared memory where a tile ends.
@pytest.mark.parametrize(
    ("plant", "line"),
    [
        ("shared_read_past_tile", "indices[kStages * kTile * kIndexRow])"),
        ("shared_write_past_tile", "+ 3] = 7;"),
        ("global_read_past_tensor", "one += ptx::to_float(args.x[int64_t{args.m}"),
    ],
)
def test_overrun_is_reported(
    samples: KernelLibrary, sanitizers: Sanitizers, plant: str, line: str
) -> None:
    if not sanitizers.on:
        pytest.skip("for the run under sanitizers")
    # A write is found again at the end of the block.
    with contextlib.suppress(KernelFault):
        Gemm.of(64, 64, 128).run(samples, plant)
    assert re.search(
        rf"AddressSanitizer: .*\n(.*\n){{1,4}}.*sparse24_gemm.cu:{line_of(SAMPLE_GEMM, line)}",
        sanitizers.take(),
    )


def test_copy_past_tensor_is_reported(samples: KernelLibrary, sanitizers: Sanitizers) -> None:
    if not sanitizers.on:
        pytest.skip("for the run under sanitizers")
    with pytest.raises(KernelFault, match="cp_async16: reads out of bounds, byte 0 of its 16"):
        Gemm.of(40, 64, 128).run(samples, "copy_past_tensor")
