"""The summary of 2:4 layers with 8-bit and 4-bit values on the screen."""

from __future__ import annotations

from collections.abc import Sequence

from bench_quantized import QuantizedCase
from block_report import groups_of
from report import columns_table, mean_text, print_verdicts
from rich.console import Console
from timing import geometric_mean


def print_quantized_summary(console: Console, cases: Sequence[QuantizedCase]) -> None:
    """Geometric means by type of values and rows, then what went wrong."""
    console.print("[bold]8-bit and 4-bit 2:4: times faster, geometric mean over all shapes[/]")
    table = columns_table(
        *("dtype of x", "values", "rows", "best of torch", "F.linear", "2:4 alone"),
        *("of bytes' limit", "slower than\nbest"),
    )
    for (dtype, values, rows), mine in groups_of(
        cases, lambda case: (case.dtype, case.value_type, case.rows)
    ).items():
        slower = sum(case.against_best.median < 1 for case in mine)
        table.add_row(
            *(dtype, values, str(rows)),
            mean_text(mine, lambda case: case.against_best.median),
            mean_text(mine, lambda case: case.against_default.median),
            mean_text(mine, lambda case: case.against_unquantised.median),
            f"{geometric_mean(case.share_of_limit for case in mine):.0%}",
            f"{slower} of {len(mine)} cases",
        )
    console.print(table)
    print_verdicts(console, cases)
