"""The registered ops between a dense weight and its blocks.

Dense is [C_out, taps, C_in / groups] here, as the kernels see it. ``to_dense`` and ``gather`` are
linear in their values and each other's adjoint, so each is the other's backward and any order of
derivative exists. The others have no gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _C
from .._cuda_module import on_cuda
from .._library import library
from ..formats import Block
from .operands import recorded_or_applied


def _find_live_native(dense: Tensor, rows: int, cols: int, groups: int) -> Tensor:
    live = _find_live_fake(dense, rows, cols, groups)
    threads = torch.get_num_threads()
    _C.blocksparse_find_live(dense.contiguous(), live, rows, cols, groups, threads)
    return live


def _find_live_fake(dense: Tensor, rows: int, cols: int, groups: int) -> Tensor:
    out_channels, taps, group_in = dense.shape
    grid = Block(rows, cols).grid((out_channels, group_in, taps), groups)
    return dense.new_empty(grid, dtype=torch.uint8)


def _gather_native(
    dense: Tensor, crow_indices: Tensor, col_indices: Tensor, rows: int, cols: int, groups: int
) -> Tensor:
    values = _gather_fake(dense, crow_indices, col_indices, rows, cols, groups)
    indices = (crow_indices.contiguous(), col_indices.contiguous())
    _C.blocksparse_gather(dense.contiguous(), *indices, values, groups, torch.get_num_threads())
    return values


def _gather_fake(
    dense: Tensor, crow_indices: Tensor, col_indices: Tensor, rows: int, cols: int, groups: int
) -> Tensor:
    return dense.new_empty((col_indices.shape[0], rows, cols))


def _to_dense_native(values: Tensor, crow: Tensor, col: Tensor, *sizes: int) -> Tensor:
    dense = _to_dense_fake(values, crow, col, *sizes)
    operands = (values.contiguous(), crow.contiguous(), col.contiguous())
    _C.blocksparse_to_dense(*operands, dense, sizes[3], torch.get_num_threads())
    return dense


def _to_dense_fake(values: Tensor, crow: Tensor, col: Tensor, *sizes: int) -> Tensor:
    return values.new_empty(sizes[:3])


def _validate_native(
    values: Tensor, crow_indices: Tensor, col_indices: Tensor, *sizes: int
) -> None:
    operands = (values.contiguous(), crow_indices.contiguous(), col_indices.contiguous())
    _C.blocksparse_validate(*operands, *sizes)


def _validate_fake(values: Tensor, crow_indices: Tensor, col_indices: Tensor, *sizes: int) -> None:
    """Tensors without content have nothing to check."""


_BLOCKS = "Tensor values, Tensor crow_indices, Tensor col_indices"
_SIZES = "SymInt out_channels, SymInt taps, SymInt group_in, SymInt groups"
_OPS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "blocksparse_find_live(Tensor dense, int rows, int cols, int groups) -> Tensor": (
        _find_live_native,
        _find_live_fake,
    ),
    "blocksparse_gather(Tensor dense, Tensor crow_indices, Tensor col_indices, SymInt rows, "
    "SymInt cols, SymInt groups) -> Tensor": (_gather_native, _gather_fake),
    f"blocksparse_to_dense({_BLOCKS}, {_SIZES}) -> Tensor": (_to_dense_native, _to_dense_fake),
    f"blocksparse_validate({_BLOCKS}, {_SIZES}) -> ()": (_validate_native, _validate_fake),
}

for _schema, (_native, _fake) in _OPS.items():
    library.define(_schema, tags=torch.Tag.pt2_compliant_tag)
    _name = _schema.partition("(")[0]
    library.impl(_name, _native, "CPU")
    library.impl(_name, on_cuda(_name, _native), "CUDA")
    torch.library.register_fake(f"gossamer::{_name}", _fake, lib=library)

_to_dense = torch.ops.gossamer.blocksparse_to_dense.default
_gather = torch.ops.gossamer.blocksparse_gather.default


class ToDense(torch.autograd.Function):
    """Blocks at their places; its adjoint is ``Gather``."""

    generate_vmap_rule = True  # for per-sample gradients

    @staticmethod
    def forward(values: Tensor, crow_indices: Tensor, col_indices: Tensor, *sizes: int) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            return _to_dense(values, crow_indices, col_indices, *sizes)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        values, crow_indices, col_indices, *sizes = inputs
        ctx.block = values.shape[1:]
        ctx.groups = sizes[-1]
        ctx.save_for_backward(crow_indices, col_indices)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values = Gather.apply(grad, *ctx.saved_tensors, *ctx.block, ctx.groups)
        return values, *(None,) * 6


class Gather(torch.autograd.Function):
    """The blocks of a dense weight; its adjoint is ``ToDense``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        dense: Tensor, crow_indices: Tensor, col_indices: Tensor, rows: int, cols: int, groups: int
    ) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            return _gather(dense, crow_indices, col_indices, rows, cols, groups)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        dense, crow_indices, col_indices, *_, groups = inputs
        ctx.sizes = (*dense.shape, groups)
        ctx.save_for_backward(crow_indices, col_indices)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ToDense.apply(grad, *ctx.saved_tensors, *ctx.sizes), *(None,) * 5


to_dense = recorded_or_applied(_to_dense, ToDense)
gather = recorded_or_applied(_gather, Gather)

library.impl("blocksparse_to_dense", ToDense.apply, "Autograd")
library.impl("blocksparse_gather", Gather.apply, "Autograd")
