"""A picture of a run on a GPU: speed-up over dense and cuSPARSELt against rows, a line a layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cuda_record import CudaCase
from cuda_rivals import CUSPARSELT, DENSE

HUES = {"llama8b": "#0072B2", "llama70b": "#E69F00", "qwen7b": "#009E73"}
OTHER_HUE = "#555555"
MARKERS = "osD^v"
RIVALS = {DENSE: "the best dense kernel", CUSPARSELT: "the best cuSPARSELt algorithm"}


def draw(path: Path, cases: Sequence[CudaCase], title: str) -> None:
    """Write a PNG with a column for each dtype and a row for each rival."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    timed = [case for case in cases if case.timings]
    dtypes = list(dict.fromkeys(case.dtype for case in timed))
    figure, grid = plt.subplots(
        2, len(dtypes), figsize=(6.5 * len(dtypes), 9), squeeze=False, layout="constrained"
    )
    for column, dtype in enumerate(dtypes):
        for row, (family, rival) in enumerate(RIVALS.items()):
            axes = grid[row][column]
            mine = [case for case in timed if case.dtype == dtype]
            for index, shape in enumerate(dict.fromkeys(case.shape for case in mine)):
                points = [
                    (case.rows, ratio)
                    for case in mine
                    if case.shape == shape and (ratio := case.against(family))
                ]
                if not points:
                    continue
                rows = [m for m, _ in points]
                colour = HUES.get(shape.model, OTHER_HUE)
                axes.plot(
                    rows,
                    [ratio.median for _, ratio in points],
                    color=colour,
                    marker=MARKERS[index % len(MARKERS)],
                    markersize=4,
                    linewidth=1,
                    label=str(shape),
                )
                axes.vlines(
                    rows,
                    [ratio.low for _, ratio in points],
                    [ratio.high for _, ratio in points],
                    color=colour,
                    alpha=0.4,
                )
            axes.axhline(1, color="black", linewidth=1)
            axes.set_xscale("log", base=2)
            ticks = sorted({case.rows for case in mine})
            axes.set_xticks(ticks, [str(m) for m in ticks])
            axes.set_ylim(bottom=0)
            axes.set_title(dtype)
            axes.set_xlabel("rows of input (M)")
            axes.set_ylabel(f"times faster than {rival}")
            axes.grid(axis="y", alpha=0.3)
            if axes.has_data() and axes.get_legend_handles_labels()[0]:
                axes.legend(fontsize=7, ncols=2)
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
