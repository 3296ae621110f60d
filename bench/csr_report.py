"""The summary of unstructured sparse layers on the screen."""

from __future__ import annotations

import math
from collections.abc import Sequence

from bench_csr import CsrCase, break_even
from block_report import groups_of
from report import columns_table, mean_text, print_verdicts
from rich.console import Console
from timing import geometric_mean


def print_csr_summary(console: Console, cases: Sequence[CsrCase]) -> None:
    """Geometric means by density, where dense takes over, then what went wrong."""
    console.print("[bold]Unstructured: times faster than torch, geometric mean over all shapes[/]")
    table = columns_table(
        *("dtype", "rows", "density", "best dense", "torch CSR", "of limit", "slower than\nbest")
    )
    for (dtype, rows, density), mine in groups_of(
        cases, lambda case: (case.dtype, case.rows, case.density)
    ).items():
        sparse = [case for case in mine if case.against_csr is not None]
        slower = sum(case.against_best.median < 1 for case in mine)
        table.add_row(
            *(dtype, str(rows), f"{density:.0%}"),
            mean_text(mine, lambda case: case.against_best.median),
            mean_text(sparse, lambda case: case.against_csr.median),
            f"{geometric_mean(case.share_of_limit for case in mine):.0%}",
            f"{slower} of {len(mine)} cases",
        )
    console.print(table)
    console.print("[bold]As fast as the best dense way up to a density of[/]")
    table = columns_table("dtype", "layer", "rows", "break-even")
    for (dtype, shape, rows), mine in groups_of(
        cases, lambda case: (case.dtype, str(case.shape), case.rows)
    ).items():
        even = break_even(mine)
        densities = [case.density for case in mine]
        text = f"{even:.0%}"
        if even in (0.0, math.inf):
            text = f"above {max(densities):.0%}" if even else f"below {min(densities):.0%}"
        table.add_row(dtype, shape, str(rows), text)
    console.print(table)
    print_verdicts(console, cases)
