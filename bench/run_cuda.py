"""The bench on a GPU: what ``run.py --device cuda`` runs."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from time import perf_counter
from typing import TYPE_CHECKING, Any, TypeVar

import bench_actsparse_cuda
import bench_blocksparse_cuda
import bench_codes_cuda
import bench_grouped_cuda
import bench_pointcloud_cuda
import torch
from bench_actsparse_cuda import CudaActivePlan, active_table
from bench_blocksparse_cuda import CudaBlockPlan
from bench_codes_cuda import CudaCodePlan, code_table
from bench_grouped_cuda import CudaGroupedPlan, grouped_table
from bench_pointcloud_cuda import CudaVoxelPlan, voxel_table
from bench_sparse24_cuda import Bench, CudaPlan, run
from cuda_block_case import CudaBlockCase, block_summary, block_table
from cuda_machine import GpuLimits, Sensors, describe_gpu, gpu_name, measure_limits
from cuda_record import CudaCase, goals
from cuda_report import cases_table, machine_text, summary_text
from cuda_shapes import (
    ACTIVE_GPU_MODEL,
    BLOCK_DENSITIES,
    BLOCK_DTYPES,
    BLOCK_IMAGES,
    BLOCK_ROWS,
    QUICK_BLOCK_DENSITIES,
    QUICK_BLOCK_IMAGES,
    QUICK_BLOCK_ROWS,
    QUICK_BLOCK_SHAPES,
    QUICK_OTHER_ROWS,
    QUICK_OTHER_SHAPES,
    QUICK_SHAPES,
)
from cuda_timing import Rounds, graph_stopwatch
from machine import describe_commit, describe_versions
from record import default_path, write_entries
from shapes import GOAL_MODEL, LinearShape, Shape

if TYPE_CHECKING:
    from command_line import Options

AnyCase = TypeVar("AnyCase", bound=CudaCase)

QUICK_ROUNDS = Rounds(budget=0.2, least=7, most=21)
QUICK_SWEEP_SECONDS = 0.7
MANY_TOKENS = (256, 1024)  # an expert
QUICK_SECONDS = 140.0  # with probes; after it only the case that has begun, and the record
FULL_ROUNDS = Rounds(budget=0.6, least=11, most=41)


def effort_of(options: Options) -> dict[str, Any]:
    """Rounds, and how long to begin new cases; given as 0, none are."""
    rounds, seconds = (QUICK_ROUNDS, QUICK_SECONDS) if options.quick else (FULL_ROUNDS, math.inf)
    return {
        "rounds": rounds,
        "most_seconds": seconds if options.seconds is None else options.seconds,
    }


def dtypes_of(options: Options) -> list[str]:
    """Of the features that have kernels for those of blocks; in haste the first."""
    dtypes = [dtype for dtype in options.dtypes if dtype in BLOCK_DTYPES]
    return dtypes[:1] if options.quick else dtypes


def plan_of(options: Options) -> CudaPlan:
    """The cases in order: those of bf16, which the goals speak of, come first."""
    cases = [
        (dtype, shape, rows)
        for dtype in options.dtypes
        for shape, rows in _problems(options, first=dtype == options.dtypes[0])
    ]
    haste: dict[str, Any] = {}
    if options.quick:
        haste = {"sweep_seconds": QUICK_SWEEP_SECONDS, "csr_rows": 1}
    return CudaPlan(cases, **haste, **effort_of(options))


def _problems(options: Options, first: bool) -> list[tuple[LinearShape, int]]:
    shapes: Sequence[LinearShape] = options.shapes
    rows: Sequence[int] = options.rows
    if options.quick and not options.shapes_given:
        wanted = QUICK_SHAPES if first else QUICK_OTHER_SHAPES
        shapes = [shape for shape in shapes if shape.name in wanted]
    if options.quick and not options.rows_given and not first:
        rows = QUICK_OTHER_ROWS
    return [(shape, m) for shape in shapes for m in rows]


def block_plan_of(options: Options) -> CudaBlockPlan:
    """The cases of block-sparse layers: convolutions first, of which the goal speaks."""
    convs, linear = list(options.conv_shapes), list(options.shapes)
    if options.quick and not options.shapes_given:
        convs = [shape for shape in convs if shape.model == GOAL_MODEL]
        linear = [shape for shape in linear if shape.name in QUICK_BLOCK_SHAPES]
    images, rows = (
        (QUICK_BLOCK_IMAGES, QUICK_BLOCK_ROWS) if options.quick else (BLOCK_IMAGES, BLOCK_ROWS)
    )
    shapes: list[tuple[Shape, int]] = [
        *((shape, count) for shape in convs for count in options.rows_or(images)),
        *((shape, count) for shape in linear for count in options.rows_or(rows)),
    ]
    problems = [(dtype, shape, count) for dtype in dtypes_of(options) for shape, count in shapes]
    densities = QUICK_BLOCK_DENSITIES if options.quick else BLOCK_DENSITIES
    return CudaBlockPlan(problems, options.blocks, densities, **effort_of(options))


def grouped_plan_of(options: Options) -> CudaGroupedPlan:
    """The cases of experts: the CPU's, and numbers of tokens that keep tensor cores busy."""
    tokens = options.tokens if options.rows_given else (*options.tokens, *MANY_TOKENS)
    haste: dict[str, Any] = {"loads": ("zipf",)} if options.quick else {}
    how = haste | effort_of(options)
    return CudaGroupedPlan(options.expert_shapes, tokens, dtypes_of(options), **how)


def voxel_plan_of(options: Options) -> CudaVoxelPlan:
    """The cases of point clouds: a network, then its layers."""
    haste: dict[str, Any] = {"channels": (32, 64, 128)} if options.quick else {}
    return CudaVoxelPlan(options.scan, dtypes_of(options), **haste, **effort_of(options))


def code_plan_of(options: Options) -> CudaCodePlan:
    """The cases of k-sparse codes."""
    haste: dict[str, Any] = {"tokens": (16, 4096), "ks": (32, 256)} if options.quick else {}
    return CudaCodePlan(dtypes_of(options), **haste, **effort_of(options))


def active_plan_of(options: Options) -> CudaActivePlan:
    """The cases of zero inputs: Llama-3-8B's layers, what goals speak of first."""
    shapes: Sequence[LinearShape] = options.shapes
    if not options.shapes_given:
        shapes = [shape for shape in shapes if shape.model == ACTIVE_GPU_MODEL]
        shapes = sorted(shapes, key=lambda shape: -shape.in_features)
    how: dict[str, Any] = effort_of(options)
    if options.quick:
        how |= {"rows": (1, 4, 8, 16), "sparsities": (0.0, 0.5, 0.9)}
    if options.rows_given:
        how["rows"] = options.rows
    return CudaActivePlan(dtypes_of(options), shapes, **how)


def print_tables(
    cases: Iterable[AnyCase],
    table_of: Callable[[list[AnyCase]], str],
    key: Callable[[AnyCase], object] = lambda case: (case.dtype, case.shape),
) -> list[AnyCase]:
    """The table of the cases of one key as soon as the last of them is there; all the cases."""
    every = []
    for _, group in groupby(cases, key=key):
        mine = list(group)
        print(table_of(mine), flush=True)
        every += mine
    return every


def main(options: Options, arguments: Sequence[str]) -> int:
    """Probe, run, print, keep; 0 if nothing was wrong or failed, 2 without a GPU."""
    if not torch.cuda.is_available():
        print("bench/run.py: --device cuda: torch sees no GPU here", file=sys.stderr)
        return 2
    begin = perf_counter()
    device = torch.device("cuda", torch.cuda.current_device())
    gpu = describe_gpu(device)
    limits = measure_limits(device, list(options.dtypes))
    print(machine_text(gpu, describe_versions(), limits), flush=True)
    bench = Bench(
        device,
        limits,
        partial(graph_stopwatch, device),
        Sensors(device.index),
        partial(torch.cuda.synchronize, device),
    )

    def cases_of(
        feature: str, plan_of: Any, run: Any, table_of: Callable[[Any], str], **key: Any
    ) -> list[Any]:
        if feature not in options.features:
            return []
        plan = plan_of(options)
        plan = replace(plan, most_seconds=plan.most_seconds - (perf_counter() - begin))
        return print_tables(run(plan, bench), table_of, **key)

    cases: list[CudaCase] = cases_of("sparse24", plan_of, run, partial(cases_table, limits=limits))
    blocks: list[CudaBlockCase] = cases_of(
        "blocksparse", block_plan_of, bench_blocksparse_cuda.run, block_table,
        key=lambda case: (case.dtype, case.shape, case.rows),
    )  # fmt: skip
    experts = cases_of("grouped", grouped_plan_of, bench_grouped_cuda.run, grouped_table)
    voxels = cases_of("pointcloud", voxel_plan_of, bench_pointcloud_cuda.run, voxel_table)
    codes = cases_of("codes", code_plan_of, bench_codes_cuda.run, code_table)
    active = cases_of(
        "actsparse", active_plan_of, bench_actsparse_cuda.run,
        partial(active_table, dram=limits.dram),
    )  # fmt: skip
    others = (*blocks, *experts, *voxels, *codes, *active)
    if cases:
        print(summary_text(cases))
    if blocks:
        print(block_summary(blocks))
    keep(options, arguments, gpu, limits, cases, others)
    print(f"took {perf_counter() - begin:.0f} s")
    return 0 if all(case.passed for case in (*cases, *others)) else 1


def keep(
    options: Options,
    arguments: Sequence[str],
    gpu: dict[str, Any],
    limits: GpuLimits,
    cases: Sequence[CudaCase],
    others: Sequence[CudaCase] = (),
) -> None:
    """Write the record and the picture that were asked for; the picture has no other cases."""
    commit = describe_commit(named=options.commit)
    device = gpu_name(gpu["name"])
    if options.json:
        path = default_path(options.json, device, commit, ".json")
        gossamer = {
            "command": list(arguments),
            "caches": "cold",
            "versions": describe_versions(),
            "limits": limits.as_dict(),
            "goals": goals(cases),
            "not_available": [
                {"case": case.name} | case.finding(limits)
                for case in (*cases, *others)
                if not case.timings
            ],
        }
        entries = [entry for case in (*cases, *others) for entry in case.entries(limits)]
        write_entries(path, {"gpu": gpu}, commit, gossamer, entries)
        print(f"record: {path}")
    if options.plot and any(case.timings for case in cases):
        path = default_path(options.plot, device, commit, ".png")
        try:
            import cuda_plots

            cuda_plots.draw(path, cases, f"2:4 layers on {gpu['name']}")
        except ImportError as error:
            print(f"no plot: {error}")
        else:
            print(f"plot: {path}")
