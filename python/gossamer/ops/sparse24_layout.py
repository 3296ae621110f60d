"""The registered ops that turn one layout of a 2:4 weight into another, or check it.

``to_dense`` and ``gather`` are linear in their values and each other's adjoint, so each is the
other's backward and any order of derivative exists. The others have no gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _C
from .._cuda_module import on_cuda
from .._library import library
from ..formats import sparse24_panels_shape, sparse24_shapes
from .operands import recorded_or_applied


def refuse_gradient(op: str, *tensors: Tensor | None) -> None:
    """Raise where a raw op would return a detached result although a gradient is wanted."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise RuntimeError(f"gossamer::{op}: no gradient flows through it; detach() first")


def _status(t: Tensor) -> Tensor | None:
    """Where a kernel on a GPU reports what is wrong with a weight."""
    return torch.empty(2, dtype=torch.int64, device=t.device) if t.is_cuda else None


def _from_dense_native(dense: Tensor) -> tuple[Tensor, Tensor]:
    refuse_gradient("sparse24_from_dense", dense)
    values, indices = _from_dense_fake(dense)
    threads = torch.get_num_threads()
    _C.sparse24_from_dense(dense.contiguous(), values, indices, threads, _status(dense))
    return values, indices


def _from_dense_fake(dense: Tensor) -> tuple[Tensor, Tensor]:
    value_shape, index_shape = sparse24_shapes(*dense.shape)
    return dense.new_empty(value_shape), dense.new_empty(index_shape, dtype=torch.uint8)


def _to_dense_native(values: Tensor, indices: Tensor, in_features: int) -> Tensor:
    dense = _to_dense_fake(values, indices, in_features)
    _C.sparse24_to_dense(values.contiguous(), indices.contiguous(), dense, torch.get_num_threads())
    return dense


def _to_dense_fake(values: Tensor, indices: Tensor, in_features: int) -> Tensor:
    return values.new_empty((values.shape[0], in_features))


def _gather_native(dense: Tensor, indices: Tensor) -> Tensor:
    values = _gather_fake(dense, indices)
    _C.sparse24_gather(dense.contiguous(), indices.contiguous(), values, torch.get_num_threads())
    return values


def _gather_fake(dense: Tensor, indices: Tensor) -> Tensor:
    return dense.new_empty(sparse24_shapes(*dense.shape)[0])


def _project_native(weight: Tensor, soft: bool, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    refuse_gradient("sparse24_project", weight)
    dense, values, indices = _project_fake(weight, soft, scale)
    threads = torch.get_num_threads()
    contiguous = weight.contiguous()
    _C.sparse24_project(contiguous, soft, float(scale), dense, values, indices, threads)
    return dense, values, indices


def _project_fake(weight: Tensor, soft: bool, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dense = torch.empty_like(weight, memory_format=torch.contiguous_format)
    return dense, *_from_dense_fake(weight)


def _validate_native(values: Tensor, indices: Tensor, in_features: int) -> None:
    threads = torch.get_num_threads()
    status = _status(values)
    _C.sparse24_validate(values.contiguous(), indices.contiguous(), in_features, threads, status)


def _validate_fake(values: Tensor, indices: Tensor, in_features: int) -> None:
    """Tensors without content have nothing to check."""


def _to_panels_native(values: Tensor, indices: Tensor, in_features: int) -> Tensor:
    refuse_gradient("sparse24_to_panels", values)
    panels = _to_panels_fake(values, indices, in_features)
    _C.sparse24_to_panels(
        values.contiguous(), indices.contiguous(), in_features, panels, torch.get_num_threads()
    )
    return panels


def _to_panels_fake(values: Tensor, indices: Tensor, in_features: int) -> Tensor:
    shape = sparse24_panels_shape(values.shape[0], in_features, values.dtype, values.device)
    return values.new_empty(shape, dtype=torch.int32)


def _from_panels_native(
    panels: Tensor, in_features: int, out_features: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    values, indices = _from_panels_fake(panels, in_features, out_features, dtype)
    threads = torch.get_num_threads()
    _C.sparse24_from_panels(panels.contiguous(), values, indices, in_features, threads)
    return values, indices


def _from_panels_fake(
    panels: Tensor, in_features: int, out_features: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    value_shape, index_shape = sparse24_shapes(out_features, in_features, dtype)
    return (
        panels.new_empty(value_shape, dtype=dtype),
        panels.new_empty(index_shape, dtype=torch.uint8),
    )


_OPS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "sparse24_from_dense(Tensor dense) -> (Tensor, Tensor)": (
        _from_dense_native,
        _from_dense_fake,
    ),
    "sparse24_to_dense(Tensor values, Tensor indices, SymInt in_features) -> Tensor": (
        _to_dense_native,
        _to_dense_fake,
    ),
    "sparse24_gather(Tensor dense, Tensor indices) -> Tensor": (
        _gather_native,
        _gather_fake,
    ),
    "sparse24_project(Tensor weight, bool soft, Tensor scale) -> (Tensor, Tensor, Tensor)": (
        _project_native,
        _project_fake,
    ),
    "sparse24_validate(Tensor values, Tensor indices, SymInt in_features) -> ()": (
        _validate_native,
        _validate_fake,
    ),
    "sparse24_to_panels(Tensor values, Tensor indices, SymInt in_features) -> Tensor": (
        _to_panels_native,
        _to_panels_fake,
    ),
    "sparse24_from_panels(Tensor panels, SymInt in_features, SymInt out_features, "
    "ScalarType dtype) -> (Tensor, Tensor)": (
        _from_panels_native,
        _from_panels_fake,
    ),
}

_ON_THE_CPU_ALONE = "sparse24_project"

for _schema, (_native, _fake) in _OPS.items():
    library.define(_schema, tags=torch.Tag.pt2_compliant_tag)
    _name = _schema.partition("(")[0]
    library.impl(_name, _native, "CPU")
    if _name != _ON_THE_CPU_ALONE:
        library.impl(_name, on_cuda(_name, _native), "CUDA")
    torch.library.register_fake(f"gossamer::{_name}", _fake, lib=library)

_to_dense = torch.ops.gossamer.sparse24_to_dense.default
_gather = torch.ops.gossamer.sparse24_gather.default


class ToDense(torch.autograd.Function):
    """Values at their columns; its adjoint is ``Gather``."""

    generate_vmap_rule = True  # for per-sample gradients

    @staticmethod
    def forward(values: Tensor, indices: Tensor, in_features: int) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            return _to_dense(values, indices, in_features)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return Gather.apply(grad, *ctx.saved_tensors), None, None


class Gather(torch.autograd.Function):
    """The entries of a dense matrix at the kept columns; its adjoint is ``ToDense``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(dense: Tensor, indices: Tensor) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            return _gather(dense, indices)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        dense, indices = inputs
        ctx.in_features = dense.shape[1]
        ctx.save_for_backward(indices)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ToDense.apply(grad, *ctx.saved_tensors, ctx.in_features), None


to_dense = recorded_or_applied(_to_dense, ToDense)
gather = recorded_or_applied(_gather, Gather)

library.impl("sparse24_to_dense", ToDense.apply, "Autograd")
library.impl("sparse24_gather", Gather.apply, "Autograd")
