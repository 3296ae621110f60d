"""What a run on a GPU found, case by case, and the figures that the goals speak of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from cuda_machine import GpuLimits
from cuda_rivals import CUSPARSELT, DENSE
from cuda_shapes import DECODE_ROWS, LARGE_WEIGHT, PREFILL_ROWS
from cusparselt import Trial, summarise
from record import OURS, Check, entries_of
from shapes import LinearShape, Shape
from timing import Ratio, Timing, geometric_mean, speedup


@dataclass(frozen=True)
class CudaCase:
    """One shape, dtype and number of rows on a GPU.

    ``unavailable`` says why it has no timings, where it has none; ``failed`` that this is a fault
    and not for want of a kernel or of time. ``flops`` counts the zeros; ``nbytes`` and
    ``dense_bytes`` are weights as stored, x and results, each once; the limits are the least
    seconds that the measured bandwidth and peaks allow.
    """

    shape: Shape
    dtype: str
    rows: int
    flops: int
    dense_bytes: int = 0
    dense_limit: float = 0.0
    nbytes: int = 0
    limit: float = 0.0
    check: Check | None = None
    timings: dict[str, Timing] = field(default_factory=dict)
    families: dict[str, str] = field(default_factory=dict)
    settings: dict[str, dict[str, object]] = field(default_factory=dict)
    not_graphs: dict[str, str] = field(default_factory=dict)  # timed by eager calls, and why
    missing: dict[str, str] = field(default_factory=dict)  # rivals without a time, and why
    trials: tuple[Trial, ...] = ()
    eager: dict[str, float] = field(default_factory=dict)  # s a call with Python and launches
    sensors: dict[str, Any] = field(default_factory=dict)
    unavailable: str = ""
    failed: bool = False

    @property
    def name(self) -> str:
        return f"sparse24/{self.dtype}/{self.shape.name}/m{self.rows}"

    @property
    def params(self) -> dict[str, Any]:
        """What identifies the case in a record."""
        return {
            "shape": self.shape.name,
            **self.shape.sizes,
            "dtype": self.dtype,
            "rows": self.rows,
        }

    @property
    def passed(self) -> bool:
        """False for a wrong answer or a fault; a case without a kernel or time is no failure."""
        return not self.failed and (self.check is None or self.check.passed)

    @property
    def ours(self) -> Timing:
        return self.timings[OURS]

    def best(self, family: str) -> str | None:
        """The fastest contender of a family."""
        names = [name for name in self.timings if self.families[name] == family]
        return min(names, key=lambda name: self.timings[name].median, default=None)

    def against(self, family: str) -> Ratio | None:
        """How many times faster ours is than the best of a family."""
        best = self.best(family)
        return speedup(self.ours, self.timings[best]) if best else None

    @property
    def weight_bytes(self) -> int:
        """Of the dense weight of a linear layer."""
        assert isinstance(self.shape, LinearShape)
        size = {"bf16": 2, "fp16": 2, "fp32": 4}.get(self.dtype, 1)
        return self.shape.out_features * self.shape.in_features * size

    def finding(self, limits: GpuLimits) -> dict[str, Any]:
        """Everything but the times themselves."""
        if not self.timings:
            return {"unavailable": self.unavailable, "failed": self.failed, "missing": self.missing}
        seconds = self.ours.median
        best = {family: self.best(family) for family in (DENSE, CUSPARSELT)}
        ratios = {family: self.against(family) for family in best}
        dense, sparse = (
            peaks.get(self.dtype) for peaks in (limits.dense_flops, limits.sparse_flops)
        )
        assert self.check is not None
        return {
            "check": asdict(self.check) | {"passed": self.check.passed},
            "best_dense": best[DENSE],
            "best_cusparselt": best[CUSPARSELT],
            "against_best_dense": asdict(ratios[DENSE]) if ratios[DENSE] else None,
            "against_best_cusparselt": asdict(ratios[CUSPARSELT]) if ratios[CUSPARSELT] else None,
            "ratio_of_limits": self.dense_limit / self.limit,
            "share_of_limit": self.limit / seconds,
            "bytes": self.nbytes,
            "share_of_dram": self.nbytes / seconds / limits.dram,
            "dense_counted_tflops": self.flops / seconds / 1e12,
            "share_of_dense_peak": self.flops / seconds / dense if dense else None,
            "share_of_sparse_peak": self.flops / seconds / sparse if sparse else None,
            "eager_us": {name: 1e6 * value for name, value in self.eager.items()},
            "not_graphs": self.not_graphs,
            "missing": self.missing,
            "cusparselt_algorithms": summarise(self.trials),
            "sensors": self.sensors,
        }

    def entries(self, limits: GpuLimits) -> list[dict[str, Any]]:
        """The case for the record: one entry a contender, the finding with our own."""
        extra = {name: {"settings": self.settings.get(name)} for name in self.timings}
        if OURS in extra:
            extra[OURS] |= self.finding(limits)
        return entries_of(self.name, self.params, self.timings, extra)

    def timing_cells(self) -> list[str]:
        """Six cells of a table: our time, its spread, the best dense rival, its time, the ratio."""
        rival, ratio = self.best(DENSE), self.against(DENSE)
        return [
            f"{1e6 * self.ours.median:.1f}",
            f"{self.ours.spread:.0%}",
            rival or "-",
            f"{1e6 * self.timings[rival].median:.1f}" if rival else "-",
            f"{ratio.median:.2f}x" if ratio else "-",
            f"{ratio.low:.2f}-{ratio.high:.2f}" if ratio else "-",
        ]


def goals(cases: Sequence[CudaCase]) -> dict[str, Any]:
    """Geometric means by regime, and every case that is slower than its rival.

    Decode is up to 64 rows, apart for weights that fit an L2 and those that fit none; prefill is
    from 2048 rows on.
    """
    timed = [case for case in cases if case.timings]
    regimes = {
        "decode, large weights": lambda c: c.rows <= DECODE_ROWS and c.weight_bytes >= LARGE_WEIGHT,
        "decode, small weights": lambda c: c.rows <= DECODE_ROWS and c.weight_bytes < LARGE_WEIGHT,
        "between": lambda c: DECODE_ROWS < c.rows < PREFILL_ROWS,
        "prefill": lambda c: c.rows >= PREFILL_ROWS,
    }
    found: dict[str, Any] = {"means": [], "slower_than_dense": [], "slower_than_cusparselt": []}
    for dtype in dict.fromkeys(case.dtype for case in timed):
        for regime, inside in regimes.items():
            mine = [case for case in timed if case.dtype == dtype and inside(case)]
            if not mine:
                continue
            means = {
                f"against_{family}": _mean([case.against(family) for case in mine])
                for family in (DENSE, CUSPARSELT)
            }
            limit = geometric_mean(case.dense_limit / case.limit for case in mine)
            found["means"].append(
                {"dtype": dtype, "regime": regime, "cases": len(mine), **means, "limits": limit}
            )
    for family in (DENSE, CUSPARSELT):
        for case in timed:
            ratio = case.against(family)
            if ratio is not None and ratio.median < 1.0:
                found[f"slower_than_{family}"].append({"case": case.name, "ratio": ratio.median})
    return found


def _mean(ratios: Sequence[Ratio | None]) -> float | None:
    values = [ratio.median for ratio in ratios if ratio is not None]
    return geometric_mean(values) if values else None
