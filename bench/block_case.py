"""What is known of a block-sparse case beyond any case: its blocks, and the goal for its speed."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from conv_rivals import CONV_DEFAULT
from record import Case
from shapes import GOAL_MODEL, ConvShape, Shape

GOAL = 0.7  # of what the machine allows


def densities_of(block: object, shape: Shape, densities: Sequence[float]) -> Sequence[float]:
    """The densities at which layers of this shape are timed: of blocks those that are given.

    2:4 is a half; its linear layers have a bench of their own, so here they have none.
    """
    if block != "2:4":
        return densities
    return (0.5,) if isinstance(shape, ConvShape) else ()


@dataclass(frozen=True)
class BlockCase(Case):
    """A layer at one density of one size of blocks."""

    block: str  # or "2:4"
    density: float  # of live blocks
    bytes_seconds: float  # to move the layer's bytes once, at the measured read bandwidth

    @property
    def name(self) -> str:
        return f"{super().name}/{self.block}/{self.density:.0%}"

    @property
    def is_conv(self) -> bool:
        return isinstance(self.shape, ConvShape)

    @property
    def default(self) -> str:
        return CONV_DEFAULT if self.is_conv else super().default

    @property
    def place(self) -> str:
        rows = "images" if self.is_conv else "rows"
        pattern = self.block if self.block == "2:4" else f"blocks of {self.block}"
        return f"{super().place}, {self.rows} {rows}, {pattern}"

    @property
    def point(self) -> tuple[str, str]:
        return f"{self.density:.0%}", "live"

    @property
    def rates(self) -> dict[str, str]:
        """The goal, and operations without the zeros."""
        kept = self.real_flops / self.ours.median / 1e9
        return {"goal": f"{self.goal:.2f}x", "GFLOP/s": f"{kept:.0f}"}

    @property
    def params(self) -> dict[str, Any]:
        return super().params | {"block": self.block, "density": self.density}

    @property
    def goal(self) -> float:
        """Times faster than the best dense path, by the arithmetic and the bytes that are left."""
        dense = self.timings[self.best_dense].median
        return GOAL * min(self.dense_flops / self.real_flops, dense / self.bytes_seconds)

    @property
    def has_goal(self) -> bool:
        return self.shape.model == GOAL_MODEL

    def finding(self) -> dict[str, Any]:
        return super().finding() | {"goal": self.goal, "bytes_seconds": self.bytes_seconds}


def break_even(cases: Sequence[Any]) -> tuple[str, float]:
    """The density at which a layer is as fast as dense, from its cases at several densities.

    They have a ``density`` and are otherwise of any feature.

    Returns
    -------
    relation : str
        "" where it lies between two densities that were measured, and is interpolated on the times;
        else ">" or "<".
    density : float
        It, or the last one measured.
    """
    cases = sorted(cases, key=lambda case: case.density)
    if cases[0].against_best.median < 1:
        return "<", cases[0].density
    for faster, slower in itertools.pairwise(cases):
        low, high = (1 / case.against_best.median for case in (faster, slower))  # of dense's time
        if high > 1:
            share = (1 - low) / (high - low)
            return "", faster.density + share * (slower.density - faster.density)
    return ">", cases[-1].density
