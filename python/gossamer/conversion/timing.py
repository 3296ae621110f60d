"""How a layer is called by a sample, how fast dense and sparse answer, and how close they are."""

from __future__ import annotations

import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.hooks import RemovableHandle

from ..ops.conv_operands import LAST, is_channels_last
from .eligibility import dtype_name
from .kinds import is_conv, unit_dims

# Inputs kept per layer and shape: enough rows for an honest error, few enough for any model.
_KEPT_ROWS, _KEPT_BYTES, _KEPT_SHAPES = 64, 16 << 20, 8
# Where calls differ in rows or shape, only the commonest are timed.
_GIVEN_MAX = 4
# A comparison ends after this many seconds, but has at least and at most so many rounds.
_SECONDS, _ROUNDS_MIN, _ROUNDS_MAX = 0.2, 7, 200


class Given(NamedTuple):
    """An x: rows, or images of a convolution, all of this shape."""

    rows: int
    shape: tuple[int, ...]
    channels_last: bool = False


@dataclass
class Calls:
    """What one layer was given: how often what kind of x, first rows of each, autocast's dtype.

    ``unit_dims`` is how many of the last dimensions of x make a row.
    """

    unit_dims: int = 1
    given: Counter[Given] = field(default_factory=Counter)
    inputs: dict[tuple[int, ...], Tensor] = field(default_factory=dict)
    autocast: torch.dtype | None = None

    def record(self, x: Tensor) -> None:
        if x.numel() == 0:
            return
        shape = tuple(x.shape[-self.unit_dims :])
        if shape not in self.inputs:
            if len(self.inputs) == _KEPT_SHAPES:
                return
            if not self.inputs and torch.is_autocast_enabled(x.device.type):
                self.autocast = torch.get_autocast_dtype(x.device.type)
            rows = x.detach().reshape(-1, *shape)
            kept = max(1, min(_KEPT_ROWS, _KEPT_BYTES // rows[0].nbytes))
            self.inputs[shape] = rows[:kept].clone()
        is_images = x.dim() in LAST and x.dim() == self.unit_dims + 1
        is_last = is_images and is_channels_last(x)
        self.given[Given(x.numel() // math.prod(shape), shape, is_last)] += 1

    @property
    def commonest(self) -> Given | None:
        """The x of most calls, or None without any."""
        return self.given.most_common(1)[0][0] if self.given else None

    def example(self, given: Given) -> Tensor:
        """An x like one of the calls."""
        kept = self.inputs[given.shape]
        # Real rows, repeated: zeros and denormals in the data are part of the speed.
        x = kept[torch.arange(given.rows, device=kept.device) % kept.shape[0]]
        return x.contiguous(memory_format=LAST[x.dim()]) if given.channels_last else x


def record_calls(
    model: nn.Module, layers: Iterable[nn.Module], sample_input: Any
) -> dict[nn.Module, Calls]:
    """Runs the sample once, in evaluation mode, and leaves the model as it was.

    Raises
    ------
    TypeError
        The sample is no tensor, tuple, list or dict of keyword arguments.
    """
    calls: dict[nn.Module, Calls] = {layer: Calls(unit_dims(layer)) for layer in layers}

    def record(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any) -> None:
        x = args[0] if args else kwargs["input"]
        if isinstance(x, Tensor) and not x.is_nested:
            calls[layer].record(x)

    hooks = [layer.register_forward_hook(record, with_kwargs=True) for layer in calls]
    run_sample(model, sample_input, hooks)
    return calls


def misfits(
    model: nn.Module, layers: Iterable[nn.Module], sample_input: Any
) -> dict[nn.Module, str]:
    """The layers that get an x of another dtype than their weight, in words; runs the sample.

    A model may cast x to the dtype of a weight where that is a tensor, and there alone.
    """
    found: dict[nn.Module, str] = {}

    def cast(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x, dtype = args[0] if args else kwargs["input"], layer.weight.dtype
        if x.dtype == dtype or torch.is_autocast_enabled(x.device.type):
            return None
        own, given = dtype_name(dtype), dtype_name(x.dtype)
        found[layer] = f"the model gives it {given}, its weight is {own}"
        x = x.to(dtype)  # so that one run finds them all
        return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "input": x})

    hooks = [layer.register_forward_pre_hook(cast, with_kwargs=True) for layer in layers]
    run_sample(model, sample_input, hooks)
    return found


def run_sample(model: nn.Module, sample_input: Any, hooks: Iterable[RemovableHandle] = ()) -> None:
    """Calls the model with the sample once, and removes these hooks."""
    try:
        run_evaluating(model, *arguments_of("convert: sample_input", sample_input))
    finally:
        for hook in hooks:
            hook.remove()


def arguments_of(what: str, sample: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of a call.

    Raises
    ------
    TypeError
        The sample is no tensor, tuple, list or dict of keyword arguments.
    """
    if isinstance(sample, Mapping):
        return (), dict(sample)
    if isinstance(sample, (tuple, list)):
        return tuple(sample), {}
    if isinstance(sample, Tensor):
        return (sample,), {}
    raise TypeError(
        f"{what} is a tensor, a tuple of arguments or a dict of keyword arguments, got "
        f"{type(sample).__name__}"
    )


def run_evaluating(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Calls a model in evaluation mode, and leaves it and the random numbers as they were."""
    was_training = {module: module.training for module in model.modules()}
    try:
        # Not model.eval(): models override train(), and only the flags are to be put back.
        for module in was_training:
            module.training = False
        with torch.random.fork_rng(devices=[]), _uncompiled():
            model(*args, **kwargs)
    finally:
        for module, training in was_training.items():
            module.training = training


@dataclass(frozen=True)
class Speed:
    """Medians, in seconds, summed over the calls that one run of the sample makes."""

    dense_seconds: float
    sparse_seconds: float

    @property
    def ratio(self) -> float:
        return self.dense_seconds / self.sparse_seconds


def measure_speed(dense: nn.Module, sparse: nn.Module, calls: Calls) -> Speed:
    """Times both layers on x like those of the recorded calls."""
    totals = [0.0, 0.0]
    with _autocast(calls):
        for given, count in calls.given.most_common(_GIVEN_MAX):
            x = calls.example(given)
            clock = _cuda_clock(x.device) if x.is_cuda else _seconds
            medians = _medians([partial(dense, x), partial(sparse, x)], clock)
            totals = [t + count * seconds for t, seconds in zip(totals, medians, strict=True)]
    return Speed(*totals)


def output_error(
    dense: nn.Module, weight: Tensor, sparse: nn.Module, calls: Calls | None
) -> tuple[float, float]:
    """Largest and mean absolute difference to the dense layer with the same weight."""
    if calls is None or not calls.inputs:
        calls = Calls(inputs={(): _noise(dense, weight)})
    x = next(iter(calls.inputs.values()))
    with _autocast(calls):
        expected = functional_call(dense, {"weight": weight}, (x,))
        difference = (sparse(x).float() - expected.float()).abs()
    return difference.max().item(), difference.mean().item()


def noise_shape(dense: Any) -> tuple[int, ...]:
    """A few rows, or images in which the kernel has some room along each axis."""
    if not is_conv(dense):
        return (16, dense.in_features)
    padding = (0,) * len(dense.kernel_size)
    padding = padding if isinstance(dense.padding, str) else dense.padding
    room = zip(dense.kernel_size, dense.dilation, padding, strict=True)
    return (2, dense.in_channels, *(d * k + p + 8 for k, d, p in room))


def _noise(dense: nn.Module, weight: Tensor) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(0)
    return torch.randn(noise_shape(dense), generator=generator, device="cpu").to(weight)


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
    if calls.autocast is None:
        return nullcontext()
    device = next(iter(calls.inputs.values())).device
    return torch.autocast(device.type, dtype=calls.autocast)
