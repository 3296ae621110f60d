"""The GPU a record speaks of: its name, its state, and what it was measured to reach."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import product
from time import perf_counter
from typing import Any

import torch
from cuda_rivals import Operands, Rivals, add_dense
from cuda_shapes import DTYPES, GpuDtype
from cuda_timing import (
    Contender,
    GraphStopwatch,
    Rounds,
    first_line,
    graph_stopwatch,
    measure,
)
from cusparselt import add_cusparselt
from gossamer.prune import magnitude_24
from machine import slug
from torch import Tensor

SMI_FIELDS = (
    "driver_version",
    "clocks.sm",
    "clocks.max.sm",
    "clocks.mem",
    "power.draw",
    "power.limit",
    "temperature.gpu",
)
PROBE_BYTES = 2**31  # far beyond any L2
PROBE_SIDE = 8192  # of a square product: long enough to reach the peak, short of throttling
PROBE_SWEEP_SECONDS = 3.0
PROBE_ROUNDS = Rounds(budget=0.3, least=5, most=9)


def describe_gpu(device: torch.device) -> dict[str, Any]:
    """Name, capability, memory, L2, and what nvidia-smi says of driver, clocks and power."""
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "compute_capability": [properties.major, properties.minor],
        "multiprocessors": properties.multi_processor_count,
        "memory": properties.total_memory,
        "l2": l2_bytes(device),
        "cuda": torch.version.cuda,
        "cusparselt": _cusparselt_version(),
        "nvidia_smi": _nvidia_smi(),
    }


def gpu_name(name: str) -> str:
    """A short name for records: "h200" of "NVIDIA H200", "h100" of "NVIDIA H100 80GB HBM3"."""
    return slug(re.sub(r"NVIDIA|\b\d+ ?GB\b|HBM\w*|SXM\w*", "", name))


def l2_bytes(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).L2_cache_size)


def _cusparselt_version() -> int | None:
    try:
        return torch.backends.cusparselt.version()
    except Exception:  # a build without it
        return None


def _nvidia_smi() -> dict[str, str]:
    command = ["nvidia-smi", f"--query-gpu={','.join(SMI_FIELDS)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return {}
    values = done.stdout.splitlines()[0].split(", ")
    return dict(zip(SMI_FIELDS, values, strict=False))


class Sensors:
    """SM clock in MHz, power in W and temperature, where NVML is there to say."""

    def __init__(self, index: int) -> None:
        try:
            import pynvml

            pynvml.nvmlInit()
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            self._read: Callable[[], dict[str, float]] | None = lambda: {
                "sm_mhz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM),
                "watts": pynvml.nvmlDeviceGetPowerUsage(handle) / 1000,
                "celsius": pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU),
            }
            self._read()
        except Exception:  # no such package, no such library, or not allowed
            self._read = None

    def __call__(self) -> dict[str, float]:
        try:
            return self._read() if self._read else {}
        except Exception:
            return {}


@dataclass(frozen=True)
class GpuLimits:
    """What this GPU was measured to reach: bytes/s, and FLOP/s by dtype (a multiply-add is two).

    ``sparse_flops`` counts the zeros: FLOP/s of cuSPARSELt's best algorithm as if it were dense.
    """

    l2: int
    dram: float
    probes: dict[str, float] = field(default_factory=dict)
    dense_flops: dict[str, float] = field(default_factory=dict)
    sparse_flops: dict[str, float] = field(default_factory=dict)

    def seconds(self, dtype: str, flops: float, nbytes: float, sparse: bool = False) -> float:
        """The least time for a product of ``flops``, zeros counted, that moves ``nbytes`` once.

        A sparse one may take half the time of dense arithmetic at best.
        """
        peak = self.dense_flops.get(dtype)
        arithmetic = flops / peak / (2 if sparse else 1) if peak else 0.0
        return max(nbytes / self.dram, arithmetic)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure_limits(device: torch.device, dtypes: list[str]) -> GpuLimits:
    """DRAM bandwidth by three probes, and the peak of each dtype."""
    with torch.no_grad(), graph_stopwatch(device) as stopwatch:
        probes = _memory_probes(device, stopwatch)
    limits = GpuLimits(l2_bytes(device), max(probes.values()), probes)
    # int4 weights are multiplied in another dtype's arithmetic.
    plain = dict.fromkeys(
        next(n for n, d in DTYPES.items() if d.dtype is DTYPES[name].dtype and not d.weights)
        for name in dtypes
    )
    for name in plain:
        try:
            with torch.no_grad(), graph_stopwatch(device) as stopwatch:
                dense, sparse = _peaks(device, DTYPES[name], stopwatch)
        except RuntimeError as error:
            print(f"no peak of {name}: {first_line(error)}")
            continue
        if dense:
            limits.dense_flops[name] = dense
        if sparse:
            limits.sparse_flops[name] = sparse
    for peaks in (limits.dense_flops, limits.sparse_flops):
        peaks |= {
            name: peaks[other]
            for name, other in product(dtypes, tuple(peaks))
            if DTYPES[name].weights and DTYPES[other].dtype is DTYPES[name].dtype
        }
    return limits


def _memory_probes(device: torch.device, stopwatch: GraphStopwatch) -> dict[str, float]:
    data = torch.randn(PROBE_BYTES // 4, device=device)
    copy = torch.empty_like(data)
    rows = data.view(-1, 8192)
    vector = torch.randn(8192, device=device)
    ways: dict[str, tuple[Callable[[], Tensor], int]] = {
        "copy": (lambda: copy.copy_(data), 2),
        "read, amax": (lambda: data.amax(), 1),
        "read, matrix times vector": (lambda: rows @ vector, 1),
    }
    replays = {
        name: stopwatch.prepare(Contender(name, "probe", [call]), 1)
        for name, (call, _) in ways.items()
    }
    timings = measure(replays, stopwatch, PROBE_ROUNDS)
    return {name: ways[name][1] * PROBE_BYTES / timings[name].median for name in ways}


def _peaks(
    device: torch.device, dtype: GpuDtype, stopwatch: GraphStopwatch
) -> tuple[float | None, float | None]:
    """FLOP/s of a large dense product and of cuSPARSELt's best, on random data."""
    side = PROBE_SIDE
    numbers = torch.randn(side, side, device=device) * (40 if dtype.quantised else 1)
    x = torch.randn(side, side, device=device) * (40 if dtype.quantised else 1)
    numbers, x = (t.round() if dtype.dtype is torch.int8 else t for t in (numbers, x))
    if dtype.quantised:
        numbers, x = numbers.clamp(-127, 127), x.clamp(-127, 127)
    operands = Operands(dtype, magnitude_24(numbers).to(dtype.dtype), x.to(dtype.dtype))
    # The dense product is of numbers without the zeros: those would let it run faster.
    dense, sparse = Rivals(), Rivals()
    add_dense(dense, Operands(dtype, numbers.to(dtype.dtype), operands.x), 1)
    begin = perf_counter()
    add_cusparselt(
        sparse, operands, 1, lambda y: bool(y.isfinite().all()), stopwatch, 1, every=False,
        out_of_time=lambda: perf_counter() - begin > PROBE_SWEEP_SECONDS, drop=stopwatch.drop,
    )  # fmt: skip
    contenders = [*dense.contenders, *sparse.contenders]
    if not contenders:
        return None, None
    replays = {c.name: stopwatch.prepare(c, 1) for c in contenders}
    timings = measure(replays, stopwatch, PROBE_ROUNDS)
    flops = 2.0 * side**3

    def best(rivals: Rivals) -> float | None:
        return max((flops / timings[c.name].median for c in rivals.contenders), default=None)

    return best(dense), best(sparse)
