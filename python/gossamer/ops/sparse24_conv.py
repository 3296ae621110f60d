"""sparse24_conv: a convolution with a 2:4 weight, y = act(W * x + b).

``sparse24_conv_tensors`` applies autocast, ``_autograd`` picks the gradient or goes below it,
``_native`` allocates the result and crosses into C++, or has torch convolve with the dense weight
where no kernel of ours is faster (``sparse24_conv_choice`` says which it is).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _C
from .._library import is_recorded, library
from ..formats import Sparse24Conv, Sparse24ConvPairs, sparse24_shapes
from ..formats.geometry import channels_last, taps_of
from ..formats.sparse24_conv import sparse24_matrix_shape
from .conv_geometry import Sizes, prepare
from .conv_operands import (
    LAST,
    Geometry,
    as_5d,
    check_residual,
    dense_gradients,
    empty_result,
    finish,
    is_channels_last,
    residual_in_5d,
)
from .operands import (
    activation_of,
    apply_function,
    autocast_dtype,
    autocast_to,
    check_devices,
    gradient_wanted,
)
from .sparse24_layout import Gather

_OP = "sparse24_conv"
_CONVS = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


def sparse24_conv(
    x: Tensor,
    weight: Sparse24Conv | Sparse24ConvPairs,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes | str = 0,
    dilation: Sizes = 1,
    padding_mode: str = "zeros",
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Convolution with a 2:4 weight, of as many axes as its kernel has: 1, 2 or 3.

    Sums run over the stored slots only: a NaN or an infinity in ``x`` goes through every stored
    position, explicit zeros included, and never through a pruned one. That is so of our kernels;
    where torch's convolution with the dense weight is chosen, because it is faster (bfloat16 on
    CPUs that multiply it, few channels a group, a weight that is not packed and meets few pixels,
    any GPU), it makes a NaN of either.

    Parameters
    ----------
    x : Tensor
        [batch, C_in, *extents] in the weight's dtype, of any strides; or without batch. The batch
        may be empty.
    weight : Sparse24Conv or Sparse24ConvPairs
        The [C_out, C_in / groups, *kernel size] weight; the groups are its own. Gradients flow to
        ``Sparse24Conv.values``, and to nothing in the pairs.
    bias, stride, padding, dilation, padding_mode, activation, residual
        As for ``blocksparse_conv``; to torch's convolution, where that is chosen, torch adds the
        residual, too.

    Returns
    -------
    Tensor
        [batch, C_out, *extents] in the dtype and the memory format (contiguous or channels-last)
        of ``x``. Under autocast x, weight, bias and residual are cast to autocast's dtype first;
        pairs are read in their own dtype and the result is returned in autocast's.

    Raises
    ------
    TypeError
        If ``weight`` is neither of the two formats, or dtypes differ.
    ValueError
        As ``blocksparse_conv``.

    References
    ----------
    Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021 (arXiv:2104.08378).
    """
    if isinstance(weight, Sparse24Conv):
        stored, indices = weight.values, weight.indices
    elif isinstance(weight, Sparse24ConvPairs):
        stored, indices = weight.panels, None
    else:
        raise TypeError(
            f"{_OP}: weight is {type(weight).__name__}, expected Sparse24Conv or Sparse24ConvPairs"
        )
    return sparse24_conv_tensors(
        x,
        stored,
        indices,
        bias,
        weight.shape,
        weight.groups,
        weight.dtype,
        stride,
        padding,
        dilation,
        padding_mode,
        activation or "none",
        residual,
    )


def sparse24_conv_tensors(
    x: Tensor,
    stored: Tensor,
    indices: Tensor | None,
    bias: Tensor | None,
    shape: tuple[int, ...],
    groups: int,
    dtype: torch.dtype,
    stride: Sizes = 1,
    padding: Sizes | str = 0,
    dilation: Sizes = 1,
    padding_mode: str = "zeros",
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """``sparse24_conv`` on a format's tensors: values and indices, or pairs and None."""
    conv = prepare(_OP, x, shape, groups, stride, padding, dilation, padding_mode)
    x, residual, autocast = conv.x, conv.batch_of(residual), autocast_dtype(x)
    if autocast is not None:
        if indices is not None:
            stored = autocast_to(stored, autocast)
            dtype = stored.dtype
        x = autocast_to(x, dtype)
        bias = None if bias is None else autocast_to(bias, dtype)
        residual = None if residual is None else autocast_to(residual, dtype)
    # Pairs are words: past this line nothing knows the dtype of what they hold.
    for name, operand in (("x", x), ("bias", bias), ("residual", residual)):
        if operand is not None and operand.dtype != dtype:
            raise TypeError(f"{_OP}: {name} is {operand.dtype}, the weight {dtype}")
    steps = (conv.stride, conv.padding, conv.dilation)
    # Eager code skips the dispatcher's Python call of the autograd kernel.
    call = _op if is_recorded() else _autograd
    rest = (tuple(shape), groups, *steps, activation)
    y: Tensor = call(x, stored, indices, bias, residual, *rest)
    return conv.result(y if autocast is None else autocast_to(y, autocast))


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
_from_pairs = torch.ops.gossamer.sparse24_conv_from_pairs.default


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
    y = empty_result(_OP, x, bias, geometry)
    if choose(x, y, geometry, indices is None, last)["kernel"] == "dense":
        return _dense(x, stored, indices, bias, residual, *rest)
    _C.sparse24_conv(
        as_5d(y, last),
        as_5d(x if last else x.contiguous(), last),
        stored.contiguous(),
        None if indices is None else indices.contiguous(),
        None if bias is None else bias.contiguous(),
        residual_in_5d(_OP, residual, y, last),
        geometry.groups,
        *geometry.in_3d(),
        last,
        activation,
        torch.get_num_threads(),
    )
    return y


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
    check_devices(_OP, x, weight=stored, indices=indices, bias=bias, residual=residual)
    memory_format = LAST[x.dim()] if is_channels_last(x) else torch.contiguous_format
    weight = _dense_weight(stored, indices, geometry, x.dtype)
    steps = (geometry.stride, geometry.padding, geometry.dilation)
    y = _CONVS[x.dim()](x, weight, bias, *steps, geometry.groups)
    y = finish(_OP, y, residual, activation)
    # torch's conv1d returns a view, which could not be written to where gradients are recorded.
    return y.data.contiguous(memory_format=memory_format)


def _dense_weight(
    stored: Tensor, indices: Tensor | None, geometry: Geometry, dtype: torch.dtype
) -> Tensor:
    shape, groups = tuple(geometry.shape), geometry.groups
    if indices is None:
        stored, indices = _from_pairs(stored, shape, groups, dtype)
    return Sparse24Conv(stored, indices, shape, groups).to_dense()


def _fake(
    x: Tensor,
    stored: Tensor,
    indices: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    *rest: Any,
) -> Tensor:
    *numbers, activation = rest
    activation_of(_OP, activation)
    check_devices(_OP, x, weight=stored, indices=indices, bias=bias, residual=residual)
    y = empty_result(_OP, x, bias, Geometry(*numbers))
    check_residual(_OP, residual, y.shape)
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
        return finish(_OP, y, residual, activation)
    with torch._C._AutoDispatchBelowAutograd():
        return _op(x, stored, indices, bias, residual, *rest)


library.impl("sparse24_conv", _native, "CPU")
library.impl("sparse24_conv", _dense, "CUDA")
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
        ctx.save_for_backward(
            x if stored.requires_grad else None, stored if x.requires_grad else None, indices
        )

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, stored, indices = ctx.saved_tensors
        geometry = Geometry(*ctx.geometry)
        dense = dvalues = db = None
        if stored is not None:
            dense = _dense_weight(stored, indices, geometry, ctx.dtype)
        dx, dweight = dense_gradients(dy, x, dense, ctx.x_shape, geometry)
        if dweight is not None:
            columns = F.pad(channels_last(dweight), (0, -geometry.shape[1] % 4)).flatten(1)
            dvalues = Gather.apply(columns, indices)
        if ctx.needs_input_grad[3]:
            db = dy.sum([axis for axis in range(dy.dim()) if axis != 1])
        return dx, dvalues, None, db, *(None,) * 5


_apply_conv = apply_function(_Conv)


def sparse24_conv_choice(
    x_shape: Sequence[int],
    weight: Sparse24Conv | Sparse24ConvPairs,
    stride: Sizes = 1,
    padding: Sizes | str = 0,
    dilation: Sizes = 1,
    padding_mode: str = "zeros",
    channels_last: bool = False,
) -> dict[str, Any]:
    """What a 2:4 convolution on the CPU does with an x of this shape, in the weight's dtype.

    Parameters
    ----------
    x_shape : sequence of int
        [batch, C_in, *extents].
    weight : Sparse24Conv or Sparse24ConvPairs
        Of any device; only its sizes and which of the two it is matter.
    stride, padding, dilation, padding_mode
        The convolution's.
    channels_last : bool
        Of x, where its dimensions have that memory format.

    Returns
    -------
    dict
        ``target``, ``kernel`` ("pairs", "serial", or "dense" for torch's convolution), ``why`` and
        ``threads``; of "pairs" also how it cuts the outputs up.

    Raises
    ------
    TypeError, ValueError
        As the product itself.
    """
    x = torch.empty(x_shape, device="meta", dtype=weight.dtype)
    if channels_last and x.dim() in LAST:
        x = x.to(memory_format=LAST[x.dim()])
    conv = prepare(_OP, x, weight.shape, weight.groups, stride, padding, dilation, padding_mode)
    geometry = Geometry(weight.shape, weight.groups, conv.stride, conv.padding, conv.dilation)
    y = empty_result(_OP, conv.x, None, geometry)
    packed = isinstance(weight, Sparse24ConvPairs)
    return choose(conv.x, y, geometry, packed, is_channels_last(conv.x))
