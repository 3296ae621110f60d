"""What a run says of layers with zero inputs: the summary on the screen, and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench_actsparse import ActiveCase, break_even
from block_report import groups_of
from report import columns_table, mean_text, print_verdicts
from rich.console import Console
from timing import geometric_mean

# Okabe and Ito's palette, told apart by colour-blind readers.
HUES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")


def print_active_summary(console: Console, cases: Sequence[ActiveCase]) -> None:
    """Geometric means by rows and sparsity, break-even sparsities, then what went wrong."""
    console.print("[bold]Zero inputs: times faster than the best dense path, geometric means[/]")
    table = columns_table(
        *("dtype", "rows", "zero", "vs best dense", "1 / (1 - zero)", "bytes left", "time left"),
        *("vs the kernel,\nnothing zero", "slower than\nbest dense"),
    )
    for (dtype, rows, sparsity), mine in groups_of(
        cases, lambda case: (case.dtype, case.rows, case.sparsity)
    ).items():
        slower = sum(case.against_best.median < 1 for case in mine)
        table.add_row(
            *(dtype, str(rows), f"{sparsity:.0%}"),
            mean_text(mine, lambda case: case.against_best.median),
            f"{mine[0].ideal:.2f}x",
            f"{geometric_mean(case.read for case in mine):.0%}",
            f"{1 / geometric_mean(case.against_best.median for case in mine):.0%}",
            mean_text(mine, lambda case: case.against_full.median),
            f"{slower} of {len(mine)} cases",
        )
    console.print(table)
    _print_break_even(console, cases)
    print_verdicts(console, cases)


def _print_break_even(console: Console, cases: Sequence[ActiveCase]) -> None:
    console.print("[bold]As fast as dense from so many zeros on (interpolated)[/]")
    ways = list(dict.fromkeys((case.dtype, case.rows) for case in cases))
    table = columns_table("layer", *(f"{dtype}\nat {rows}" for dtype, rows in ways))
    table.columns[0].justify = "left"
    for shape, mine in groups_of(cases, lambda case: case.shape).items():
        cells = []
        for way in ways:
            found = [case for case in mine if (case.dtype, case.rows) == way]
            relation, sparsity = break_even(found) if found else ("", None)
            cells.append("-" if sparsity is None else f"{relation}{sparsity:.0%}")
        table.add_row(str(shape), *cells)
    console.print(table)


def draw(path: Path, cases: Sequence[ActiveCase], title: str) -> None:
    """Write a PNG with a column for each dtype: speed-up against sparsity, a line for each M."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    dtypes = groups_of(cases, lambda case: case.dtype)
    figure, grid = plt.subplots(
        1, len(dtypes), figsize=(6.5 * len(dtypes), 5), squeeze=False, layout="constrained"
    )
    for axes, (dtype, mine) in zip(grid[0], dtypes.items(), strict=True):
        sparsities = sorted({case.sparsity for case in mine})
        for hue, (rows, line) in zip(
            HUES, groups_of(mine, lambda case: case.rows).items(), strict=False
        ):
            by_sparsity = groups_of(line, lambda case: case.sparsity)
            ratios = [[c.against_best.median for c in by_sparsity[s]] for s in sparsities]
            means = [geometric_mean(each) for each in ratios]
            axes.plot(sparsities, means, color=hue, marker="o", markersize=4, label=f"{rows} rows")
            axes.fill_between(
                sparsities, [min(r) for r in ratios], [max(r) for r in ratios], color=hue, alpha=0.1
            )
        ideal = [1 / (1 - s) for s in sparsities]
        axes.plot(sparsities, ideal, color="black", linestyle=":", label="1 / (1 - zeros)")
        axes.axhline(1, color="black", linewidth=1)
        axes.set_yscale("log", base=2)
        axes.set_yticks([0.5, 1, 2, 4, 8, 16], ["0.5", "1", "2", "4", "8", "16"])
        axes.set_title(dtype)
        axes.set_xlabel("zeros in x (each token's drawn by itself)")
        axes.set_ylabel("times faster than the best dense path")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
