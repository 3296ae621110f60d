"""How fast is gossamer on this machine, and is it right?

    python bench/run.py --quick          three to seven minutes: layers and a whole model
    python bench/run.py --json --plot    everything, kept under bench/results
    python bench/run.py --device cuda    on a GPU, against cuBLAS and cuSPARSELt

Every case is checked against dense before it is timed; a wrong answer makes the exit status 1.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence, Sized
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path
from time import perf_counter
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from command_line import Options, parse
from shapes import (
    ACTIVE_MODEL,
    ACTIVE_ROWS,
    BLOCK_ROWS,
    CODE_KS,
    GOAL_MODEL,
    IMAGES,
    QUICK_ACTIVE_ROWS,
    QUICK_BLOCK_ROWS,
    QUICK_IMAGES,
    QUICK_SPARSITIES,
    SPARSITIES,
)
from timing import Effort

if TYPE_CHECKING:
    from bench_actsparse import ActiveCase
    from bench_blocksparse import BlockPlan
    from bench_codes import CodeCase
    from bench_csr import CsrCase
    from bench_grouped import GroupedCase
    from bench_pointcloud import VoxelCase
    from bench_quantized import QuantizedCase
    from bench_sparse24 import Plan
    from block_case import BlockCase
    from machine import Limits
    from models import ModelResult
    from record import Case
    from rich.console import Console

FULL_EFFORT = Effort(budget=2.0, slice=0.005, least_rounds=9, most_rounds=31)
QUICK_EFFORT = Effort(budget=0.1, slice=0.002, least_rounds=5, most_rounds=9)
FULL_MODEL_EFFORT = Effort(budget=20.0, least_rounds=9, most_rounds=31)
QUICK_MODEL_EFFORT = Effort(budget=2.0, least_rounds=5, most_rounds=11)
QUICK_CSR_ROWS = 64  # with more, torch's CSR product takes longer than all the others together
QUICK_GFLOP = 10.0  # of the dense product: leaves out wide layers at many rows
QUICK_BLOCK_LAYERS = ("bert.up", "llama.attention")  # beside ResNet-50's convolutions
QUICK_EXPERT_LAYERS = ("mixtral-fifth.up", "olmoe.up")
QUICK_CHANNELS = (16, 64)
QUICK_ACTIVE_LAYERS = ("llama.up", "llama.down")
LEAST_WIDTH = 140  # of the tables: better wrapped by a narrow terminal than cut


def _effort(options: Options) -> Effort:
    return QUICK_EFFORT if options.quick else FULL_EFFORT


def _plan(options: Options) -> Plan:
    from bench_sparse24 import Plan

    plan = Plan(
        options.shapes,
        options.rows,
        options.dtypes,
        _effort(options),
        options.cold,
    )
    if options.quick:
        plan = replace(plan, most_csr_rows=QUICK_CSR_ROWS, most_gflop=QUICK_GFLOP)
    return plan


def _block_plan(options: Options) -> BlockPlan:
    from bench_blocksparse import BlockPlan
    from gossamer import Block

    linear, convs = options.shapes, options.conv_shapes
    rows, images = (QUICK_BLOCK_ROWS, QUICK_IMAGES) if options.quick else (BLOCK_ROWS, IMAGES)
    if options.quick and not options.shapes_given:
        linear = tuple(shape for shape in linear if shape.name in QUICK_BLOCK_LAYERS)
        convs = tuple(shape for shape in convs if shape.model == GOAL_MODEL)
    return BlockPlan(
        [
            *((shape, count) for shape in convs for count in options.rows_or(images)),
            *((shape, count) for shape in linear for count in options.rows_or(rows)),
        ],
        options.dtypes,
        [size if isinstance(size, str) else Block(*size) for size in options.blocks],
        _effort(options),
    )


def _run_cases(
    console: Console,
    bench: ModuleType,
    plan: Sized,
    limits: Limits,
) -> list[Any]:
    from report import print_cases
    from tqdm import tqdm

    cases: list[Any] = []

    def counted() -> Iterator[Any]:
        with tqdm(total=len(plan), unit="case", leave=False, disable=None) as bar:
            for case in bench.run(plan, limits):
                bar.set_description(case.name)
                bar.update()
                cases.append(case)
                yield case

    for _, group in groupby(counted(), key=lambda case: case.place):
        table = list(group)
        with tqdm.external_write_mode():
            print_cases(console, table)
    return cases


def _run_sparse24(console: Console, options: Options, limits: Limits) -> list[Case]:
    import bench_sparse24

    plan = _plan(options)
    cases = _run_cases(console, bench_sparse24, plan, limits)
    for case in plan.left_out():
        console.print(f"left out by --quick: {case}")
    return cases


def _run_quantized(console: Console, options: Options, limits: Limits) -> list[QuantizedCase]:
    import bench_quantized

    shapes = options.shapes
    if options.quick and not options.shapes_given:
        shapes = tuple(shape for shape in shapes if shape.name in bench_quantized.QUICK_LAYERS)
    rows = bench_quantized.QUICK_ROWS if options.quick else bench_quantized.ROWS
    plan = bench_quantized.QuantizedPlan(
        shapes, options.rows_or(rows), options.dtypes, _effort(options)
    )
    return _run_cases(console, bench_quantized, plan, limits)


def _run_blocksparse(console: Console, options: Options, limits: Limits) -> list[BlockCase]:
    import bench_blocksparse

    return _run_cases(console, bench_blocksparse, _block_plan(options), limits)


def _run_csr(console: Console, options: Options, limits: Limits) -> list[CsrCase]:
    import bench_csr

    shapes, rows = options.shapes, bench_csr.QUICK_ROWS if options.quick else bench_csr.ROWS
    if not options.shapes_given:
        names = bench_csr.QUICK_LAYERS if options.quick else bench_csr.LAYERS
        shapes = tuple(shape for shape in shapes if shape.name in names)
    plan = bench_csr.CsrPlan(shapes, options.rows_or(rows), options.dtypes, _effort(options))
    if options.quick:
        plan = replace(plan, most_csr_rows=QUICK_CSR_ROWS)
    return _run_cases(console, bench_csr, plan, limits)


def _run_grouped(console: Console, options: Options, limits: Limits) -> list[GroupedCase]:
    import bench_grouped

    shapes = options.expert_shapes
    if options.quick and not options.shapes_given:
        shapes = tuple(shape for shape in shapes if shape.name in QUICK_EXPERT_LAYERS)
    plan = bench_grouped.GroupedPlan(shapes, options.tokens, options.dtypes, _effort(options))
    return _run_cases(console, bench_grouped, plan, limits)


def _run_pointcloud(console: Console, options: Options, limits: Limits) -> list[VoxelCase]:
    import bench_pointcloud

    plan = bench_pointcloud.VoxelPlan(options.scan, options.dtypes, _effort(options))
    if options.quick:
        plan = replace(plan, channels=QUICK_CHANNELS, shapes=plan.shapes[:1])
    return _run_cases(console, bench_pointcloud, plan, limits)


def _run_actsparse(console: Console, options: Options, limits: Limits) -> list[ActiveCase]:
    import bench_actsparse

    shapes = options.shapes
    if not options.shapes_given:
        shapes = tuple(shape for shape in shapes if shape.model == ACTIVE_MODEL)
        if options.quick:
            shapes = tuple(shape for shape in shapes if shape.name in QUICK_ACTIVE_LAYERS)
    rows = QUICK_ACTIVE_ROWS if options.quick else ACTIVE_ROWS
    plan = bench_actsparse.ActivePlan(
        shapes,
        options.rows_or(rows),
        options.dtypes,
        QUICK_SPARSITIES if options.quick else SPARSITIES,
        _effort(options),
    )
    return _run_cases(console, bench_actsparse, plan, limits)


def _run_codes(console: Console, options: Options, limits: Limits) -> list[CodeCase]:
    import bench_codes

    shapes, ks = options.code_shapes, CODE_KS
    if options.quick and not options.shapes_given:
        shapes, ks = shapes[:1], ks[1:2]
    plan = bench_codes.CodePlan(shapes, options.code_tokens, ks, options.dtypes, _effort(options))
    return _run_cases(console, bench_codes, plan, limits)


def _run_models(console: Console, options: Options) -> list[ModelResult]:
    import models
    import relu_lm
    import resnet

    effort = QUICK_MODEL_EFFORT if options.quick else FULL_MODEL_EFFORT
    results = []
    for feature, model in (("model", models), ("relu-lm", relu_lm), ("resnet50", resnet)):
        for dtype in options.model_dtypes if feature in options.features else ():
            console.print(f"converting and timing {model.NAME}, {dtype} ...")
            results.append(model.run(dtype, effort))
    return results


def _keep(
    console: Console,
    options: Options,
    arguments: Sequence[str],
    machine: dict[str, Any],
    limits: Limits,
    cases: Sequence[Case],
    models: Sequence[dict[str, Any]],
) -> None:
    """Write the record and draw the plots that were asked for."""
    from machine import cpu_name, describe_commit
    from record import default_path, write_record

    commit = describe_commit(named=options.commit)
    device = cpu_name(machine["cpu"])
    if options.json:
        path = default_path(options.json, device, commit, ".json")
        write_record(path, arguments, machine, commit, options.cold, limits, cases, models)
        console.print(f"record: {path}")
    if options.plot:
        path = default_path(options.plot, device, commit, ".png")
        name = machine["cpu"].get("brand_raw", machine["machine"])
        where = f"on {name}, {limits.threads} threads"
        for drawn in _draw(path, options, limits, where, cases):
            console.print(f"plot: {drawn}")


def _draw(
    path: Path, options: Options, limits: Limits, where: str, cases: Sequence[Any]
) -> Iterator[Path]:
    """Draw a plot of each feature that has one and was run, and say where."""
    import active_report
    import block_plots
    import plots
    from pointcloud_report import draw_scene

    kinds: tuple[tuple[str, str, Callable[[Path, Any], None]], ...] = (
        ("sparse24", "", partial(plots.draw, limits=limits, title=f"2:4 layers {where}")),
        ("blocksparse", "-blocks", partial(block_plots.draw, title=f"Layers of blocks {where}")),
        ("pointcloud", "-scene", lambda file, _: draw_scene(file, options.scan)),
        (
            "actsparse",
            "-zeros",
            partial(active_report.draw, title=f"Layers with zero inputs {where}"),
        ),
    )
    for feature, suffix, draw in kinds:
        if of := [case for case in cases if case.feature == feature]:
            file = path.with_stem(f"{path.stem}{suffix}")
            draw(file, of)
            yield file


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; 0 if every answer was right."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = parse(arguments, __doc__)
    if options.device == "cuda":
        import run_cuda

        return run_cuda.main(options, arguments)
    torch.set_num_threads(options.threads)

    import report
    from machine import Limits, describe_machine, describe_versions, keep_freed_memory
    from rich.console import Console

    begin = perf_counter()
    console = Console(highlight=False)
    console.width = max(console.width, LEAST_WIDTH)
    machine = describe_machine() | {"keeps_freed_memory": keep_freed_memory()}
    limits = Limits.measure(list(options.dtypes), options.threads)
    report.print_machine(console, machine, describe_versions(), limits)
    if options.cold:
        console.print("weights are read from memory: copies larger than the caches take turns\n")

    wanted = options.features
    cases = _run_sparse24(console, options, limits) if "sparse24" in wanted else []
    small = _run_quantized(console, options, limits) if "quantized" in wanted else []
    blocks = _run_blocksparse(console, options, limits) if "blocksparse" in wanted else []
    places = _run_csr(console, options, limits) if "csr" in wanted else []
    experts = _run_grouped(console, options, limits) if "grouped" in wanted else []
    active = _run_actsparse(console, options, limits) if "actsparse" in wanted else []
    codes = _run_codes(console, options, limits) if "codes" in wanted else []
    clouds = _run_pointcloud(console, options, limits) if "pointcloud" in wanted else []
    results = _run_models(console, options)
    report.print_summary(console, cases, blocks, experts, active, codes, results)
    if small:
        from quantized_report import print_quantized_summary

        print_quantized_summary(console, small)
    if places:
        from csr_report import print_csr_summary

        print_csr_summary(console, places)
    if clouds:
        from pointcloud_report import print_pointcloud_summary

        print_pointcloud_summary(console, clouds)
    every = [*cases, *small, *blocks, *places, *experts, *active, *codes, *clouds]
    models = [result.as_dict() for result in results]
    _keep(console, options, arguments, machine, limits, every, models)
    console.print(f"took {perf_counter() - begin:.0f} s")
    right = all(case.check.passed for case in every) and all(r.answers.passed for r in results)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
