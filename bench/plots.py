"""A picture of a run: speed-up over the best dense path against rows, and the roofline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from machine import Limits
from record import Case

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# One hue a model (Okabe and Ito's palette, told apart by colour-blind readers), one marker a layer.
HUES = {"minilm": "#0072B2", "bert": "#E69F00", "vit": "#CC79A7", "llama": "#009E73"}
OTHER_HUE = "#555555"
MARKERS = "osD^v"


def _styles(cases: Sequence[Case]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each shape."""
    seen: dict[str, list[str]] = {}
    styles = {}
    for case in cases:
        layers = seen.setdefault(case.shape.model, [])
        if case.shape.name not in layers:
            layers.append(case.shape.name)
            marker = MARKERS[(len(layers) - 1) % len(MARKERS)]
            styles[case.shape.name] = (HUES.get(case.shape.model, OTHER_HUE), marker)
    return styles


def _draw_speedup(axes: Axes, cases: Sequence[Case], styles: dict[str, tuple[str, str]]) -> None:
    for name, (colour, marker) in styles.items():
        mine = sorted((c for c in cases if c.shape.name == name), key=lambda case: case.rows)
        if not mine:
            continue
        ratios = [case.against_best for case in mine]
        rows = [case.rows for case in mine]
        axes.plot(
            rows,
            [ratio.median for ratio in ratios],
            color=colour,
            marker=marker,
            markersize=4,
            linewidth=1,
            label=str(mine[0].shape),
        )
        axes.vlines(
            rows, [r.low for r in ratios], [r.high for r in ratios], color=colour, alpha=0.4
        )
    rows = sorted({case.rows for case in cases})
    top = max(case.against_best.median for case in cases)
    axes.axhline(1, color="black", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_xticks(rows, [str(m) for m in rows])
    axes.set_ylim(0, 1.15 * top)
    axes.set_xlabel("rows of input (M)")
    axes.set_ylabel("times faster than the best dense path")
    axes.grid(axis="y", alpha=0.3)


def _draw_roofline(
    axes: Axes, cases: Sequence[Case], styles: dict[str, tuple[str, str]], limits: Limits
) -> None:
    peak = cases[0].peak_flops / 1e9
    intensities = [case.real_flops / case.nbytes for case in cases]
    ends = (min(intensities) / 2, max(intensities) * 2)
    for size in (min(limits.read), max(limits.read)):
        slope = limits.read[size] / 1e9
        points = [ends[0], min(max(peak / slope, ends[0]), ends[1]), ends[1]]
        where = "memory" if size == max(limits.read) else "near cache"
        axes.plot(
            points,
            [min(peak, slope * x) for x in points],
            color="black",
            linewidth=1,
            linestyle="-" if where == "memory" else ":",
            label=f"limit of {where}, {slope:.0f} GB/s",
        )
    for case, intensity in zip(cases, intensities, strict=True):
        colour, marker = styles[case.shape.name]
        axes.plot(
            intensity,
            case.real_flops / case.ours.median / 1e9,
            color=colour,
            marker=marker,
            markersize=4,
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("real operations per byte (weights, inputs, outputs)")
    axes.set_ylabel("real GFLOP/s")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="lower right")


def draw(path: Path, cases: Sequence[Case], limits: Limits, title: str) -> None:
    """Write a PNG with a column for each dtype: speed-up above, roofline below."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    dtypes = list(dict.fromkeys(case.dtype for case in cases))
    styles = _styles(cases)
    figure, grid = plt.subplots(
        2, len(dtypes), figsize=(6.5 * len(dtypes), 9), squeeze=False, layout="constrained"
    )
    for column, dtype in enumerate(dtypes):
        mine = [case for case in cases if case.dtype == dtype]
        grid[0][column].set_title(f"{dtype}, peak {mine[0].peak_flops / 1e9:.0f} GFLOP/s")
        _draw_speedup(grid[0][column], mine, styles)
        _draw_roofline(grid[1][column], mine, styles, limits)
    grid[0][0].legend(fontsize=7, ncols=2)
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
