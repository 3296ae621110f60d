"""What a run found, and the file it is kept in.

The file is what ``pytest-benchmark compare`` reads (one entry per case and contender), with
everything that is only known here under ``extra_info`` and ``gossamer``.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from machine import Limits, describe_versions, now
from pytest_benchmark import __version__ as layout_version
from rivals import CSR, DEFAULT
from shapes import Shape
from timing import Ratio, Timing, speedup

OURS = "gossamer"


@dataclass(frozen=True)
class Check:
    """``worst`` is the largest error over what is allowed where it occurred: at most 1 is right."""

    max_error: float
    worst: float

    @property
    def passed(self) -> bool:
        return self.worst <= 1  # also false for NaN


@dataclass(frozen=True)
class Case:
    """One shape, dtype and number of rows: was it right, and how fast was everybody."""

    feature: str
    shape: Shape
    dtype: str
    rows: int
    kernel: str
    check: Check
    timings: dict[str, Timing]
    best_dense: str
    dense_flops: int  # a multiply-add counts two; zeros counted
    real_flops: int  # zeros not counted, except by a tile unit, which multiplies them
    nbytes: int  # weights as stored, inputs and outputs, each once
    peak_flops: float  # FLOP/s measured in the same run
    limit_seconds: float  # what the measured peak and read bandwidth allow at best
    dense_limit_seconds: float  # the same for the dense layer

    @property
    def name(self) -> str:
        return f"{self.feature}/{self.dtype}/{self.shape.name}/m{self.rows}"

    @property
    def default(self) -> str:
        """The contender that a model runs if nobody does anything about it."""
        return DEFAULT

    @property
    def place(self) -> str:
        """What the cases of one table share."""
        return f"{self.dtype} {self.shape}"

    @property
    def point(self) -> tuple[str, str]:
        """What tells the cases of a table apart: a number, and what it counts."""
        return str(self.rows), "rows"

    @property
    def rates(self) -> dict[str, str]:
        """How its speed is given in the tables."""
        return {"GFLOP/s": f"{self.gflops:.0f}"}

    @property
    def params(self) -> dict[str, Any]:
        return {"shape": self.shape.name, **self.shape.sizes} | {
            "dtype": self.dtype,
            "rows": self.rows,
        }

    @property
    def ours(self) -> Timing:
        return self.timings[OURS]

    @property
    def against_best(self) -> Ratio:
        return speedup(self.ours, self.timings[self.best_dense])

    @property
    def against_default(self) -> Ratio:
        return speedup(self.ours, self.timings[self.default])

    @property
    def against_csr(self) -> Ratio | None:
        return speedup(self.ours, self.timings[CSR]) if CSR in self.timings else None

    @property
    def gflops(self) -> float:
        """Dense-counted: the rate a dense kernel would need to finish in the same time."""
        return self.dense_flops / self.ours.median / 1e9

    @property
    def gigabytes_per_second(self) -> float:
        return self.nbytes / self.ours.median / 1e9

    @property
    def share_of_peak(self) -> float:
        """Real arithmetic over the measured multiply-add peak."""
        return self.real_flops / self.ours.median / self.peak_flops

    @property
    def share_of_limit(self) -> float:
        """The least possible time over the time taken."""
        return self.limit_seconds / self.ours.median

    @property
    def ratio_of_limits(self) -> float:
        """How many times faster than dense the machine allows, were both as fast as it allows."""
        return self.dense_limit_seconds / self.limit_seconds

    def finding(self) -> dict[str, Any]:
        """What the record says of it."""
        return {
            "kernel": self.kernel,
            "check": asdict(self.check) | {"passed": self.check.passed},
            "best_dense": self.best_dense,
            "against_best_dense": asdict(self.against_best),
            "against_default": asdict(self.against_default),
            "against_csr": asdict(self.against_csr) if self.against_csr else None,
            "dense_flops": self.dense_flops,
            "real_flops": self.real_flops,
            "bytes": self.nbytes,
            "dense_counted_gflops": self.gflops,
            "real_gflops": self.gflops * self.real_flops / self.dense_flops,
            "gigabytes_per_second": self.gigabytes_per_second,
            "share_of_peak": self.share_of_peak,
            "share_of_limit": self.share_of_limit,
            "limit_seconds": self.limit_seconds,
            "dense_limit_seconds": self.dense_limit_seconds,
            "ratio_of_limits": self.ratio_of_limits,
        }

    def entries(self) -> list[dict[str, Any]]:
        """The case for the record: one entry a contender, the finding with our own."""
        return entries_of(self.name, self.params, self.timings, {OURS: self.finding()})


def entries_of(
    case: str,
    params: dict[str, Any],
    timings: dict[str, Timing],
    extra_info: Mapping[str, dict[str, Any]],
) -> list[dict[str, Any]]:
    """The entries of a case, one a contender, as ``pytest-benchmark`` has them."""
    return [
        {
            "group": case,
            "name": f"{case}/{contender}",
            "fullname": f"{case}/{contender}",
            "params": params,
            "param": None,
            "extra_info": extra_info.get(contender, {}),
            "options": {},
            "stats": timing.stats.as_dict()
            | {"data": list(timing.seconds), "iterations": timing.calls},
        }
        for contender, timing in timings.items()
    ]


def write_record(
    path: Path,
    command: Sequence[str],
    machine: dict[str, Any],
    commit: dict[str, Any],
    cold: bool,
    limits: Limits,
    cases: Sequence[Case],
    models: Sequence[dict[str, Any]],
) -> None:
    """Write a run as JSON, for people, for plots and for ``pytest-benchmark compare``."""
    gossamer = {
        "command": list(command),
        "caches": "cold" if cold else "hot",
        "versions": describe_versions(),
        "limits": limits.as_dict(),
        "models": list(models),
    }
    entries = [entry for case in cases for entry in case.entries()]
    write_entries(path, machine, commit, gossamer, entries)


def write_entries(
    path: Path,
    machine: dict[str, Any],
    commit: dict[str, Any],
    gossamer: dict[str, Any],
    entries: Sequence[dict[str, Any]],
) -> None:
    """The layout that records of every device share."""
    record = {
        "machine_info": machine,
        "commit_info": commit,
        "datetime": now(),
        "version": layout_version,
        "gossamer": gossamer,
        "benchmarks": list(entries),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_to_json(_rounded(record)) + "\n")


def default_path(path: Path, device: str, commit: dict[str, Any], suffix: str) -> Path:
    """``path``, or in a folder ``<date>-<device>-<commit>``: so records sort and speak.

    A record that has the name already is not written over: the next one gets a number.
    """
    if not path.is_dir():
        return path
    name = f"{now()[:10]}-{device}-{commit['id'][:7]}{'-dirty' if commit['dirty'] else ''}"
    found = path / f"{name}{suffix}"
    for number in itertools.count(2):
        if not found.exists():
            break
        found = path / f"{name}-{number}{suffix}"
    return found


def _rounded(value: Any) -> Any:
    """Six digits of every float: more than a clock knows, and half the bytes."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {str(key): _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return value


def _to_json(record: dict[str, Any]) -> str:
    """One line for each entry of the record and for each benchmark, so that changes can be read."""
    lines = [json.dumps(entry) for entry in record["benchmarks"]]
    parts = {key: json.dumps(item) for key, item in record.items() if key != "benchmarks"}
    parts["benchmarks"] = "[\n  " + ",\n  ".join(lines) + "\n ]" if lines else "[]"
    return "{\n" + ",\n".join(f" {json.dumps(key)}: {text}" for key, text in parts.items()) + "\n}"
