"""2:4 layers of 8-bit and 4-bit values against dense ones, and torch's own quantised products."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from bench_sparse24 import check_answer
from gossamer import _C, sparse24_linear, sparse24_linear_quantized
from gossamer.formats import (
    Sparse24,
    Sparse24Panels,
    Sparse24Quantized,
    Sparse24QuantizedPanels,
)
from gossamer.ops import quantize_rows
from gossamer.prune import magnitude_24
from machine import Limits
from record import OURS, Case
from rivals import dense_linears
from shapes import DTYPES, TOLERANCES, LinearShape
from timing import Contender, Effort, Ratio, measure, speedup
from torch import Tensor

VALUE_TYPES = ("int8", "float8_e4m3fn", "int4")
ROWS, QUICK_ROWS = (1, 4, 16, 64, 256), (1, 64)
QUICK_LAYERS = ("llama.attention",)
UNQUANTISED = "2:4 of x's dtype"
DYNAMIC_INT8, INT8_WEIGHTS, INT4_WEIGHTS = "torch dynamic int8", "torch int8 weights", "torch int4"


@dataclass(frozen=True)
class QuantizedCase(Case):
    """A layer with one type of values; ``dtype`` is that of x and y."""

    value_type: str

    @property
    def name(self) -> str:
        return f"{super().name}/{self.value_type}"

    @property
    def place(self) -> str:
        return f"{super().place}, {self.rows} rows"

    @property
    def point(self) -> tuple[str, str]:
        return self.value_type, "values"

    @property
    def params(self) -> dict[str, Any]:
        return super().params | {"value_type": self.value_type}

    @property
    def against_unquantised(self) -> Ratio:
        return speedup(self.ours, self.timings[UNQUANTISED])

    def finding(self) -> dict[str, Any]:
        ratio = self.against_unquantised
        return super().finding() | {"against_unquantised": ratio.__dict__}


@dataclass(frozen=True)
class QuantizedPlan:
    """Which cases to run, and how."""

    shapes: Sequence[LinearShape]
    rows: Sequence[int]
    dtypes: Sequence[str]
    effort: Effort
    value_types: Sequence[str] = VALUE_TYPES

    def __len__(self) -> int:
        sizes = (self.shapes, self.rows, self.dtypes, self.value_types)
        return math.prod(len(size) for size in sizes)


def _dynamic_int8(weight: Tensor, _: torch.dtype) -> Callable[[Tensor], Tensor]:
    scales = weight.abs().amax(1) / 127
    with warnings.catch_warnings():  # torch prefers another package for making such weights
        warnings.simplefilter("ignore")
        zeros = torch.zeros(len(weight), dtype=torch.int64)
        quantised = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
        packed = torch.ops.quantized.linear_prepack(quantised, None)
    return lambda x: torch.ops.quantized.linear_dynamic(x, packed)


def _int8_weights(weight: Tensor, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    scales = weight.abs().amax(1) / 127
    numbers = (weight / scales[:, None]).round().to(torch.int8)
    scales = scales.to(dtype)
    return lambda x: torch._weight_int8pack_mm(x, numbers, scales)


def _int4_weights(weight: Tensor, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    group = 128
    scales = weight.view(len(weight), -1, group).abs().amax(2) / 7
    numbers = (weight / scales.repeat_interleave(group, 1)).round().clamp(-8, 7) + 8
    packed = torch._convert_weight_to_int4pack_for_cpu(numbers.int(), 1)
    with_zeros = torch.stack([scales, torch.zeros_like(scales)], 2).transpose(0, 1)
    with_zeros = with_zeros.contiguous().to(dtype)
    return lambda x: torch._weight_int4pack_mm_for_cpu(x, packed, group, with_zeros)


_TORCH_WAYS = {
    DYNAMIC_INT8: _dynamic_int8,
    INT8_WEIGHTS: _int8_weights,
    INT4_WEIGHTS: _int4_weights,
}


def torch_quantised(weight: Tensor, x: Tensor) -> list[Contender]:
    """The quantised products torch has for this x, of the dense weight rounded as ours is."""
    found = []
    for name, make in _TORCH_WAYS.items():
        try:
            run = partial(make(weight.float(), x.dtype), x)
            run()
        except (RuntimeError, AttributeError, NotImplementedError):
            continue  # not of this dtype or shape, not in this build, not on this machine
        found.append(Contender(name, run))
    return found


def _answer(x: Tensor, weight: Sparse24Quantized) -> Tensor:
    """x as the layer rounds it, times the weight that the values stand for."""
    given = x.float()
    if weight.value_type != "int4":
        numbers, scale = quantize_rows(x, weight.values.dtype)
        given = numbers.float() * scale.unsqueeze(-1)
    return F.linear(given, weight.to_dense())


def run_case(
    shape: LinearShape,
    dense: Tensor,
    rows: int,
    value_type: str,
    others: Sequence[Contender],
    x: Tensor,
    plan: QuantizedPlan,
    limits: Limits,
) -> QuantizedCase:
    """Check one case, then time it."""
    sparse = Sparse24.from_dense(magnitude_24(dense))
    weight = Sparse24Quantized.from_sparse24(sparse, value_type)
    packed = Sparse24QuantizedPanels.from_quantized(weight)
    ours = Contender(OURS, partial(sparse24_linear_quantized, x, packed))
    check = check_answer(ours.run(), _answer(x, weight), TOLERANCES[x.dtype])
    panels = Sparse24Panels.from_sparse24(sparse)
    unquantised = Contender(UNQUANTISED, partial(sparse24_linear, x, panels))
    timings = measure([ours, unquantised, *others], plan.effort)
    dtype = str(x.dtype).removeprefix("torch.")
    flops = 2 * rows * shape.out_features * shape.in_features
    activations = x.nbytes + rows * shape.out_features * x.itemsize
    nbytes = packed.nbytes + activations
    return QuantizedCase(
        feature="quantized",
        shape=shape,
        dtype=dtype,
        rows=rows,
        kernel=_C.target(),
        check=check,
        timings=timings,
        best_dense=min((c.name for c in others), key=lambda name: timings[name].median),
        dense_flops=flops,
        real_flops=flops // 2,
        nbytes=nbytes,
        peak_flops=limits.flops[dtype],
        limit_seconds=limits.seconds(dtype, 0, nbytes),
        dense_limit_seconds=limits.seconds(dtype, flops, dense.nbytes + activations),
        value_type=value_type,
    )


def run(plan: QuantizedPlan, limits: Limits) -> Iterator[QuantizedCase]:
    """All cases of the plan, those of one shape and number of rows together."""
    with torch.no_grad():
        for dtype, shape in itertools.product(plan.dtypes, plan.shapes):
            generator = torch.Generator().manual_seed(0)
            size = (shape.out_features, shape.in_features)
            dense = (torch.randn(size, generator=generator) / size[1] ** 0.5).to(DTYPES[dtype])
            for rows in plan.rows:
                x = torch.randn(rows, shape.in_features, generator=generator).to(dense.dtype)
                others = [*dense_linears([dense], x), *torch_quantised(dense, x)]
                for value_type in plan.value_types:
                    yield run_case(shape, dense, rows, value_type, others, x, plan, limits)
