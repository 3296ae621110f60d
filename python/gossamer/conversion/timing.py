"""How a layer is called by a sample, how fast dense and sparse answer, and how close they are."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Inputs kept per layer: enough rows for an honest error, few enough for any model.
_KEPT_ROWS = 64
# Where calls differ in rows, only the commonest are timed.
_ROW_COUNTS_MAX = 4
# A comparison ends after this many seconds, but has at least and at most so many rounds.
_SECONDS, _ROUNDS_MIN, _ROUNDS_MAX = 0.2, 7, 200


@dataclass
class Calls:
    """What one layer was given: rows of x of each call, first rows, and autocast's dtype."""

    rows: Counter[int] = field(default_factory=Counter)
    inputs: Tensor | None = None
    autocast: torch.dtype | None = None

    def record(self, x: Tensor) -> None:
        flat = x.detach().reshape(-1, x.shape[-1])
        if flat.shape[0] == 0:
            return
        self.rows[flat.shape[0]] += 1
        if self.inputs is None:
            self.inputs = flat[:_KEPT_ROWS].clone()
            if torch.is_autocast_enabled(flat.device.type):
                self.autocast = torch.get_autocast_dtype(flat.device.type)


def record_calls(
    model: nn.Module, layers: Iterable[nn.Module], sample_input: Any
) -> dict[nn.Module, Calls]:
    """Runs the sample once, in evaluation mode, and leaves the model as it was.

    Raises
    ------
    TypeError
        The sample is no tensor, tuple, list or dict of keyword arguments.
    """
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(sample_input, Mapping):
        kwargs = dict(sample_input)
    elif isinstance(sample_input, (tuple, list)):
        args = tuple(sample_input)
    elif isinstance(sample_input, Tensor):
        args = (sample_input,)
    else:
        raise TypeError(
            "convert: sample_input is a tensor, a tuple of arguments or a dict of keyword "
            f"arguments, got {type(sample_input).__name__}"
        )
    calls: dict[nn.Module, Calls] = {layer: Calls() for layer in layers}

    def record(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any) -> None:
        x = args[0] if args else kwargs["input"]
        if isinstance(x, Tensor) and not x.is_nested:
            calls[layer].record(x)

    was_training = {module: module.training for module in model.modules()}
    hooks = [layer.register_forward_hook(record, with_kwargs=True) for layer in calls]
    try:
        # Not model.eval(): models override train(), and only the flags are to be put back.
        for module in was_training:
            module.training = False
        with torch.random.fork_rng(devices=[]), _uncompiled():
            model(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in was_training.items():
            module.training = training
    return calls


@dataclass(frozen=True)
class Speed:
    """Medians, in seconds, summed over the calls that one run of the sample makes."""

    dense_seconds: float
    sparse_seconds: float

    @property
    def ratio(self) -> float:
        return self.dense_seconds / self.sparse_seconds


def measure_speed(dense: nn.Module, sparse: nn.Module, calls: Calls) -> Speed:
    """Times both layers on as many rows as each recorded call had."""
    assert calls.inputs is not None
    totals = [0.0, 0.0]
    with _autocast(calls):
        for rows, count in calls.rows.most_common(_ROW_COUNTS_MAX):
            x = _with_rows(calls.inputs, rows)
            clock = _cuda_clock(x.device) if x.is_cuda else _seconds
            medians = _medians([partial(dense, x), partial(sparse, x)], clock)
            totals = [t + count * seconds for t, seconds in zip(totals, medians, strict=True)]
    return Speed(*totals)


def output_error(
    weight: Tensor, bias: Tensor | None, sparse: nn.Module, calls: Calls | None
) -> tuple[float, float]:
    """Largest and mean absolute difference to F.linear with the same weight."""
    if calls is None or calls.inputs is None:
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(16, weight.shape[1], generator=generator)
        calls = Calls(inputs=noise.to(weight))
    x = calls.inputs
    assert x is not None
    with _autocast(calls):
        difference = (sparse(x).float() - F.linear(x, weight, bias).float()).abs()
    return difference.max().item(), difference.mean().item()


def _with_rows(kept: Tensor, rows: int) -> Tensor:
    # Real rows, repeated: zeros and denormals in the data are part of the speed.
    return kept[torch.arange(rows, device=kept.device) % kept.shape[0]]


def _seconds(function: Callable[[], Tensor]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _cuda_clock(device: torch.device) -> Callable[[Callable[[], Tensor]], float]:
    """Seconds of a call in a running model: of its kernels, or of their launch if that is longer.

    Between two calls of a layer the rest of the model goes through the L2, so it starts cold. What
    clears it also keeps the GPU busy while the call is launched.
    """
    l2_bytes: int = torch.cuda.get_device_properties(device).L2_cache_size
    other = torch.empty(2 * l2_bytes, dtype=torch.uint8, device=device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    stream = torch.cuda.current_stream(device)  # the default is that of the current device

    def seconds(function: Callable[[], Tensor]) -> float:
        other.zero_()
        start.record(stream)
        launch = _seconds(function)
        end.record(stream)
        end.synchronize()
        return max(launch, 1e-3 * start.elapsed_time(end))

    return seconds


def _medians(
    functions: list[Callable[[], Tensor]], clock: Callable[[Callable[[], Tensor]], float]
) -> list[float]:
    """Medians of interleaved runs, so that whatever else the machine does hits all alike."""
    for function in functions:
        function()
        function()
    seconds: list[list[float]] = [[] for _ in functions]
    begin = time.perf_counter()
    while len(seconds[0]) < _ROUNDS_MIN or (
        len(seconds[0]) < _ROUNDS_MAX and time.perf_counter() - begin < _SECONDS
    ):
        for function, mine in zip(functions, seconds, strict=True):
            mine.append(clock(function))
    return [median(mine) for mine in seconds]


def _uncompiled() -> AbstractContextManager[Any]:
    # What torch.compile() made before knows nothing of new hooks; nor is there a need to load the
    # compiler where nothing is compiled.
    loaded = "torch._dynamo" in sys.modules
    return torch.compiler.set_stance("force_eager") if loaded else nullcontext()


def _autocast(calls: Calls) -> AbstractContextManager[Any]:
    if calls.autocast is None or calls.inputs is None:
        return nullcontext()
    return torch.autocast(calls.inputs.device.type, dtype=calls.autocast)
