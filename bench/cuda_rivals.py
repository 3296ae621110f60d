"""A 2:4 layer's rivals on a GPU: cuBLAS, CUTLASS, cuSPARSE; cuSPARSELt is in cusparselt.py.

A rival that cannot run is not left out in silence: what it said is part of the record.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from cuda_shapes import GpuDtype
from cuda_timing import Contender, first_line
from torch import Tensor

DENSE = "dense"
CUSPARSELT = "cusparselt"
DEFAULT = "F.linear"
WRONG = "wrong result"
INT_MM_ROWS = 32  # torch._int_mm wants more than 16


@dataclass(frozen=True)
class Operands:
    """The operands of a case; weights and x come in as many copies as their contender needs."""

    dtype: GpuDtype
    weight: Tensor  # [N, K], 2:4, with its zeros
    x: Tensor  # [M, K]

    @property
    def rows(self) -> int:
        return self.x.shape[0]


@dataclass
class Rivals:
    """Contenders for a case, and the reasons of those that are missing."""

    contenders: list[Contender] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)

    def attempt(self, name: str, make: Callable[[], Contender]) -> Contender | None:
        """Make a contender and let it compute once; if that fails, keep what it said."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # prototypes and betas say so
                contender = make()
                with contender.session():
                    contender.calls[0]()
        except Exception as error:  # whatever a library raises, it is not there for this case
            self.missing[name] = first_line(error)
            return None
        self.contenders.append(contender)
        return contender


def clones(tensor: Tensor, count: int) -> list[Tensor]:
    return [tensor, *(tensor.clone() for _ in range(1, count))]


def padded_rows(x: Tensor, least: int) -> Tensor:
    """x with zero rows up to a multiple of ``least``: done before the clock starts."""
    return F.pad(x, (0, 0, 0, -x.shape[0] % least))


@contextmanager
def blas_library(name: str) -> Iterator[None]:
    before = torch.backends.cuda.preferred_blas_library()
    torch.backends.cuda.preferred_blas_library(name)
    try:
        yield
    finally:
        torch.backends.cuda.preferred_blas_library(before)


# ---- dense ---------------------------------------------------------------------------------------


def add_dense(rivals: Rivals, o: Operands, copies: int) -> None:
    """Every dense way torch has: cuBLAS and cuBLASLt, for 8-bit types with scales of one."""
    kind = o.dtype.dtype
    if kind is torch.int8:
        _add_int8(rivals, o, copies)
    elif o.dtype.quantised:
        _add_float8(rivals, o, copies)
    else:
        xs, weights = clones(o.x, copies), clones(o.weight, copies)
        calls = [partial(F.linear, x, w) for x, w in zip(xs, weights, strict=True)]
        rivals.attempt(DEFAULT, lambda: Contender(DEFAULT, DENSE, calls))
        if o.x.is_cuda:
            library = partial(blas_library, "cublaslt")
            rivals.attempt("cuBLASLt", lambda: Contender("cuBLASLt", DENSE, calls, session=library))


def _add_float8(rivals: Rivals, o: Operands, copies: int) -> None:
    one = torch.ones((), device=o.x.device)
    weights = [w.t() for w in clones(o.weight, copies)]

    def product(x: Tensor, w: Tensor, fast: bool) -> Tensor:
        return torch._scaled_mm(
            x, w, scale_a=one, scale_b=one, out_dtype=o.dtype.out, use_fast_accum=fast
        )

    ways = [("_scaled_mm", o.x, True), ("_scaled_mm, exact sums", o.x, False)]
    if o.rows % 16:
        padded = padded_rows(o.x.view(torch.uint8), 16).view(o.x.dtype)
        ways.append(("_scaled_mm, 16 rows", padded, True))
    for name, x, fast in ways:
        xs = clones(x, copies)
        calls = [partial(product, x, w, fast) for x, w in zip(xs, weights, strict=True)]
        contender = Contender(name, DENSE, calls, lambda y: y[: o.rows])
        rivals.attempt(name, lambda contender=contender: contender)


def _add_int8(rivals: Rivals, o: Operands, copies: int) -> None:
    """Without the step from int32 sums to the layer's dtype, which would cost it more."""
    least = INT_MM_ROWS if o.rows < INT_MM_ROWS else 8
    xs, weights = clones(padded_rows(o.x, least), copies), clones(o.weight, copies)
    calls = [partial(torch._int_mm, x, w.t()) for x, w in zip(xs, weights, strict=True)]
    contender = Contender("_int_mm", DENSE, calls, lambda y: y[: o.rows])
    rivals.attempt("_int_mm", lambda: contender)


# ---- others --------------------------------------------------------------------------------------


def add_cutlass(rivals: Rivals, o: Operands, copies: int, known: dict[GpuDtype, str]) -> None:
    """torch's CUTLASS kernels; ``known`` keeps the reason where they do not run at all."""
    name = "torch CUTLASS"

    def make(weight: Tensor, x: Tensor, count: int) -> Contender:
        sparse = torch.sparse.SparseSemiStructuredTensorCUTLASS.from_dense(weight)
        packed, meta = clones(sparse.packed, count), clones(sparse.meta, count)
        calls = [
            partial(torch._sparse_semi_structured_linear, x, p, m)
            for x, p, m in zip(clones(x, count), packed, meta, strict=True)
        ]
        return Contender(name, "cutlass", calls)

    if o.dtype not in known:
        # A small product first: to convert a large weight for kernels that refuse it takes long.
        trial = Rivals()
        weight = torch.tensor([1, 0, 0, 1], device=o.x.device).repeat(128, 32).to(o.dtype.dtype)
        trial.attempt(name, lambda: make(weight, weight, 1))
        known[o.dtype] = trial.missing.get(name, "")
    if known[o.dtype]:
        rivals.missing[name] = known[o.dtype]
    else:
        rivals.attempt(name, lambda: make(o.weight, o.x, copies))


def add_csr(rivals: Rivals, o: Operands, copies: int) -> None:
    """cuSPARSE's CSR product through CuPy, in float32: it has no 16-bit sparse matrices."""
    name = "cuSPARSE CSR float32"

    def make() -> Contender:
        from cupy_csr import CsrLinear, columns_of

        calls = []
        for _ in range(copies):
            csr = CsrLinear(o.weight)
            x = o.x.float()
            y = x.new_empty(o.rows, o.weight.shape[0])
            calls.append(partial(_csr_call, csr.product, columns_of(x), columns_of(y), y))
        return Contender(name, "csr", calls)

    rivals.attempt(name, make)


def _csr_call(product: Callable[[Any, Any], None], x: Any, y: Any, result: Tensor) -> Tensor:
    product(x, y)
    return result
