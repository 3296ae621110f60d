"""A block-sparse layer, or a 2:4 convolution, on a GPU: what was found, its goal and tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from cuda_machine import GpuLimits
from cuda_record import CudaCase
from cuda_report import group_table
from cuda_rivals import DENSE
from timing import geometric_mean

BSR = "bsr"
Pattern = tuple[int, int] | str  # the one word is "2:4", whose density is a half
# Of what the operations that are left allow, for tensor cores and blocks of 32 x 32, or 2:4.
GOAL = 0.6

COLUMNS = (
    "blocks", "live", "tile", "ours us", "spread", "dense us", "best dense", "vs dense",
    "(quartiles)", "goal", "vs BSR", "kept TFLOP/s", "of limit", "right",
)  # fmt: skip


def pattern_name(block: Pattern) -> str:
    return block if isinstance(block, str) else f"{block[0]}x{block[1]}"


@dataclass(frozen=True)
class CudaBlockCase(CudaCase):
    """One layer, dtype, number of rows or images, size of blocks and share of live ones."""

    block: Pattern = (1, 1)
    density: float = 1.0
    kept_flops: int = 1  # without the zeros
    chosen: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        layer = f"{self.dtype}/{self.shape.name}/m{self.rows}"
        return f"blocksparse/{layer}/{pattern_name(self.block)}/{self.density:.0%}"

    @property
    def goal(self) -> float:
        """Times faster than the best dense path; never more than the bytes allow."""
        if not (dense := self.best(DENSE)):
            return math.nan
        bytes_allow = self.timings[dense].median / self.limit
        return GOAL * min(self.flops / self.kept_flops, bytes_allow)

    @property
    def params(self) -> dict[str, Any]:
        blocks = {"block": pattern_name(self.block), "density": self.density}
        return super().params | blocks

    @property
    def tile(self) -> str:
        """Pixels by outputs."""
        names = ("tile_m", "tile_n") if self.block == "2:4" else ("tile_pixels", "tile_outputs")
        return "x".join(str(self.chosen.get(name)) for name in names)

    def finding(self, limits: GpuLimits) -> dict[str, Any]:
        found = super().finding(limits)
        if not self.timings:
            return found
        kept = self.kept_flops / self.ours.median / 1e12
        goal = None if math.isnan(self.goal) else self.goal
        return found | {"goal": goal, "kept_tflops": kept, "chosen": self.chosen}

    def row(self) -> list[str]:
        against, bsr, dense = self.against(DENSE), self.against(BSR), self.best(DENSE)
        return [
            pattern_name(self.block),
            f"{self.density:.0%}",
            self.tile,
            f"{1e6 * self.ours.median:.1f}",
            f"{self.ours.spread:.0%}",
            f"{1e6 * self.timings[dense].median:.1f}" if dense else "-",
            dense or "-",
            f"{against.median:.2f}x" if against else "-",
            f"{against.low:.2f}-{against.high:.2f}" if against else "-",
            f"{self.goal:.2f}x",
            f"{bsr.median:.2f}x" if bsr else "-",
            f"{self.kept_flops / self.ours.median / 1e12:.1f}",
            f"{self.limit / self.ours.median:.0%}",
            "yes" if self.check and self.check.passed else "NO",
        ]


def block_table(cases: Sequence[CudaBlockCase]) -> str:
    """The cases of one shape, dtype and number of rows; below, what is missing and why."""
    first = cases[0]
    head = f"blocksparse {first.dtype} {first.shape}, {first.rows} rows or images"
    return group_table(head, COLUMNS, cases)


def block_summary(cases: Sequence[CudaBlockCase]) -> str:
    """What somebody reads who reads nothing else; also fit for Markdown."""
    timed = [case for case in cases if case.against(DENSE)] if cases else []
    lines = [
        "Blocks, times faster than the best dense kernel, geometric means (the goal: 0.6 of what "
        "the operations that are left, or the bytes, allow):",
        "",
        "| dtype | blocks | live | cases | best dense | goal | slower than dense |",
        "|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[Any, ...], list[CudaBlockCase]] = {}
    for case in timed:
        groups.setdefault((case.dtype, case.block, case.density), []).append(case)
    for (dtype, block, density), mine in groups.items():
        ratios = [ratio.median for case in mine if (ratio := case.against(DENSE))]
        slower = sum(ratio < 1 for ratio in ratios)
        lines.append(
            f"| {dtype} | {pattern_name(block)} | {density:.0%} | {len(mine)} "
            f"| {geometric_mean(ratios):.2f}x | {geometric_mean(c.goal for c in mine):.2f}x "
            f"| {slower} |"
        )
    wrong = [case.name for case in cases if case.check and not case.check.passed]
    absent = [case for case in cases if not case.timings]
    lines += ["", f"Answers wrong: {', '.join(wrong) or 'none'}."]
    if absent:
        lines.append(
            f"Not timed, {len(absent)} cases from {absent[0].name} on: {absent[0].unavailable}"
        )
    return "\n".join(lines) + "\n"
