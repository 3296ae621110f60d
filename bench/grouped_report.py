"""The summary of grouped linear layers on the screen."""

from __future__ import annotations

from collections.abc import Sequence

from bench_grouped import GROUPED_MM, LOOP, GroupedCase
from block_report import groups_of
from report import columns_table, mean_text, print_verdicts
from rich.console import Console
from timing import geometric_mean, speedup


def print_grouped_summary(console: Console, cases: Sequence[GroupedCase]) -> None:
    """Geometric means by load, then what went wrong."""
    console.print("[bold]Experts: times faster than torch, geometric mean over all shapes[/]")
    table = columns_table(
        *("dtype", "load", "tokens an\nexpert", LOOP, GROUPED_MM, "of limit", "slower than\nbest")
    )
    for (dtype, load, tokens), mine in groups_of(
        cases, lambda case: (case.dtype, case.load, case.tokens)
    ).items():
        ways = [[c for c in mine if name in c.timings] for name in (LOOP, GROUPED_MM)]
        slower = sum(case.against_best.median < 1 for case in mine)
        table.add_row(
            *(dtype, load, str(tokens)),
            mean_text(ways[0], lambda case: case.against_default.median),
            mean_text(ways[1], lambda case: speedup(case.ours, case.timings[GROUPED_MM]).median),
            f"{geometric_mean(case.share_of_limit for case in mine):.0%}",
            f"{slower} of {len(mine)} cases",
        )
    console.print(table)
    print_verdicts(console, cases)
