"""The summary of convolutions over point clouds on the screen, and a picture of the scene."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench_pointcloud import PLAIN, VoxelCase, coordinates_of, map_of
from block_report import groups_of
from pointcloud_rivals import SPCONV
from report import columns_table, mean_text, print_verdicts
from rich.console import Console
from timing import geometric_mean, speedup


def print_pointcloud_summary(console: Console, cases: Sequence[VoxelCase]) -> None:
    """Geometric means over the channels by job and convolution, then what went wrong."""
    console.print("[bold]Point clouds: times faster, geometric mean over the channels[/]")
    table = columns_table("dtype", "convolution", "job", PLAIN, SPCONV, "of peak", "of limit")
    for (dtype, shape, job), mine in groups_of(
        cases, lambda case: (case.dtype, case.shape.name, case.job)
    ).items():
        beside = [case for case in mine if SPCONV in case.timings]
        table.add_row(
            *(dtype, shape, job),
            mean_text(mine, lambda case: case.against_default.median),
            mean_text(beside, lambda case: speedup(case.ours, case.timings[SPCONV]).median),
            *(
                "-" if job == "map" else f"{geometric_mean(map(share, mine)):.0%}"
                for share in (lambda case: case.share_of_peak, lambda case: case.share_of_limit)
            ),
        )
    console.print(table)
    print_verdicts(console, cases)


def draw_scene(path: Path, scan: Path | None) -> None:
    """The voxels from above, coloured by one channel of a drawn convolution of their heights."""
    import matplotlib
    import torch
    from bench_pointcloud import SHAPES
    from gossamer.ops import pointcloud_conv

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    coords = coordinates_of(scan)
    map = map_of(coords, SHAPES[0])
    generator = torch.Generator().manual_seed(0)
    feats = torch.stack([coords[:, 3] / coords[:, 3].max(), torch.ones(len(coords))], 1)
    for channels in ((2, 16), (16, 16), (16, 1)):
        weight = torch.randn(27, *channels, generator=generator) / (9 * channels[0]) ** 0.5
        feats = pointcloud_conv(feats, weight, None, map, 1, "silu" if channels[1] > 1 else None)
    feature = feats[:, 0]
    low, high = feature.quantile(torch.tensor([0.02, 0.98])).tolist()
    figure, axes = plt.subplots(figsize=(10, 10), layout="constrained")
    axes.scatter(
        coords[:, 1],
        coords[:, 2],
        c=feature,
        s=0.3,
        cmap="turbo",
        vmin=low,
        vmax=high,
        linewidths=0,
    )
    axes.set_aspect("equal")
    axes.set_title(f"{len(coords)} voxels from above, by a feature of three convolutions")
    figure.savefig(path, dpi=150)
    plt.close(figure)
