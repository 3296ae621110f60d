"""Faults planted in the sample kernels, one at a time: each must be found, and said where."""

from __future__ import annotations

import contextlib
import re

import pytest
import torch
from devices import Sanitizers
from emulator import KernelFault, KernelLibrary
from sample_gemm import SAMPLE_GEMM, SAMPLE_GEMM_SM90, Gemm, line_of

# K, by the sample: each fault needs as many steps as there are stages, and one more; on Hopper
# twice the stages.
DEPTHS = {SAMPLE_GEMM: 64 * 4, SAMPLE_GEMM_SM90: 128 * 6}


# What only shows in the numbers: poison is -2.7e7, far more than any rounding; where the data of an
# older step are read instead, the results differ by whole numbers. Of seeds 0 to 9, how many show
# the fault at least: in the other schedule, copies that are never late hide a lax wait.
@pytest.mark.parametrize(
    ("sample", "plant", "schedule", "seeds"),
    [
        ("samples", "no_barrier_after_wait", "late", 8),
        ("samples", "no_barrier_after_wait", "early", 10),
        ("samples", "no_barrier_at_loop_end", "late", 5),
        ("samples", "no_barrier_at_loop_end", "early", 10),
        ("samples", "lax_wait", "late", 10),
        ("samples", "read_before_wait", "late", 10),
        ("samples_sm90", "let_go_before_wait", "late", 5),
        ("samples_sm90", "no_barrier_before_store", "late", 10),
        ("samples_sm90", "no_barrier_before_store", "early", 10),
    ],
    indirect=["sample"],
)
def test_race_gives_wrong_numbers(
    sample: KernelLibrary, plant: str, schedule: str, seeds: int
) -> None:
    gemm = Gemm.of(64, 64, DEPTHS[sample.source])
    found = sum(gemm.shows(sample, plant, schedule, seed) for seed in range(10))
    assert found >= seeds


REPORTS = {
    "samples": {
        "no_commit": r"metadata of lane|never committed nor waited for",
        "divergent_warp": r"__shfl_xor_sync .*meets __ballot_sync|__ballot_sync .*meets __shfl_xor",
        "skipped_barrier": "deadlock: no thread can go on|metadata of lane",
        "early_return": "deadlock: no thread can go on",
        "illegal_metadata": r"mma_sp_m16n8k32: metadata of lane 5, bits 4 to 7 are 0x0: the two "
        "columns must be in increasing order",
        "misaligned_matrix": r"ldmatrix: shared memory offset \d+ is not a multiple of 16",
        "matrix_past_tile": "ldmatrix: 16 bytes at offset .* past the end of the shared tile",
        "unwaited_copy": "a cp.async that no wait covered before its thread ended",
        "partial_warp": "needs all 32 lanes, and the block's last warp has fewer",
        "narrow_mask": r"__shfl_sync: lane \d reads lane 9, which the mask leaves out",
        "shared_write_past_tile": "wrote past the end of the shared tile .*byte 3 after it",
    },
    "samples_sm90": {
        "no_fence": "wgmma_sp: no wgmma_fence since the kernel began or last waited",
        "no_commit": "a wgmma that no wait covered before its thread ended",
        "read_before_wait": "lane 0 wrote to the registers of this wgmma before the wait for it",
        "no_wait_for_full": "deadlock|nobody waited for|more than the 1 arrivals of a phase",
        "no_wait_for_empty": "deadlock|more than the 1 arrivals of a phase",
        "too_many_bytes": r"deadlock: (.*\n)*.*phase 0 wants 0 of 1 arrivals and 16 bytes",
        "no_proxy_fence": r"tma_store_2d: reads shared memory at offset \d+, where a thread has "
        "stored something with no fence_proxy_async after it",
        "unwaited_store": "a TMA store that no wait covered before its thread ended",
        "misplaced_tile": "tma_load_2d: shared memory offset 128 is not a multiple of 1024",
        "missing_warp": "wgmma number 3 .* differs from another warp's|was not executed by warp 2",
    },
}


@pytest.mark.parametrize(
    ("sample", "plant", "message"),
    [(name, *fault) for name, faults in REPORTS.items() for fault in faults.items()],
    indirect=["sample"],
)
@pytest.mark.parametrize("schedule", ["late", "early"])
def test_fault_is_reported(
    sample: KernelLibrary, sanitizers: Sanitizers, plant: str, message: str, schedule: str
) -> None:
    gemm = Gemm.of(64, 64, DEPTHS[sample.source])
    with sample.schedule(schedule, 1), pytest.raises(KernelFault, match=message):
        gemm.run(sample, plant)
    if plant == "shared_write_past_tile":  # where they are on, they see it first
        sanitizers.take()


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
