"""The tables on the screen."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import Any

from bench_actsparse import ActiveCase
from bench_grouped import GroupedCase
from block_case import BlockCase
from machine import MIB, Limits
from models import ModelResult
from record import OURS, Case
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rivals import DEFAULT
from shapes import FEW_ROWS, MANY_ROWS
from timing import Ratio, geometric_mean

BUSY = 0.5  # cores' worth of other work that disturbs a measurement
LOSS = 1.0  # below this ratio the dense path was faster


def time_text(seconds: float) -> str:
    for unit, scale in (("us", 1e6), ("ms", 1e3)):
        if seconds * scale < 999.5:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds:.3g} s"


def columns_table(*columns: str) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def ratio_text(value: float, spec: str = ".2f") -> str:
    colour = "green" if value >= 1.05 else "red" if value < LOSS else "yellow"
    return f"[{colour}]{value:{spec}}x[/]"


def quartiles_text(ratio: Ratio) -> str:
    return f"{ratio.low:.2f}-{ratio.high:.2f}"


def print_machine(
    console: Console, machine: dict[str, Any], versions: dict[str, str], limits: Limits
) -> None:
    """What runs here and how fast it could be at best."""
    sizes = ", ".join(f"{name} {size / MIB:.3g} MiB" for name, size in machine["caches"].items())
    name = machine["cpu"].get("brand_raw", machine["machine"])
    console.print(
        f"[bold]{name}[/], {machine['cores']} cores, {limits.threads} threads, "
        f"{sizes or 'caches unknown'}\n"
        f"gossamer {versions.get('gossamer', '?')} ({machine['target']}), "
        f"torch {versions['torch']}, python {versions['python']}"
    )
    peaks = ", ".join(f"{dtype} {flops / 1e9:.0f}" for dtype, flops in limits.flops.items())
    reads = ", ".join(
        f"{size / MIB:.3g} MiB {speed / 1e9:.0f}" for size, speed in sorted(limits.read.items())
    )
    console.print(f"measured peak, GFLOP/s: {peaks}\nmeasured reads, GB/s: {reads}\n")
    if machine["busy_cores_before"] > BUSY:
        load = f"{machine['busy_cores_before']:.1f}"
        console.print(f"[yellow]The machine was busy before this (load {load}).[/]\n")


def print_cases(console: Console, cases: Sequence[Case]) -> None:
    """One table for the cases of one place."""
    first = cases[0]
    console.print(f"[bold]{first.feature} {first.place}[/]")
    table = columns_table(
        *(first.point[1], OURS, "best dense", "", "vs best", "(quartiles)", f"vs\n{first.default}"),
        *("vs CSR", *first.rates, "GB/s", "of peak", "of limit", "right"),
    )
    table.columns[3].justify = "left"
    for case in cases:
        csr = case.against_csr
        table.add_row(
            case.point[0],
            f"{time_text(case.ours.median)} ±{case.ours.spread / 2:.0%}",
            time_text(case.timings[case.best_dense].median),
            case.best_dense,
            ratio_text(case.against_best.median),
            quartiles_text(case.against_best),
            ratio_text(case.against_default.median),
            ratio_text(csr.median, ".1f") if csr else "-",
            *case.rates.values(),
            f"{case.gigabytes_per_second:.1f}",
            f"{case.share_of_peak:.0%}",
            f"{case.share_of_limit:.0%}",
            "yes" if case.check.passed else "[bold red]NO[/]",
        )
    console.print(table)


def mean_text(cases: Iterable[Case], ratio: Callable[[Case], float]) -> str:
    mean = geometric_mean(ratio(case) for case in cases)
    return "-" if mean != mean else ratio_text(mean)


def _print_cases_summary(console: Console, cases: Sequence[Case]) -> None:
    """Geometric means by dtype, then what went wrong."""
    few, many = f"up to {FEW_ROWS} rows", f"from {MANY_ROWS} rows"
    today = f"{DEFAULT}, torch today"
    console.print("[bold]2:4 layers: times faster than dense, geometric mean over all shapes[/]")
    table = columns_table(
        *("dtype", f"best dense,\n{few}", f"best dense,\n{many}"),
        *(f"limits allow,\n{few}", f"limits allow,\n{many}"),
        *(f"{today},\n{few}", f"{today},\n{many}", "slower than\nbest dense"),
    )
    for dtype in dict.fromkeys(case.dtype for case in cases):
        mine = [case for case in cases if case.dtype == dtype]
        groups = (
            [case for case in mine if case.rows <= FEW_ROWS],
            [case for case in mine if case.rows >= MANY_ROWS],
        )
        slower = sum(case.against_best.median < LOSS for case in mine)
        table.add_row(
            dtype,
            *(mean_text(group, lambda case: case.against_best.median) for group in groups),
            *(mean_text(group, lambda case: case.ratio_of_limits) for group in groups),
            *(mean_text(group, lambda case: case.against_default.median) for group in groups),
            f"{slower} of {len(mine)} cases",
        )
    console.print(table)
    print_verdicts(console, cases)


def print_verdicts(console: Console, cases: Sequence[Case]) -> None:
    """Every loss and every wrong answer by name."""
    losses = [case for case in cases if case.against_best.median < LOSS]
    console.print("Slower than the best dense path:" if losses else "Never slower than dense.")
    for place, group in groupby(losses, key=lambda case: case.place):
        found = [f"{ratio_text(c.against_best.median)} at {' '.join(c.point)}" for c in group]
        console.print(f"  {place}: {', '.join(found)}")
    wrong = [case for case in cases if not case.check.passed]
    console.print(f"Answers equal to dense: {len(cases) - len(wrong)} of {len(cases)} cases")
    for case in wrong:
        console.print(
            f"  [bold red]WRONG[/] {case.name} ({case.kernel}): error {case.check.max_error:.3g}, "
            f"{case.check.worst:.3g} times what rounding explains"
        )


def _print_model(console: Console, result: ModelResult) -> None:
    """The model's speed at every batch size, and what happened to its answers."""
    console.print(
        f"[bold]{result.name}, {result.dtype}, {result.swapped} of {len(result.layers)} layers "
        f"{result.pattern}: {result.unit} per second on {result.data}[/]"
    )
    names, default = result.speeds[0].timings, result.speeds[0].default
    table = columns_table("batch", *names, "vs best dense", "(quartiles)", f"vs {default}")
    for speed in result.speeds:
        table.add_row(
            str(speed.batch),
            *(f"{speed.per_second(name):.0f}" for name in speed.timings),
            ratio_text(speed.against_best.median),
            quartiles_text(speed.against_best),
            ratio_text(speed.against_default.median),
        )
    console.print(table)
    answers = result.answers
    verdict = "rounding only" if answers.passed else "[bold red]MORE THAN ROUNDING[/]"
    console.print(
        f"{OURS} against the same pruned weights run densely: largest difference "
        f"{answers.max_difference:.1e}, mean {answers.mean_difference:.1e}: {verdict} (mean "
        f"distance from float64: sparse {answers.sparse_rounding:.1e}, dense "
        f"{answers.dense_rounding:.1e})"
    )
    if answers.cosine_mean is None:
        return
    console.print(
        "What pruning itself costs, without retraining: cosine similarity of sentence embeddings "
        f"to the unpruned model {answers.cosine_mean:.3f} on average, "
        f"{answers.cosine_least:.3f} at worst"
    )


def print_summary(
    console: Console,
    cases: Sequence[Case],
    blocks: Sequence[BlockCase],
    experts: Sequence[GroupedCase],
    active: Sequence[ActiveCase],
    models: Sequence[ModelResult],
) -> None:
    """What somebody reads who reads nothing else."""
    console.rule("Summary")
    if cases:
        _print_cases_summary(console, cases)
    if blocks:
        from block_report import print_block_summary  # whose tables are made as those here

        print_block_summary(console, blocks)
    if experts:
        from grouped_report import print_grouped_summary

        print_grouped_summary(console, experts)
    if active:
        from active_report import print_active_summary

        print_active_summary(console, active)
    for result in models:
        _print_model(console, result)
