"""The tables of a run on a GPU: plain text, which needs no package and reads well in a log."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from cuda_machine import GpuLimits
from cuda_record import CudaCase, goals
from cuda_rivals import CUSPARSELT, DENSE
from timing import Ratio

AnyCase = TypeVar("AnyCase", bound=CudaCase)

COLUMNS = (
    "rows", "ours us", "spread", "dense us", "best dense", "vs dense", "(quartiles)", "cslt us",
    "vs cslt", "of DRAM", "TFLOP/s", "of limit", "eager us: ours/dense/cslt", "right",
)  # fmt: skip


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Right-aligned columns under a rule."""
    cells = [list(columns), *map(list, rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    lines = ["  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in cells]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _ratio(ratio: Ratio | float | None) -> str:
    if ratio is None:
        return "-"
    return f"{ratio.median if isinstance(ratio, Ratio) else ratio:.2f}x"


def _microseconds(case: CudaCase, name: str | None) -> str:
    return f"{1e6 * case.timings[name].median:.1f}" if name else "-"


def _eager(case: CudaCase) -> str:
    return "/".join(f"{1e6 * value:.0f}" for value in case.eager.values()) or "-"


def _row(case: CudaCase, limits: GpuLimits) -> list[str]:
    dense, cslt = case.best(DENSE), case.best(CUSPARSELT)
    against = case.against(DENSE)
    seconds = case.ours.median
    return [
        str(case.rows),
        f"{1e6 * seconds:.1f}",
        f"{case.ours.spread:.0%}",
        _microseconds(case, dense),
        dense or "-",
        _ratio(against),
        f"{against.low:.2f}-{against.high:.2f}" if against else "-",
        _microseconds(case, cslt),
        _ratio(case.against(CUSPARSELT)),
        f"{case.nbytes / seconds / limits.dram:.0%}",
        f"{case.flops / seconds / 1e12:.1f}",
        f"{case.limit / seconds:.0%}",
        _eager(case),
        "yes" if case.check and case.check.passed else "NO",
    ]


def cases_table(cases: Sequence[CudaCase], limits: GpuLimits) -> str:
    """The cases of one shape and dtype; below, what is missing and why."""
    first = cases[0]
    timed = [case for case in cases if case.timings]
    lines = [f"sparse24 {first.dtype} {first.shape}"]
    if timed:
        lines.append(table(COLUMNS, (_row(case, limits) for case in timed)))
    for case in cases:
        if not case.timings:
            word = "FAILED" if case.failed else "not available"
            lines.append(f"  {case.rows} rows {word}: {case.unavailable}")
    reasons = {
        (name, why): None
        for case in timed
        for name, why in {**case.missing, **case.not_graphs}.items()
        if why != "the same as the best"
    }
    lines += [f"  {name}: {why}" for name, why in reasons]
    return "\n".join(lines) + "\n"


def group_table(
    head: str,
    columns: Sequence[str],
    cases: Sequence[AnyCase],
    row: Callable[[AnyCase], list[str]] = lambda case: case.row(),
    notes: Iterable[str] = (),
) -> str:
    """Cases that belong together under a head; below, what is missing and why."""
    timed = [case for case in cases if case.timings]
    lines = [table(columns, map(row, timed))] if timed else []
    for case in cases:
        if not case.timings:
            word = "FAILED" if case.failed else "not available"
            lines.append(f"  {case.name} {word}: {case.unavailable}")
    reasons = {
        (name, why): None
        for case in timed
        for name, why in {**case.missing, **case.not_graphs}.items()
    }
    lines += [f"  {note}" for note in (*notes, *(f"{name}: {why}" for name, why in reasons))]
    return "\n".join([head, *lines]) + "\n"


def machine_text(gpu: dict[str, Any], versions: dict[str, str], limits: GpuLimits) -> str:
    smi = ", ".join(f"{key} {value}" for key, value in gpu["nvidia_smi"].items())
    probes = ", ".join(f"{name} {1e-12 * value:.2f}" for name, value in limits.probes.items())
    dense, sparse = (
        ", ".join(f"{name} {1e-12 * value:.0f}" for name, value in peaks.items()) or "-"
        for peaks in (limits.dense_flops, limits.sparse_flops)
    )
    return (
        f"{gpu['name']}, {gpu['multiprocessors']} multiprocessors, L2 {gpu['l2'] / 2**20:.0f} MiB, "
        f"CUDA {gpu['cuda']}, cuSPARSELt {gpu['cusparselt']}\n{smi or 'no nvidia-smi'}\n"
        f"gossamer {versions.get('gossamer', '?')}, torch {versions['torch']}, "
        f"python {versions['python']}\n"
        f"measured memory, TB/s: {probes}\n"
        f"measured peaks, TFLOP/s: dense {dense}; cuSPARSELt, zeros counted: {sparse}\n"
    )


def summary_text(cases: Sequence[CudaCase]) -> str:
    """What somebody reads who reads nothing else; also fit for Markdown."""
    found = goals(cases)
    lines = ["Times faster, geometric means (decode: up to 64 rows; large: from 64 MiB dense):", ""]
    lines.append("| dtype | regime | cases | best dense | best cuSPARSELt | limits allow |")
    lines.append("|---|---|---|---|---|---|")
    for mean in found["means"]:
        lines.append(
            f"| {mean['dtype']} | {mean['regime']} | {mean['cases']} "
            f"| {_ratio(mean['against_dense'])} | {_ratio(mean['against_cusparselt'])} "
            f"| {_ratio(mean['limits'])} |"
        )
    lines.append("")
    for family in (DENSE, CUSPARSELT):
        slower = found[f"slower_than_{family}"]
        named = ", ".join(f"{item['case']} {item['ratio']:.2f}x" for item in slower)
        lines.append(f"Slower than the best {family}: {named or 'never'}.")
    timed = [case for case in cases if case.timings]
    wrong = [case for case in timed if not (case.check and case.check.passed)]
    lines.append(f"Answers right: {len(timed) - len(wrong)} of {len(timed)} cases.")
    lines += [f"WRONG: {case.name}" for case in wrong]
    reasons: dict[tuple[str, bool], list[str]] = {}
    for case in cases:
        if not case.timings:
            reasons.setdefault((case.unavailable, case.failed), []).append(case.name)
    for (why, failed), names in reasons.items():
        word = "FAILED" if failed else "Not available"
        lines.append(f"{word}, {len(names)} cases from {names[0]} on: {why}")
    return "\n".join(lines) + "\n"
