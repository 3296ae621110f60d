"""The registered op of 2:4 convolutions: y = act(W * x + b + residual).

``_autograd`` picks the gradient or goes below it, ``_native`` and ``_native_cuda`` allocate the
result and cross into C++, or have torch convolve with the dense weight where no kernel of ours is
faster (``choose`` and ``choose_cuda`` say which it is).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _C
from .._cuda_module import on_cuda
from .._library import is_recorded, library
from ..formats import Sparse24Conv, Sparse24ConvPanels, sparse24_shapes
from ..formats.geometry import channels_last, taps_of
from ..formats.sparse24_conv import sparse24_matrix_shape
from .conv_operands import (
    Geometry,
    as_5d,
    check_residual,
    dense_conv,
    dense_gradients,
    empty_result,
    finish,
    is_channels_last,
    memory_format_of,
    residual_in_5d,
)
from .cuda_workspace import workspace_of
from .operands import activation_of, apply_function, check_devices, gradient_wanted, saved_for
from .sparse24_layout import Gather

SPARSE24_CONV = "sparse24_conv"


def product(x: Tensor, stored: Tensor, *rest: Any) -> Tensor:
    """The op, of operands of one dtype."""
    # Eager code skips the dispatcher's Python call of the autograd kernel.
    y: Tensor = (_op if is_recorded() else _autograd)(x, stored, *rest)
    return y


library.define(
    "sparse24_conv(Tensor x, Tensor values, Tensor? indices, Tensor? bias, Tensor? residual, "
    "SymInt[] shape, SymInt groups, SymInt[] stride, SymInt[] padding, SymInt[] dilation, "
    "str activation) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
_op = torch.ops.gossamer.sparse24_conv.default

library.define(
    "sparse24_conv_from_pairs(Tensor pairs, SymInt[] shape, SymInt groups, ScalarType dtype) "
    "-> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


def _from_pairs_native(
    pairs: Tensor, shape: Sequence[int], groups: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    values, indices = _from_pairs_fake(pairs, shape, groups, dtype)
    sizes = (shape[1], taps_of(shape), groups)
    _C.sparse24_conv_from_pairs(pairs.contiguous(), values, indices, *sizes)
    return values, indices


def _from_pairs_fake(
    pairs: Tensor, shape: Sequence[int], groups: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    value_shape, index_shape = sparse24_shapes(*sparse24_matrix_shape(tuple(shape)))
    return pairs.new_empty(value_shape, dtype=dtype), pairs.new_empty(
        index_shape, dtype=torch.uint8
    )


def choose(
    x: Tensor, y: Tensor, geometry: Geometry, packed: bool, channels_last: bool
) -> dict[str, Any]:
    """What the CPU does with an x and a y of these shapes; of any device."""
    chosen: dict[str, Any] = _C.sparse24_conv_choose(
        tuple(as_5d(x, channels_last).shape),
        tuple(as_5d(y, channels_last).shape),
        str(x.dtype).removeprefix("torch."),
        packed,
        geometry.groups,
        *geometry.in_3d(),
        channels_last,
        torch.get_num_threads(),
    )
    return chosen


def _native(
    x: Tensor,
    stored: Tensor,
    indices: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    *rest: Any,
) -> Tensor:
    *numbers, activation = rest
    geometry = Geometry(*numbers)
    last = is_channels_last(x)
    y = empty_result(SPARSE24_CONV, x, bias, geometry)
    if choose(x, y, geometry, indices is None, last)["kernel"] == "dense":
        return _dense(x, stored, indices, bias, residual, *rest)
    _C.sparse24_conv(
        as_5d(y, last),
        as_5d(x if last else x.contiguous(), last),
        stored.contiguous(),
        None if indices is None else indices.contiguous(),
        None if bias is None else bias.contiguous(),
        residual_in_5d(SPARSE24_CONV, residual, y, last),
        geometry.groups,
        *geometry.in_3d(),
        last,
        activation,
        torch.get_num_threads(),
    )
    return y


Way = tuple[str, int, int, int, int, int]  # kernel, tile_n, tile_m, warps_k, split_k, blocks


def asked_of_cuda(x: Tensor, y: Tensor, geometry: Geometry) -> tuple[Any, ...]:
    """What the choice for a GPU is told, whose kernels read pixels of channels side by side."""
    sizes = (tuple(as_5d(t, True).shape) for t in (x, y))
    steps = (tuple(numbers) for numbers in geometry.in_3d())
    return *sizes, str(x.dtype).removeprefix("torch."), geometry.groups, *steps


@lru_cache(maxsize=1 << 12)
def choose_cuda(*asked: Any) -> dict[str, Any]:
    """What a GPU does with a packed weight, as ``asked_of_cuda`` says, then the GPU."""
    chosen: dict[str, Any] = _C.sparse24_conv_choose_cuda(*asked)
    return chosen


def _native_cuda(
    x: Tensor,
    stored: Tensor,
    indices: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    *rest: Any,
) -> Tensor:
    check_devices(SPARSE24_CONV, x, weight=stored, indices=indices, bias=bias, residual=residual)
    *numbers, activation = rest
    geometry = Geometry(*numbers)
    y = empty_result(SPARSE24_CONV, x, bias, geometry)
    activation_of(SPARSE24_CONV, activation)
    check_residual(SPARSE24_CONV, residual, y.shape)
    if y.numel() == 0:
        return y
    if indices is not None:  # a weight in training: as its gradients
        return _dense(x, stored, indices, bias, residual, *rest)
    chosen = choose_cuda(*asked_of_cuda(x, y, geometry), x.get_device())
    if chosen["kernel"] == "dense":
        return _dense(x, stored, indices, bias, residual, *rest)
    fused = activation if residual is None else "none"
    by_way(x, y, stored, bias, geometry, fused, chosen["workspace_bytes"])
    if residual is None:
        return y
    return _like(finish(SPARSE24_CONV, y, residual, activation), x)


def by_way(
    x: Tensor,
    y: Tensor,
    panels: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    activation: str,
    nbytes: int,
    way: Way | None = None,
) -> None:
    """Writes y by the GPU's kernels, in the way that is chosen or one of those that there are."""
    pixels, rows = as_5d(y, True), as_5d(x, True).contiguous()
    out = pixels if pixels.is_contiguous() else y.new_empty(pixels.shape)
    if rows.data_ptr() % 16 != 0:
        rows = rows.clone()
    workspace, counters = workspace_of(x, nbytes)
    _C.sparse24_conv_cuda(
        out,
        rows,
        panels.contiguous(),
        None if bias is None else bias.contiguous(),
        geometry.groups,
        *geometry.in_3d(),
        activation,
        workspace,
        counters,
        way,
    )
    if out is not pixels:
        pixels.copy_(out)


def _like(y: Tensor, x: Tensor) -> Tensor:
    """y, without a history, in the memory format of x."""
    return y.data.contiguous(memory_format=memory_format_of(x.dim(), is_channels_last(x)))


def _dense(
    x: Tensor,
    stored: Tensor,
    indices: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    *rest: Any,
) -> Tensor:
    """The same by torch's convolution with the dense weight."""
    *numbers, activation = rest
    geometry = Geometry(*numbers)
    weight = _dense_weight(stored, indices, geometry, x.dtype)
    y = dense_conv(SPARSE24_CONV, x, weight, bias, geometry)
    # torch's conv1d returns a view, which could not be written to where gradients are recorded.
    return _like(finish(SPARSE24_CONV, y, residual, activation), x)


def _dense_weight(
    stored: Tensor, indices: Tensor | None, geometry: Geometry, dtype: torch.dtype
) -> Tensor:
    kind = (tuple(geometry.shape), geometry.groups)
    if indices is None:
        return Sparse24ConvPanels(stored, *kind, dtype).to_dense()
    return Sparse24Conv(stored, indices, *kind).to_dense()


def _fake(
    x: Tensor,
    stored: Tensor,
    indices: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    *rest: Any,
) -> Tensor:
    *numbers, activation = rest
    activation_of(SPARSE24_CONV, activation)
    check_devices(SPARSE24_CONV, x, weight=stored, indices=indices, bias=bias, residual=residual)
    y = empty_result(SPARSE24_CONV, x, bias, Geometry(*numbers))
    check_residual(SPARSE24_CONV, residual, y.shape)
    return y


def _autograd(
    x: Tensor,
    stored: Tensor,
    indices: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    *rest: Any,
) -> Tensor:
    if gradient_wanted(x, stored, bias, residual):
        *numbers, activation = rest
        # Lists as tuples: functorch keeps them.
        numbers = [tuple(n) if isinstance(n, (list, tuple)) else n for n in numbers]
        y: Tensor = _apply_conv(x, stored, indices, bias, *numbers)
        # Outside, for torch to differentiate.
        return finish(SPARSE24_CONV, y, residual, activation)
    with torch._C._AutoDispatchBelowAutograd():
        return _op(x, stored, indices, bias, residual, *rest)


library.impl("sparse24_conv", _native, "CPU")
library.impl("sparse24_conv", on_cuda("sparse24_conv", _native_cuda), "CUDA")
library.impl("sparse24_conv", _autograd, "Autograd")
torch.library.register_fake("gossamer::sparse24_conv", _fake, lib=library)
library.impl("sparse24_conv_from_pairs", _from_pairs_native, "CPU")
torch.library.register_fake("gossamer::sparse24_conv_from_pairs", _from_pairs_fake, lib=library)


class _Conv(torch.autograd.Function):
    """The gradient, through the dense weight: dx and dW as torch has them, dW at kept positions."""

    generate_vmap_rule = True  # for per-sample gradients

    @staticmethod
    def forward(*operands: Any) -> Tensor:
        tensors, numbers = operands[:4], operands[4:]
        with torch._C._AutoDispatchBelowAutograd():
            return _op(*tensors, None, *numbers, "none")

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, stored, indices, _, *ctx.geometry = inputs
        ctx.x_shape, ctx.dtype = x.shape, x.dtype
        # x serves dvalues alone, and the weight dx alone.
        kept_x = None if indices is None else saved_for(stored, x)  # panels are not trained
        ctx.save_for_backward(kept_x, saved_for(x, stored), indices)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, stored, indices = ctx.saved_tensors
        geometry = Geometry(*ctx.geometry)
        dense = dvalues = db = None
        if stored is not None:
            dense = _dense_weight(stored, indices, geometry, ctx.dtype)
        dx, dweight = dense_gradients(dy, x, dense, ctx.x_shape, geometry)
        if dweight is not None:
            columns = F.pad(channels_last(dweight), (0, -geometry.shape[1] % 4))
            dvalues = Gather.apply(columns.reshape(len(columns), -1), indices)
        if ctx.needs_input_grad[3]:
            db = dy.sum([axis for axis in range(dy.dim()) if axis != 1])
        return dx, dvalues, None, db, *(None,) * 5


_apply_conv = apply_function(_Conv)
