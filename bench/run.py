"""How fast is gossamer on this machine, and is it right?

    python bench/run.py --quick          about three minutes: layers and a whole model
    python bench/run.py --json --plot    everything, kept under bench/results
    python bench/run.py --device cuda    on a GPU, against cuBLAS and cuSPARSELt

Every case is checked against dense before it is timed; a wrong answer makes the exit status 1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

import torch
from shapes import DTYPES, QUICK_ROWS, ROWS, SHAPES, LinearShape, find_shapes
from timing import Effort

if TYPE_CHECKING:
    from bench_sparse24 import Plan
    from machine import Limits
    from models import ModelResult
    from record import Case
    from rich.console import Console

FEATURES = ("sparse24", "model")
RESULTS = Path(__file__).resolve().parent / "results"

FULL_EFFORT = Effort(budget=2.0, slice=0.005, least_rounds=9, most_rounds=31)
QUICK_EFFORT = Effort(budget=0.3, slice=0.002, least_rounds=5, most_rounds=15)
FULL_MODEL_EFFORT = Effort(budget=20.0, least_rounds=9, most_rounds=31)
QUICK_MODEL_EFFORT = Effort(budget=4.0, least_rounds=5, most_rounds=15)
QUICK_CSR_ROWS = 64  # with more, torch's CSR product takes longer than all the others together
QUICK_GFLOP = 40.0  # of the dense product: leaves out the two widest layers at 1024 rows
LEAST_WIDTH = 140  # of the tables: better wrapped by a narrow terminal than cut


@dataclass(frozen=True)
class Choices:
    """What a device's bench offers, and what it runs where the command line says nothing."""

    features: tuple[str, ...]
    shapes: tuple[LinearShape, ...]
    rows: tuple[int, ...]
    quick_rows: tuple[int, ...]
    known_dtypes: tuple[str, ...]
    dtypes: tuple[str, ...]
    quick_dtypes: tuple[str, ...]


def choices_of(device: str) -> Choices:
    if device == "cpu":
        every = tuple(DTYPES)
        return Choices(FEATURES, SHAPES, ROWS, QUICK_ROWS, every, every, ("float32", "bfloat16"))
    import cuda_shapes as gpu

    default = gpu.DEFAULT_DTYPES
    return Choices(
        ("sparse24",), gpu.SHAPES, gpu.ROWS, gpu.QUICK_ROWS, tuple(gpu.DTYPES), default, default
    )


@dataclass(frozen=True)
class Options:
    """The command line, with its defaults worked out."""

    quick: bool
    features: tuple[str, ...]
    dtypes: tuple[str, ...]
    model_dtypes: tuple[str, ...]
    shapes: tuple[LinearShape, ...]
    rows: tuple[int, ...]
    threads: int
    cold: bool
    json: Path | None
    plot: Path | None
    device: str = "cpu"
    commit: str | None = None
    shapes_given: bool = False  # not a default
    rows_given: bool = False
    seconds: float | None = None


def _comma_list(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _rows(text: str) -> tuple[int, ...]:
    rows = tuple(int(part) for part in _comma_list(text))
    if not rows or min(rows) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: rows are whole numbers from 1 on")
    return rows


def _threads(text: str) -> int:
    if (threads := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: at least one thread")
    return threads


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bench/run.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="fewer rows and rounds: about three minutes")
    add("--feature", type=_comma_list, metavar="A,B", help=f"of {', '.join(FEATURES)}; default all")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    on_gpu = "on a GPU bf16, fp16, fp8, int8, fp32"
    add("--dtype", type=_comma_list, metavar="A,B", help=f"of {', '.join(DTYPES)}; {on_gpu}")
    add("--shapes", type=_comma_list, metavar="A,B", help="names, models (llama) or NxK")
    add("--m", type=_rows, metavar="1,16,...", help="rows of input")
    add("--threads", type=_threads, help="default: what torch would use")
    add("--cold", action="store_true", help="weights from memory: copies larger than the caches")
    add("--seconds", type=float, help="on a GPU: begin no case after so long, and say which")
    add("--commit", help="for the record, where git does not tell it")
    for kind in ("json", "plot"):
        add(
            f"--{kind}",
            type=Path,
            nargs="?",
            const=RESULTS,
            metavar="PATH",
            help=("write the record" if kind == "json" else "draw a PNG")
            + "; without PATH under bench/results, by date, device and commit",
        )
    return parser


def _check_names(
    parser: argparse.ArgumentParser, option: str, given: list[str], known: Sequence[str]
) -> None:
    for name in given:
        if name not in known:
            parser.error(f"argument {option}: {name!r} is none of {', '.join(known)}")


def parse(arguments: Sequence[str]) -> Options:
    """The command line as options; argparse's own exit (status 2) on a mistake."""
    parser = _parser()
    given = parser.parse_args(arguments)
    choices = choices_of(given.device)
    features = given.feature or list(choices.features)
    defaults = choices.quick_dtypes if given.quick else choices.dtypes
    dtypes = given.dtype or list(defaults)
    _check_names(parser, "--feature", features, choices.features)
    _check_names(parser, "--dtype", dtypes, choices.known_dtypes)
    try:
        shapes = find_shapes(given.shapes, choices.shapes)
    except ValueError as error:
        parser.error(f"argument --shapes: {error}")
    model_dtypes = (
        dtypes if given.dtype else ["float32"] if given.quick else ["float32", "bfloat16"]
    )
    return Options(
        quick=given.quick,
        features=tuple(features),
        dtypes=tuple(dtypes),
        model_dtypes=tuple(model_dtypes),
        shapes=shapes,
        rows=given.m or (choices.quick_rows if given.quick else choices.rows),
        threads=given.threads or torch.get_num_threads(),
        cold=given.cold,
        json=given.json,
        plot=given.plot,
        device=given.device,
        commit=given.commit,
        shapes_given=bool(given.shapes),
        rows_given=bool(given.m),
        seconds=given.seconds,
    )


def _plan(options: Options) -> Plan:
    from bench_sparse24 import Plan

    plan = Plan(
        options.shapes,
        options.rows,
        options.dtypes,
        QUICK_EFFORT if options.quick else FULL_EFFORT,
        options.cold,
    )
    if options.quick:
        plan = replace(plan, most_csr_rows=QUICK_CSR_ROWS, most_gflop=QUICK_GFLOP)
    return plan


def _run_cases(console: Console, plan: Plan, limits: Limits) -> list[Case]:
    import bench_sparse24
    from report import print_cases
    from tqdm import tqdm

    cases: list[Case] = []

    def counted() -> Iterator[Case]:
        with tqdm(total=len(plan), unit="case", leave=False, disable=None) as bar:
            for case in bench_sparse24.run(plan, limits):
                bar.set_description(case.name)
                bar.update()
                cases.append(case)
                yield case

    for _, group in groupby(counted(), key=lambda case: (case.dtype, case.shape)):
        table = list(group)
        with tqdm.external_write_mode():
            print_cases(console, table)
    for case in plan.left_out():
        console.print(f"left out by --quick: {case}")
    return cases


def _run_models(console: Console, options: Options) -> list[ModelResult]:
    import models

    effort = QUICK_MODEL_EFFORT if options.quick else FULL_MODEL_EFFORT
    results = []
    for dtype in options.model_dtypes:
        console.print(f"converting and timing {models.NAME}, {dtype} ...")
        results.append(models.run(dtype, effort))
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; 0 if every answer was right."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = parse(arguments)
    if options.device == "cuda":
        import run_cuda

        return run_cuda.main(options, arguments)
    torch.set_num_threads(options.threads)

    import plots
    import report
    from machine import Limits, cpu_name, describe_commit, describe_machine, describe_versions
    from record import default_path, write_record
    from rich.console import Console

    begin = perf_counter()
    console = Console(highlight=False)
    console.width = max(console.width, LEAST_WIDTH)
    machine = describe_machine()
    limits = Limits.measure(list(options.dtypes), options.threads)
    report.print_machine(console, machine, describe_versions(), limits)
    if options.cold:
        console.print("weights are read from memory: copies larger than the caches take turns\n")

    cases = _run_cases(console, _plan(options), limits) if "sparse24" in options.features else []
    results = _run_models(console, options) if "model" in options.features else []
    report.print_summary(console, cases, results)

    commit = describe_commit()
    if options.commit:
        commit["id"] = options.commit
    device = cpu_name(machine["cpu"])
    if options.json:
        path = default_path(options.json, device, commit, ".json")
        models = [result.as_dict() for result in results]
        write_record(path, arguments, machine, commit, options.cold, limits, cases, models)
        console.print(f"record: {path}")
    if options.plot and cases:
        path = default_path(options.plot, device, commit, ".png")
        name = machine["cpu"].get("brand_raw", machine["machine"])
        plots.draw(path, cases, limits, f"2:4 layers on {name}, {limits.threads} threads")
        console.print(f"plot: {path}")
    console.print(f"took {perf_counter() - begin:.0f} s")
    right = all(case.check.passed for case in cases) and all(r.answers.passed for r in results)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
