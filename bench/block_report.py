"""The summary of block-sparse layers on the screen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from block_case import BlockCase, break_even
from record import Case
from report import columns_table, mean_text, print_verdicts
from rich.console import Console

_Case = TypeVar("_Case", bound=Case)


def groups_of(cases: Sequence[_Case], key: Callable[[_Case], Any]) -> dict[Any, list[_Case]]:
    """The cases by a key, in the order in which the keys occur."""
    found: dict[Any, list[_Case]] = {}
    for case in cases:
        found.setdefault(key(case), []).append(case)
    return found


def print_block_summary(console: Console, cases: Sequence[BlockCase]) -> None:
    """Geometric means against the goals, break-even densities, then what went wrong."""
    console.print(
        "[bold]Blocks: times faster than the best dense path, geometric means; "
        "the goal is 0.7 x min(dense operations / kept, dense time / time of the bytes)[/]"
    )
    table = columns_table(
        *("dtype", "blocks", "live", "1x1 and 3x3 of\nResNet-50", "the goal\nof those"),
        *("other\nconvolutions", "linear\nlayers", "slower than\nbest dense"),
    )
    for (dtype, block, density), mine in groups_of(
        cases, lambda case: (case.dtype, case.block, case.density)
    ).items():
        of_goal = [case for case in mine if case.has_goal]
        others = [case for case in mine if case.is_conv and not case.has_goal]
        linear = [case for case in mine if not case.is_conv]
        slower = sum(case.against_best.median < 1 for case in mine)
        table.add_row(
            *(dtype, block, f"{density:.0%}"),
            mean_text(of_goal, lambda case: case.against_best.median),
            mean_text(of_goal, lambda case: case.goal),
            mean_text(others, lambda case: case.against_best.median),
            mean_text(linear, lambda case: case.against_best.median),
            f"{slower} of {len(mine)} cases",
        )
    console.print(table)
    _print_break_even(console, cases)
    print_verdicts(console, cases)


def _print_break_even(console: Console, cases: Sequence[BlockCase]) -> None:
    console.print("[bold]As fast as dense at so many live blocks (interpolated)[/]")
    ways = list(dict.fromkeys((case.dtype, case.block, case.rows) for case in cases))
    table = columns_table("layer", *(f"{dtype}\n{block}\nat {rows}" for dtype, block, rows in ways))
    table.columns[0].justify = "left"
    for shape, mine in groups_of(cases, lambda case: case.shape).items():
        cells = []
        for way in ways:
            found = [case for case in mine if (case.dtype, case.block, case.rows) == way]
            relation, density = break_even(found) if found else ("", None)
            cells.append("-" if density is None else f"{relation}{density:.0%}")
        table.add_row(str(shape), *cells)
    console.print(table)
