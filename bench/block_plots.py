"""A picture of block-sparse layers: speed-up by density, of each block size and of each layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from block_case import BlockCase
from block_report import groups_of
from timing import geometric_mean

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BOUND = 4.0  # times faster or slower from which on colours stay the same


def _heat_map(axes: Axes, cases: Sequence[BlockCase], key: Callable[[BlockCase], Any]) -> None:
    import numpy as np

    rows = groups_of(cases, key)
    densities = sorted({case.density for case in cases})
    ratios = np.array(
        [
            [
                geometric_mean(c.against_best.median for c in mine if c.density == density)
                for density in densities
            ]
            for mine in rows.values()
        ]
    )
    bound = np.log2(BOUND)
    axes.imshow(np.log2(ratios), cmap="RdBu", vmin=-bound, vmax=bound, aspect="auto")
    for (row, column), ratio in np.ndenumerate(ratios):
        shade = "white" if abs(np.log2(ratio)) > 0.7 * bound else "black"
        text = "" if np.isnan(ratio) else f"{ratio:.2f}"
        axes.text(column, row, text, ha="center", va="center", color=shade, fontsize=7)
    axes.set_xticks(range(len(densities)), [f"{density:.0%}" for density in densities])
    axes.set_yticks(range(len(rows)), [str(name) for name in rows], fontsize=7)


def draw(path: Path, cases: Sequence[BlockCase], title: str) -> None:
    """Write a PNG with a column for each dtype: block sizes above, layers below."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    dtypes = groups_of(cases, lambda case: case.dtype)
    blocks = len(groups_of(cases, lambda case: case.block))
    layers = len(groups_of(cases, _layer))
    figure, grid = plt.subplots(
        2,
        len(dtypes),
        figsize=(6.5 * len(dtypes), 2.5 + 0.25 * (blocks + layers)),
        height_ratios=(blocks + 1, layers + 1),
        squeeze=False,
        layout="constrained",
    )
    for column, (dtype, mine) in enumerate(dtypes.items()):
        above, below = grid[0][column], grid[1][column]
        above.set_title(f"{dtype}: times faster than dense, geometric mean", fontsize=9)
        below.set_title("each layer, at its rows or images, in its blocks", fontsize=9)
        _heat_map(above, mine, lambda case: case.block)
        _heat_map(below, mine, _layer)
        below.set_xlabel("live blocks")
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _layer(case: BlockCase) -> str:
    return f"{case.shape.name} at {case.rows}, {case.block}"
