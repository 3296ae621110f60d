"""What a record says about its conditions: the machine, the software, and the measured limits."""

from __future__ import annotations

import ctypes
import itertools
import math
import os
import re
import subprocess
import sys
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from pytest_benchmark.plugin import pytest_benchmark_generate_machine_info

ROOT = Path(__file__).resolve().parent.parent
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
KIB, MIB = 1024, 1024**2
# Vendor, family and model (None: any), where the brand does not tell.
CORES = {
    ("AuthenticAMD", 25, 1): "zen3",
    ("AuthenticAMD", 26, None): "zen5",
    ("GenuineIntel", 6, 143): "sapphirerapids",
    ("GenuineIntel", 6, 207): "emeraldrapids",
}
UNKNOWN_CACHE = 32 * MIB  # bytes taken for the last-level cache where the system does not say
BUFFERS = (256 * KIB, MIB, 4 * MIB, 16 * MIB, 64 * MIB, 256 * MIB)


def caches(folder: Path = CACHES) -> dict[str, int]:
    """Bytes of each data cache that cpu0 sees, by level ("L1d", "L2", "L3"); {} off Linux."""
    found = {}
    for index in sorted(folder.glob("index*")):
        level, kind, size = (
            (index / part).read_text().strip() for part in ("level", "type", "size")
        )
        if kind == "Instruction" or not size.endswith("K"):
            continue
        found[f"L{level}" + ("d" if kind == "Data" else "")] = int(size[:-1]) * KIB
    return found


def last_level_cache() -> int:
    """Bytes of the largest cache."""
    return max(caches().values(), default=UNKNOWN_CACHE)


def cores() -> int:
    """CPUs this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def busy_cores() -> float:
    """Cores' worth of work that the machine had in the last minute; 0 where it does not say."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def keep_freed_memory() -> bool:
    """Have malloc keep what is freed and hand it out again; False where it takes no such orders.

    Otherwise large results come now from memory that was used before and now from fresh pages,
    which the system clears at the first touch: which contender meets those is chance.
    """
    most_maps, trim_threshold, largest = -4, -1, 2**31 - 1  # glibc's M_MMAP_MAX, M_TRIM_THRESHOLD
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):
        return False
    return bool(mallopt(most_maps, 0) and mallopt(trim_threshold, largest))


def describe_machine() -> dict[str, Any]:
    """pytest-benchmark's account of the machine, without the host's name, plus what it lacks."""
    from gossamer import _C

    info: dict[str, Any] = pytest_benchmark_generate_machine_info()
    info.pop("node", None)
    return info | {
        "cores": cores(),
        "caches": caches(),
        "busy_cores_before": busy_cores(),
        "instruction_sets": _C.machine_targets(),
        "target": _C.target(),
    }


def describe_versions() -> dict[str, str]:
    """Versions of everything whose speed is compared."""
    found = {"python": sys.version.split()[0]}
    for package in ("gossamer", "torch", "numpy", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    for line in torch.__config__.show().splitlines():
        if "Math Kernel Library" in line or "MKL-DNN" in line:
            name = "mkl" if "Math Kernel Library" in line else "onednn"
            found[name] = line.strip(" -")
    return found


def cpu_name(cpu: dict[str, Any]) -> str:
    """A short name for records: the core's where it is known, else the vendor's name for it."""
    vendor, family = cpu.get("vendor_id_raw"), cpu.get("family")
    known = CORES.get((vendor, family, cpu.get("model"))) or CORES.get((vendor, family, None))
    return f"cpu-{known or slug(cpu.get('brand_raw', 'unknown'))}"


def slug(text: str) -> str:
    """Lower case, with a hyphen for everything that is no letter or digit."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def describe_commit(folder: Path = ROOT, named: str | None = None) -> dict[str, Any]:
    """The checkout's commit, by another name where one is given.

    ``id`` is "unversioned" outside git or before the first commit.
    """

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        return {
            "id": named or git("rev-parse", "HEAD"),
            "time": git("show", "-s", "--format=%cI", "HEAD"),
            "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
        }
    except (OSError, subprocess.CalledProcessError):
        return {"id": named or "unversioned", "time": None, "dirty": False}


@dataclass(frozen=True)
class Limits:
    """What the machine was measured to reach with ``threads`` threads.

    ``flops`` holds FLOP/s by dtype, multiply-add chains in registers; ``read`` holds bytes/s by
    buffer size in bytes, so each level of the memory hierarchy has its own.
    """

    threads: int
    flops: dict[str, float]
    read: dict[int, float]

    @classmethod
    def measure(cls, dtypes: list[str], threads: int) -> Limits:
        from gossamer import _C

        return cls(
            threads,
            {dtype: _C.measure_peak(dtype, threads) for dtype in dtypes},
            {size: _C.measure_read_bandwidth(size, threads) for size in BUFFERS},
        )

    def read_at(self, size: float) -> float:
        """Bytes/s for a buffer of ``size`` bytes, interpolated on logarithmic axes."""
        points = sorted(self.read.items())
        if size <= points[0][0]:
            return points[0][1]
        for (small, fast), (large, slow) in itertools.pairwise(points):
            if size <= large:
                share = math.log(size / small) / math.log(large / small)
                return math.exp((1 - share) * math.log(fast) + share * math.log(slow))
        return points[-1][1]

    def seconds(self, dtype: str, operations: float, size: float, *, cold: bool = False) -> float:
        """The least time for so many operations on so many bytes, all of which are read once.

        The bytes come from the level of memory that holds as many, or from the last if ``cold``.
        """
        speed = self.read_at(max(self.read) if cold else size)
        return max(operations / self.flops[dtype], size / speed)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
