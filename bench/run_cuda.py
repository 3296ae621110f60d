"""The bench on a GPU: what ``run.py --device cuda`` runs."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from time import perf_counter
from typing import TYPE_CHECKING, Any

import bench_actsparse_cuda
import bench_blocksparse_cuda
import bench_codes_cuda
import bench_grouped_cuda
import bench_pointcloud_cuda
import torch
from bench_actsparse_cuda import CudaActiveCase, CudaActivePlan, active_table
from bench_blocksparse_cuda import CudaBlockPlan
from bench_codes_cuda import CudaCodeCase, CudaCodePlan, code_table
from bench_grouped_cuda import CudaGroupedCase, CudaGroupedPlan, grouped_table
from bench_pointcloud_cuda import CudaVoxelCase, CudaVoxelPlan, voxel_table
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

QUICK_ROUNDS = Rounds(budget=0.2, least=7, most=21)
QUICK_SWEEP_SECONDS = 0.7
MANY_TOKENS = (256, 1024)  # an expert
QUICK_SECONDS = 140.0  # with probes; after it only the case that has begun, and the record
FULL_ROUNDS = Rounds(budget=0.6, least=11, most=41)


def seconds_of(options: Options, otherwise: float) -> float:
    """How long to begin new cases; given as 0, none."""
    return otherwise if options.seconds is None else options.seconds


def plan_of(options: Options) -> CudaPlan:
    """The cases in order: those of bf16, which the goals speak of, come first."""
    cases = [
        (dtype, shape, rows)
        for dtype in options.dtypes
        for shape, rows in _problems(options, first=dtype == options.dtypes[0])
    ]
    if options.quick:
        return CudaPlan(
            cases, QUICK_ROUNDS, QUICK_SWEEP_SECONDS, 1, seconds_of(options, QUICK_SECONDS)
        )
    return CudaPlan(cases, FULL_ROUNDS, most_seconds=seconds_of(options, math.inf))


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
    if options.rows_given:
        images = rows = options.rows
    shapes: list[tuple[Shape, int]] = [
        *((shape, count) for shape in convs for count in images),
        *((shape, count) for shape in linear for count in rows),
    ]
    dtypes = [dtype for dtype in options.dtypes if dtype in BLOCK_DTYPES]
    dtypes = dtypes[:1] if options.quick else dtypes
    problems = [(dtype, shape, count) for dtype in dtypes for shape, count in shapes]
    if options.quick:
        how: tuple[Any, ...] = (QUICK_BLOCK_DENSITIES, QUICK_ROUNDS)
        return CudaBlockPlan(problems, options.blocks, *how, seconds_of(options, QUICK_SECONDS))
    seconds = seconds_of(options, math.inf)
    return CudaBlockPlan(problems, options.blocks, BLOCK_DENSITIES, FULL_ROUNDS, seconds)


def grouped_plan_of(options: Options) -> CudaGroupedPlan:
    """The cases of experts: the CPU's, and numbers of tokens that keep tensor cores busy."""
    dtypes = [dtype for dtype in options.dtypes if dtype in BLOCK_DTYPES]
    tokens = options.tokens if options.rows_given else (*options.tokens, *MANY_TOKENS)
    if not options.quick:
        seconds = seconds_of(options, math.inf)
        return CudaGroupedPlan(
            options.expert_shapes, tokens, dtypes, rounds=FULL_ROUNDS, most_seconds=seconds
        )
    seconds = seconds_of(options, QUICK_SECONDS)
    how: dict[str, Any] = {"rounds": QUICK_ROUNDS, "most_seconds": seconds}
    return CudaGroupedPlan(options.expert_shapes, tokens, dtypes[:1], ("zipf",), **how)


def voxel_plan_of(options: Options) -> CudaVoxelPlan:
    """The cases of point clouds: a network, then its layers."""
    dtypes = [dtype for dtype in options.dtypes if dtype in BLOCK_DTYPES]
    seconds = seconds_of(options, math.inf)
    if not options.quick:
        return CudaVoxelPlan(options.scan, dtypes, rounds=FULL_ROUNDS, most_seconds=seconds)
    rest: dict[str, Any] = {
        "rounds": QUICK_ROUNDS,
        "most_seconds": seconds_of(options, QUICK_SECONDS),
    }
    return CudaVoxelPlan(options.scan, dtypes[:1], channels=(32, 64, 128), **rest)


def code_plan_of(options: Options) -> CudaCodePlan:
    """The cases of k-sparse codes."""
    dtypes = [dtype for dtype in options.dtypes if dtype in BLOCK_DTYPES]
    seconds = seconds_of(options, math.inf)
    if not options.quick:
        return CudaCodePlan(dtypes, rounds=FULL_ROUNDS, most_seconds=seconds)
    rest: dict[str, Any] = {
        "rounds": QUICK_ROUNDS,
        "most_seconds": seconds_of(options, QUICK_SECONDS),
    }
    return CudaCodePlan(dtypes[:1], tokens=(16, 4096), ks=(32, 256), **rest)


def print_code_cases(cases: Iterable[CudaCodeCase], out: Any = None) -> list[CudaCodeCase]:
    """Each dictionary's table as soon as its last case is there; all the cases."""
    every = []
    for _, group in groupby(cases, key=lambda case: (case.dtype, case.shape)):
        mine = list(group)
        print(code_table(mine), file=out or sys.stdout, flush=True)
        every += mine
    return every


def print_grouped_cases(cases: Iterable[CudaGroupedCase], out: Any = None) -> list[CudaGroupedCase]:
    """Each shape's table as soon as its last case is there; all the cases."""
    every = []
    for _, group in groupby(cases, key=lambda case: (case.dtype, case.shape)):
        mine = list(group)
        print(grouped_table(mine), file=out or sys.stdout, flush=True)
        every += mine
    return every


def active_plan_of(options: Options) -> CudaActivePlan:
    """The cases of zero inputs: Llama-3-8B's layers, what goals speak of first."""
    shapes: Sequence[LinearShape] = options.shapes
    if not options.shapes_given:
        shapes = [shape for shape in shapes if shape.model == ACTIVE_GPU_MODEL]
        shapes = sorted(shapes, key=lambda shape: -shape.in_features)
    dtypes = [dtype for dtype in options.dtypes if dtype in BLOCK_DTYPES]
    seconds = seconds_of(options, math.inf)
    given: dict[str, Any] = {"rows": options.rows} if options.rows_given else {}
    if not options.quick:
        return CudaActivePlan(dtypes, shapes, rounds=FULL_ROUNDS, most_seconds=seconds, **given)
    given = {"rows": (1, 4, 8, 16), "sparsities": (0.0, 0.5, 0.9)} | given
    rest: dict[str, Any] = {
        "rounds": QUICK_ROUNDS,
        "most_seconds": seconds_of(options, QUICK_SECONDS),
    }
    return CudaActivePlan(dtypes[:1], shapes, **given, **rest)


def print_active_cases(
    cases: Iterable[CudaActiveCase], limits: GpuLimits, out: Any = None
) -> list[CudaActiveCase]:
    """Each layer's table as soon as its last case is there; all the cases."""
    every = []
    for _, group in groupby(cases, key=lambda case: (case.dtype, case.shape)):
        mine = list(group)
        print(active_table(mine, limits.dram), file=out or sys.stdout, flush=True)
        every += mine
    return every


def print_voxel_cases(cases: Iterable[CudaVoxelCase], out: Any = None) -> list[CudaVoxelCase]:
    """Each shape's table as soon as its last case is there; all the cases."""
    every = []
    for _, group in groupby(cases, key=lambda case: (case.dtype, case.shape)):
        mine = list(group)
        print(voxel_table(mine), file=out or sys.stdout, flush=True)
        every += mine
    return every


def print_block_cases(cases: Iterable[CudaBlockCase], out: Any = None) -> list[CudaBlockCase]:
    """Each layer's table as soon as its last case is there; all the cases."""
    every = []
    for _, group in groupby(cases, key=lambda case: (case.dtype, case.shape, case.rows)):
        mine = list(group)
        print(block_table(mine), file=out or sys.stdout, flush=True)
        every += mine
    return every


def print_cases(cases: Iterable[CudaCase], limits: GpuLimits, out: Any = None) -> list[CudaCase]:
    """Each shape's table as soon as its last case is there; all the cases."""
    every = []
    for _, group in groupby(cases, key=lambda case: (case.dtype, case.shape)):
        table = list(group)
        print(cases_table(table, limits), file=out or sys.stdout, flush=True)
        every += table
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
    cases: list[CudaCase] = []
    blocks: list[CudaBlockCase] = []
    if "sparse24" in options.features:
        plan = plan_of(options)
        plan = replace(plan, most_seconds=plan.most_seconds - (perf_counter() - begin))
        cases = print_cases(run(plan, bench), limits)
    if "blocksparse" in options.features:
        block_plan = block_plan_of(options)
        left = block_plan.most_seconds - (perf_counter() - begin)
        found = bench_blocksparse_cuda.run(replace(block_plan, most_seconds=left), bench)
        blocks = print_block_cases(found)
    experts: list[CudaGroupedCase] = []
    if "grouped" in options.features:
        grouped_plan = grouped_plan_of(options)
        left = grouped_plan.most_seconds - (perf_counter() - begin)
        experts = print_grouped_cases(
            bench_grouped_cuda.run(replace(grouped_plan, most_seconds=left), bench)
        )
    voxels: list[CudaVoxelCase] = []
    if "pointcloud" in options.features:
        voxel_plan = voxel_plan_of(options)
        left = voxel_plan.most_seconds - (perf_counter() - begin)
        voxels = print_voxel_cases(
            bench_pointcloud_cuda.run(replace(voxel_plan, most_seconds=left), bench)
        )
    codes: list[CudaCodeCase] = []
    if "codes" in options.features:
        code_plan = code_plan_of(options)
        left = code_plan.most_seconds - (perf_counter() - begin)
        found = bench_codes_cuda.run(replace(code_plan, most_seconds=left), bench)
        codes = print_code_cases(found)
    active: list[CudaActiveCase] = []
    if "actsparse" in options.features:
        active_plan = active_plan_of(options)
        left = active_plan.most_seconds - (perf_counter() - begin)
        plans = replace(active_plan, most_seconds=left)
        active = print_active_cases(bench_actsparse_cuda.run(plans, bench), limits)
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
    commit = describe_commit()
    if options.commit:
        commit["id"] = options.commit
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
