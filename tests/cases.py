"""Shapes that hit mechanisms, weights with every kind of group, and the one table of tolerances."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from gossamer import reference
from gossamer.formats import Sparse24, Sparse24Quantized
from gossamer.prune import magnitude_24
from torch import Tensor, nn

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
VALUE_TYPES = ("int8", "float8_e4m3fn", "int4")
# Those with block-sparse kernels of their own (csrc/blocksparse/conv.cpp); any other runs those of
# the best one below it. tests/test_blocksparse_targets.py fails where this list is not up to date.
BLOCKSPARSE_TARGETS = ("serial", "avx2", "avx512", "amx_bf16")
# The same of csrc/actsparse/products.cpp.
ACTSPARSE_TARGETS = ("serial", "avx2", "avx512", "avx512_bf16")
# The same of csrc/csr/csr.cpp.
CSR_TARGETS = ("serial", "avx2", "avx512")

# (M, N, K), by what a kernel has to get right.
SHAPES = (
    (1, 1, 1),  # nothing but padding
    (2, 3, 2),
    (3, 5, 3),
    (1, 16, 4),
    (2, 17, 5),  # one row of W past a block of 16
    (7, 2, 6),
    (4, 33, 7),
    (1, 16, 32),  # one record exactly: a single row is read in place
    (5, 31, 33),  # one column past a record
    (1, 100, 260),  # single row, K tail of one group
    (16, 48, 64),  # a full tile of few rows
    (17, 16, 96),  # two uneven tiles of few rows
    (32, 40, 128),  # the last batch for the few-rows kernels of AVX2,
    (33, 40, 128),  # and the first for its many-rows kernels
    (56, 40, 128),  # the same for AVX-512
    (57, 40, 128),
    (97, 65, 259),  # several passes over K, with tails everywhere
    (200, 50, 72),  # more rows than one tile holds
    (64, 520, 516),  # several tasks a thread
    (531, 20, 2500),  # rounds of rows whose packed x fits the caches, the last one short
)

# For each dtype: the unit roundoff of the sum and of the result. 16-bit types multiply exactly
# and are summed in float32; the result is rounded once more to the type.
_ROUNDOFF = {
    torch.float64: (2.0**-53, 2.0**-53),
    torch.float32: (2.0**-24, 2.0**-24),
    torch.bfloat16: (2.0**-24, 2.0**-8),
    torch.float16: (2.0**-24, 2.0**-11),
}
# Results below the normal range are rounded to steps of this size.
_STEP = {
    torch.float64: 0.0,
    torch.float32: 2.0**-126,
    torch.bfloat16: 2.0**-126,
    torch.float16: 2.0**-24,
}


class Oracle:
    """``reference.sparse24_linear`` in float64, and how far a kernel may be from it.

    The roundings of a sum of n products are independent and each is at most u times the partial
    sum, so they add up to about sqrt(n) u times S = |x| |W|ᵀ + |b| at the worst (all terms of one
    sign); the activations (slope at most 1.13) add a few u S. One lost product would be S / n.
    """

    def __init__(
        self,
        x: Tensor,
        weight: Sparse24,
        bias: Tensor | None = None,
        activation: str | None = None,
    ) -> None:
        x, values = x.detach().double(), weight.values.detach().double()
        bias = None if bias is None else bias.detach().double()
        self.dtype = weight.dtype
        with one_thread():
            self.y = reference.sparse24_linear(
                x, values, weight.indices, bias, weight.in_features, activation
            )
            # Columns that are not finite only meet zeros where the result is finite.
            size = _finite_abs(x) @ _finite_abs(weight.to_dense().detach().double()).t()
        size = size if bias is None else size + _finite_abs(bias)
        self._allow(size, values.shape[1])

    def _allow(self, size: Tensor, products: int) -> None:
        sum_roundoff, result_roundoff = _ROUNDOFF[self.dtype]
        self.limit = (8 + math.sqrt(products)) * sum_roundoff * size
        self.limit += result_roundoff * self.y.abs() + _STEP[self.dtype]

    def check(self, actual: Tensor) -> None:
        """Assert that every entry of ``actual`` is as close as its roundings allow."""
        assert (actual.dtype, actual.shape) == (self.dtype, self.y.shape)
        actual, y = actual.detach().double(), self.y
        same = torch.where(y.isfinite(), (actual - y).abs() <= self.limit, actual == y)
        same |= y.isnan() & actual.isnan()
        if bool(same.all()):
            return
        at = tuple((~same).nonzero()[0].tolist())
        raise AssertionError(
            f"{int((~same).sum())} of {same.numel()} entries differ, the first at {list(at)}: "
            f"{float(actual[at])} for {float(y[at])}, allowed {float(self.limit[at]):.3g}"
        )


class QuantizedOracle(Oracle):
    """The same for ``sparse24_linear_quantized``, of the x that is multiplied.

    Where the weight has 8 bits, that is what ``reference.quantize_rows`` makes of a floating x.
    Sums of int8 are exact, which leaves the roundings of the scales.
    """

    def __init__(
        self,
        x: Tensor,
        weight: Sparse24Quantized,
        bias: Tensor | None = None,
        activation: str | None = None,
        x_scale: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> None:
        self.dtype = x.dtype if out_dtype is None else out_dtype
        if x_scale is None and weight.value_type != "int4":
            x, x_scale = reference.quantize_rows(x, weight.values.dtype)
        x = x.double() if x_scale is None else x.double() * x_scale.double().unsqueeze(-1)
        numbers, scales = weight.numbers(), weight.scales.double()
        bias = None if bias is None else bias.double()
        shape = (weight.in_features, weight.group)
        with one_thread():
            self.y = reference.sparse24_linear_quantized(
                x, None, numbers, weight.indices, scales, bias, *shape, activation
            )
            size = reference.sparse24_linear_quantized(
                _finite_abs(x), None, numbers.double().abs(), weight.indices, scales, None, *shape
            )
        size = size if bias is None else size + _finite_abs(bias)
        products = 0 if weight.value_type == "int8" else numbers.shape[1]
        sum_roundoff = _ROUNDOFF[torch.float32][0]
        if weight.value_type == "float8_e4m3fn" and x.is_cuda:
            # Tensor cores keep 13 bits below the leading one of the largest term.
            sum_roundoff = 2.0**-13
        self.limit = (8 + math.sqrt(products)) * sum_roundoff * size
        self.limit += _ROUNDOFF[self.dtype][1] * self.y.abs() + _STEP[self.dtype]


class SumOracle(Oracle):
    """The same for any sum of products, of its value and that of the absolute ones in float64."""

    def __init__(self, y: Tensor, size: Tensor, products: int, dtype: torch.dtype) -> None:
        self.y, self.dtype = y, dtype
        self._allow(size, products)


@contextmanager
def one_thread() -> Iterator[None]:
    """The reference is a long row of small products: on a busy machine, teams wait at each."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _finite_abs(t: Tensor) -> Tensor:
    return t.abs().nan_to_num(nan=0.0, posinf=0.0)


def dense_24(out_features: int, in_features: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A 2:4 weight with groups of two, one and no non-zeros, and some -0.0 among the zeros."""
    weight = magnitude_24(torch.randn(out_features, in_features))
    weight[torch.rand_like(weight) < 0.2] = 0.0
    weight[(weight == 0) & (torch.rand_like(weight) < 0.2)] = -0.0
    return weight.to(dtype)


def sparse_24(out_features: int, in_features: int, dtype: torch.dtype = torch.float32) -> Sparse24:
    return Sparse24.from_dense(dense_24(out_features, in_features, dtype))


def integers(*shape: int, limit: int, dtype: torch.dtype) -> Tensor:
    """Whole numbers of at most ``limit``: every sum of a few thousand products of them is exact."""
    return torch.randint(-limit, limit + 1, shape).to(dtype)


def quantized_24(
    out_features: int, in_features: int, value_type: str, group: int | None = None
) -> Sparse24Quantized:
    return Sparse24Quantized.from_sparse24(sparse_24(out_features, in_features), value_type, group)


def bits(t: Tensor) -> Tensor:
    """The bytes themselves, flat: tells -0.0 from 0.0, and torch compares no float8 tensors."""
    return t.detach().contiguous().view(-1).view(torch.uint8)


def same_state(a: nn.Module, b: nn.Module) -> bool:
    """Whether two state_dicts hold the same bytes under the same names."""
    ours, theirs = a.state_dict(), b.state_dict()
    equal = (torch.equal(bits(ours[key]), bits(theirs[key])) for key in ours)
    return list(ours) == list(theirs) and all(equal)
