"""The kernels, and the faults of the samples, again, compiled with AddressSanitizer and UBSan.

The sanitizers have to be in a process from its start, so this is a pytest of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from devices import Sanitizers
from emulator import HERE, Emulator

# Those that go to the ends of memory in all ways; right results are for the others to show.
TESTS = (
    "test_faults.py",
    "test_sample_gemm.py",
    "test_clusters.py::test_passes_in_any_order",
    "test_clusters.py::test_race_gives_wrong_numbers",
    "test_clusters.py::test_fault_is_reported",
    "test_pack_cuda.py::test_dense_and_back",
    "test_pack_cuda.py::test_at_any_alignment",
    "test_pack_cuda.py::test_counts_what_does_not_fit",
    "test_pack_cuda.py::test_hostile_indices_stay_inside",
    "test_pack_cuda.py::test_panels_at_any_alignment",
    "test_pack_cuda.py::test_hostile_indices_in_panels",
    "test_gemm_float32.py::test_matches_reference",
    "test_gemm_float32.py::test_more_columns_than_are_staged",
    "test_gemm_float32.py::test_hostile_indices_stay_inside",
    "test_gemm_sm80.py::test_decode_matches_dense_however_it_is_cut",
    "test_gemm_sm80.py::test_several_tiles_meet_in_the_workspace",
    "test_gemm_sm80.py::test_bias_scales_and_activation",
    "test_gemm_sm80.py::test_prefill_passes_in_any_order",
    "test_gemm_sm80.py::test_writes_rows_of_any_alignment",
    "test_gemm_int4.py::test_matches_reference",
    "test_gemm_sm90.py::test_any_alignment_of_the_result",
    "test_gemm_sm90.py::test_reads_no_x_between_rows",
    "test_sparse24_conv_cuda.py::test_tiles_match_dense",
    *(
        f"test_sparse24_conv_cuda.py::test_hopper_tiles_match_dense[{name}]"
        for name in ("outputs without alignment", "far beyond x", "images in depth")
    ),
    "test_blocksparse_conv_cuda.py::test_any_convolution_matches_dense",
    *(
        f"test_blocksparse_conv_cuda.py::test_hopper_tiles_match_dense[{name}]"
        for name in ("rows of 64", "groups that end in a block", "few channels")
    ),
    "test_blocksparse_conv_cuda.py::test_memory_of_any_alignment",
    "test_blocksparse_conv_cuda.py::test_indices_that_nobody_checked_stay_in_memory",
    "test_blocksparse_conv_cuda.py::test_conversions_are_those_of_the_cpu",
    "test_grouped_cuda.py::test_matches_plain_torch",
    "test_grouped_cuda.py::test_memory_of_any_alignment",
    "test_grouped_cuda.py::test_offsets_that_nobody_checked_stay_in_memory",
    "test_voxel_conv_cuda.py::test_matches_plain_torch",
    "test_voxel_maps_cuda.py::test_pairs_are_those_of_the_cpu",
    "test_voxel_maps_cuda.py::test_coordinates_at_the_border_of_int32",
    "test_voxel_maps_cuda.py::test_voxels_are_those_of_the_cpu",
    "test_voxel_maps_cuda.py::test_layouts_are_those_of_plain_torch",
    "test_voxel_maps_cuda.py::test_layouts_of_maps_that_nobody_checked",
    "test_voxel_conv_cuda.py::test_gradient_matches_plain_torch",
    "test_voxel_conv_cuda.py::test_memory_of_any_alignment",
    "test_voxel_conv_cuda.py::test_tables_that_nobody_checked_stay_in_memory",
    "test_voxel_pool_cuda.py::test_is_that_of_the_cpu[torch.bfloat16]",
    "test_voxel_pool_cuda.py::test_lists_that_nobody_checked_stay_in_memory",
    "test_actsparse_cuda.py::test_matches_plain_torch",
    "test_actsparse_cuda.py::test_memory_of_any_alignment",
    "test_actsparse_cuda.py::test_spikes",
    "test_actsparse_cuda.py::test_wanted_outputs",
    "test_topk_cuda.py",
)


def runtime_library(name: str) -> str:
    command = [str(Emulator.compiler()), f"-print-file-name={name}"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_under_sanitizers(sanitizers: Sanitizers, tmp_path: Path) -> None:
    if sanitizers.on or Emulator.compiler() is None:
        pytest.skip("already under sanitizers" if sanitizers.on else "no g++")
    # libstdc++ too: AddressSanitizer wants to find __cxa_throw when it starts.
    preloaded = [runtime_library(name) for name in ("libasan.so", "libubsan.so", "libstdc++.so")]
    if not all(Path(library).is_absolute() for library in preloaded):
        pytest.skip("g++ comes without its sanitizers")
    log = tmp_path / "log"
    options = f"log_path={log}:print_stacktrace=1:halt_on_error=0:suppress_equal_pcs=0"
    pytest_alone = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*pytest_alone, f"--sanitize={log}", "-k", "not gpu", *(str(HERE / t) for t in TESTS)],
        capture_output=True,
        text=True,
        timeout=1800,
        cwd=HERE.parents[1],
        env={
            **os.environ,
            "LD_PRELOAD": " ".join(preloaded),
            "ASAN_OPTIONS": f"{options}:detect_leaks=0",
            "UBSAN_OPTIONS": options,
        },
    )
    assert done.returncode == 0, done.stdout + done.stderr
    # Some of them are for this run only: that none is skipped shows that it was one.
    assert " skipped" not in done.stdout.splitlines()[-1], done.stdout
