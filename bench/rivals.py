"""The dense ways torch has to compute a linear layer on a CPU, and its sparse one.

The best of the dense ones is what a sparse layer has to beat.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from timing import Contender
from torch import Tensor, nn

DEFAULT = "F.linear"  # what a model runs if nobody does anything about it
CSR, BSR, THROUGH_FLOAT32 = "torch CSR", "torch BSR", "through float32"

Linear = Callable[[Tensor], Tensor]  # x [M, K] -> y [M, N]


@contextmanager
def without_onednn() -> Iterator[None]:
    """Inside, torch's own dispatch does not use oneDNN: MKL where it has the dtype."""
    with warnings.catch_warnings():
        # The flags' setter also touches a TF32 switch, which warns where there is no Intel GPU.
        warnings.simplefilter("ignore", UserWarning)
        flags = torch.backends.mkldnn.flags(enabled=False)
        flags.__enter__()
    try:
        yield
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            flags.__exit__(None, None, None)


def _default(weight: Tensor, rows: int) -> Linear:
    return lambda x: F.linear(x, weight)


def _onednn_packed(weight: Tensor, rows: int) -> Linear:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    linear = torch.ops.mkldnn._linear_pointwise
    return lambda x: linear(x, packed, None, "none", [], "")


def _mkl_packed(weight: Tensor, rows: int) -> Linear:
    packed = torch.ops.mkl._mkl_reorder_linear_weight(weight, rows)
    linear = torch.ops.mkl._mkl_linear
    return lambda x: linear(x, packed, weight, None, rows)


def _through_float32(weight: Tensor, rows: int) -> Linear:
    """Weights kept in float32, inputs and outputs converted: more memory, but real arithmetic."""
    linear = _onednn_packed(weight.float(), rows)
    dtype = weight.dtype
    return lambda x: linear(x.float()).to(dtype)


def _csr(weight: Tensor, rows: int) -> Linear:
    csr = weight.to_sparse_csr()
    # MKL's indices are 32 bits wide: wider ones would be converted in every call.
    csr = torch.sparse_csr_tensor(
        csr.crow_indices().int(),
        csr.col_indices().int(),
        csr.values(),
        csr.shape,
        check_invariants=False,
    )
    if rows == 1:
        return lambda x: F.linear(x, csr)
    return lambda x: (csr @ x.t()).t()  # its fastest form from two rows on


def has_instructions_for(dtype: torch.dtype) -> bool:
    """Whether torch multiplies this dtype in hardware, as far as it can say."""
    if dtype is torch.bfloat16:
        return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", bool)())
    return dtype is torch.float32


def _rotate(
    make: Callable[[Tensor, int], Linear], weights: Sequence[Tensor], x: Tensor
) -> Callable[[], Tensor]:
    ready = [make(weight, x.shape[0]) for weight in weights]
    if len(ready) == 1:
        return lambda: ready[0](x)
    turns = itertools.cycle(ready)
    return lambda: next(turns)(x)


def dense_linears(weights: Sequence[Tensor], x: Tensor) -> list[Contender]:
    """Every dense way to compute ``F.linear(x, weight)`` that this torch and machine have.

    Parameters
    ----------
    weights : sequence of Tensor
        [N, K] copies of one weight, used in turn: more than one keeps caches cold.
    x : Tensor
        [M, K] of the same dtype.
    """
    dtype = x.dtype
    contenders = [Contender(DEFAULT, _rotate(_default, weights, x))]
    if torch.backends.mkldnn.is_available():
        contenders.append(
            Contender("without oneDNN", _rotate(_default, weights, x), without_onednn)
        )
    ways = {"oneDNN packed": _onednn_packed}
    if dtype is torch.float32:
        ways["MKL packed"] = _mkl_packed
    if not has_instructions_for(dtype):
        ways[THROUGH_FLOAT32] = _through_float32
    for name, make in ways.items():
        try:
            run = _rotate(make, weights, x)
            run()
        except (RuntimeError, AttributeError, NotImplementedError):
            continue  # no such library in this build, or no such instruction on this machine
        contenders.append(Contender(name, run))
    return contenders


def sparse_csr(weights: Sequence[Tensor], x: Tensor) -> Contender:
    """torch's unstructured sparse product with the same weights."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Ss]parse CSR tensor support is in beta.*")
        return Contender(CSR, _rotate(_csr, weights, x))


def sparse_bsr(weight: Tensor, rows: int, cols: int, x: Tensor) -> Contender | None:
    """torch's product with a weight of blocks; None where they do not divide it."""
    if weight.shape[0] % rows or weight.shape[1] % cols:
        return None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Ss]parse (CSR|BSR) tensor support.*")
        bsr = weight.to_sparse_bsr((rows, cols))
        run = lambda: (bsr @ x.t()).t()  # noqa: E731
        try:
            run()
        except (RuntimeError, NotImplementedError):
            return None  # this torch has no MKL
    return Contender(BSR, run)


class PackedLinear(nn.Module):
    """A linear layer with its weight packed for oneDNN, as torch.compile's freezing packs it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return y


def pack_linears(model: nn.Module) -> nn.Module | None:
    """Replace the model's linear layers by packed ones; None where oneDNN cannot pack them."""
    try:
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if type(child) is nn.Linear:
                    setattr(parent, name, PackedLinear(child))
    except (RuntimeError, AttributeError, NotImplementedError):
        return None
    return model
