"""The summary of k-sparse codes on the screen."""

from __future__ import annotations

from collections.abc import Sequence

from bench_codes import BAG, DENSE, CodeCase
from block_report import groups_of
from report import columns_table, mean_text, print_verdicts
from rich.console import Console
from timing import speedup

OFTEN = 4  # uses of a row from which on tiles of the dictionary may pay


def print_code_summary(console: Console, cases: Sequence[CodeCase]) -> None:
    """Geometric means by how often rows are named, then what went wrong."""
    console.print("[bold]k-sparse codes: times faster than torch, geometric mean of all shapes[/]")
    table = columns_table("dtype", "uses of\na row", BAG, DENSE, "slower than\nbest")
    for (dtype, often), mine in groups_of(
        cases, lambda case: (case.dtype, case.uses >= OFTEN)
    ).items():
        ways = [[c for c in mine if name in c.timings] for name in (BAG, DENSE)]
        slower = sum(case.against_best.median < 1 for case in mine)
        table.add_row(
            *(dtype, f"from {OFTEN}" if often else f"below {OFTEN}"),
            mean_text(ways[0], lambda case: case.against_default.median),
            mean_text(ways[1], lambda case: speedup(case.ours, case.timings[DENSE]).median),
            f"{slower} of {len(mine)} cases",
        )
    console.print(table)
    print_verdicts(console, cases)
