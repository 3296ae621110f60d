"""A 2-D convolution of the output positions of a mask; the others are 0.

``masked_conv`` is for eager code: made of torch's operations and of ``pointcloud_conv``, whose
gradients are then its own. Which of them it takes depends on the entries of the mask, so a graph
holds it as one op, ``recorded_masked_conv``, with the gradients as a second one.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._library import TAGS_NOT_CAPTURED, library
from ..pointcloud.kernel_map import KernelMap
from .conv_at import Steps, Taps, out_size, taps_for
from .conv_operands import Geometry, dense_conv, dense_gradients
from .gathered_conv import GatheredWeight, Kept, most_gathered_of
from .operands import all_autocast_to, autocast_dtype, check_bias, check_devices, gradient_wanted
from .pointcloud import feats_gradient, pointcloud_conv, weight_gradient
from .pointcloud_layout import Pairs

_OP = "masked_conv"


class Positions:
    """Those of one mask, with what the kernels need of them, for the last size of the images."""

    def __init__(self) -> None:
        self._taps: Taps | None = None
        self._kept, self._map, self._weight = Kept(), Kept(), GatheredWeight()

    def __reduce__(self) -> tuple[type[Positions], tuple[()]]:
        return Positions, ()  # neither copied nor saved with the layer that has them

    def of(
        self, x: Tensor, weight: Tensor, mask: Tensor, steps: Steps
    ) -> tuple[Tensor, KernelMap, Tensor] | None:
        """In all images, with their map and the weight, or None where all are to be computed."""
        self._taps = taps = taps_for(x, weight.shape[2:], steps, self._taps)
        images = len(x)
        kept = self._kept.of(mask, (), lambda: mask.flatten().nonzero().squeeze(-1))
        if len(kept) > most_gathered_of(x, taps) * mask.numel():
            return None

        def map_of_images() -> tuple[Tensor, KernelMap]:
            first = torch.arange(images, device=mask.device).unsqueeze(-1) * mask.numel()
            at = (first + kept).flatten()
            pixels = taps.size[0] * taps.size[1]
            given = torch.ones((images, pixels), dtype=torch.bool, device=mask.device)
            return at, taps.map_at(at, given)

        at, kernel_map = self._map.of(mask, (images, taps.size), map_of_images)
        return at, kernel_map, self._weight.by_tap(weight)


def masked_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor,
    steps: Steps,
    positions: Positions,
) -> Tensor:
    """[B, C, H, W] to [B, C_out, OH, OW], 0 where the [OH, OW] mask is False."""
    found = positions.of(x, weight, mask, steps)
    if found is None:
        autocast = autocast_dtype(x)
        if autocast is not None:
            x, weight, bias = all_autocast_to(autocast, x, weight, bias)
        geometry = Geometry(weight.shape, 1, *steps)
        return dense_conv(_OP, x, weight, bias, geometry).masked_fill(~mask, 0)
    at, kernel_map, by_tap = found
    computed = pointcloud_conv(_pixels(x), by_tap, bias, kernel_map)
    shape = (len(x), *mask.shape, weight.shape[0])
    y = computed.new_zeros(shape).flatten(0, 2).index_copy_(0, at, computed)
    return y.view(shape).permute(0, 3, 1, 2)


def recorded_masked_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor, steps: Steps
) -> Tensor:
    """The same, for graphs: in channels-last, and without second derivatives."""
    autocast = autocast_dtype(x)
    if autocast is not None:
        x, weight, bias = all_autocast_to(autocast, x, weight, bias)
    y: Tensor = _op(x, weight, bias, mask, *steps)
    return y


def _pixels(t: Tensor) -> Tensor:
    """[B, C, H, W] as rows of channels."""
    return t.permute(0, 2, 3, 1).reshape(-1, t.shape[1])


_STEPS = "SymInt[] stride, SymInt[] padding, SymInt[] dilation"
library.define(
    f"masked_conv(Tensor x, Tensor weight, Tensor? bias, Tensor mask, {_STEPS}) -> Tensor",
    tags=TAGS_NOT_CAPTURED,
)
library.define(
    f"masked_conv_gradients(Tensor dy, Tensor x, Tensor weight, Tensor mask, {_STEPS}, "
    "bool[] wanted) -> (Tensor, Tensor, Tensor)",
    tags=TAGS_NOT_CAPTURED,
)
_op = torch.ops.gossamer.masked_conv.default
_gradients_op = torch.ops.gossamer.masked_conv_gradients.default

# By where a mask lies, which a graph and its backward agree on. What is kept compares its content.
_positions: OrderedDict[tuple[Any, ...], Positions] = OrderedDict()
_MOST_MASKS = 256


def _positions_of(mask: Tensor, weight: Tensor, steps: Steps) -> Positions:
    key = (mask.device, mask.data_ptr(), *map(tuple, (weight.shape, *steps)))
    found = _positions.pop(key, None)
    if found is None:
        found = Positions()
        weakref.finalize(mask, _positions.pop, key, None).atexit = False
    _positions[key] = found
    while len(_positions) > _MOST_MASKS:
        _positions.popitem(last=False)
    return found


def _native(x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor, *steps: Any) -> Tensor:
    _fake(x, weight, bias, mask, *steps)
    y = masked_conv(x, weight, bias, mask, steps, _positions_of(mask, weight, steps))
    return y.contiguous(memory_format=torch.channels_last)


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor, *steps: Any) -> Tensor:
    check_devices(_OP, x, weight=weight, bias=bias, mask=mask)
    if x.dim() != 4 or weight.dim() != 4 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{_OP}: x has shape {list(x.shape)} and the weight {list(weight.shape)}, expected "
            "[B, C, H, W] and [C_out, C, kh, kw]"
        )
    check_bias(_OP, bias, weight.shape[0])
    size = out_size(x.shape[2:], weight.shape[2:], steps)
    if mask.dtype != torch.bool or mask.shape != size:
        raise ValueError(
            f"{_OP}: mask is {mask.dtype} of shape {list(mask.shape)}, expected bool {list(size)}"
        )
    return _in_channels_last(x, (x.shape[0], weight.shape[0], *size))


def _in_channels_last(like: Tensor, shape: Sequence[int]) -> Tensor:
    return torch.empty(
        shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last
    )


def _gradients(
    dy: Tensor, x: Tensor, weight: Tensor, mask: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    stride, padding, dilation, wanted = rest
    steps = (stride, padding, dilation)
    found = _positions_of(mask, weight, steps).of(x, weight, mask, steps)
    if found is None:
        dy = dy.masked_fill(~mask, 0)
        geometry = Geometry(weight.shape, 1, *steps)
        given = (x if wanted[1] else None, weight if wanted[0] else None)
        bias_gradient = dy.sum((0, 2, 3)) if wanted[2] else None
        made = (*dense_gradients(dy, *given, x.shape, geometry), bias_gradient)
        dx, dw, db = (x.new_empty(0) if t is None else t for t in made)
    else:
        dx, dw, db = (x.new_empty(0) for _ in range(3))
        at, kernel_map, by_tap = found
        pairs, rows = Pairs(*kernel_map.tensors), _pixels(dy).index_select(0, at)
        if wanted[0]:
            pixels = feats_gradient(rows, by_tap, pairs, kernel_map.n_in, 1)
            dx = pixels.view(len(x), *x.shape[2:], x.shape[1]).permute(0, 3, 1, 2)
        if wanted[1]:
            dw = weight_gradient(rows, _pixels(x), *pairs, 1)
            dw = dw.permute(2, 1, 0).reshape(weight.shape)
        if wanted[2]:
            db = rows.sum(0)
    dx = dx.contiguous(memory_format=torch.channels_last) if wanted[0] else dx
    return dx, dw.contiguous(), db


def _gradients_fake(
    dy: Tensor, x: Tensor, weight: Tensor, mask: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    wanted = rest[-1]
    return (
        _in_channels_last(x, x.shape) if wanted[0] else x.new_empty(0),
        weight.new_empty(weight.shape if wanted[1] else (0,)),
        x.new_empty(weight.shape[:1] if wanted[2] else (0,)),
    )


class _MaskedConv(torch.autograd.Function):
    """dx, dW and db of dy where the mask is True."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            return _op(x, weight, bias, *rest)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, mask, *ctx.steps = inputs
        ctx.save_for_backward(x, weight, mask)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        wanted = list(ctx.needs_input_grad[:3])
        made = _gradients_op(dy, *ctx.saved_tensors, *ctx.steps, wanted)
        gradients = (t if w else None for t, w in zip(made, wanted, strict=True))
        return *gradients, None, None, None, None


def _autograd(x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor, *steps: Any) -> Tensor:
    if gradient_wanted(x, weight, bias):
        y: Tensor = _MaskedConv.apply(x, weight, bias, mask, *steps)
        return y
    with torch._C._AutoDispatchBelowAutograd():
        return _op(x, weight, bias, mask, *steps)


def _gradients_autograd(dy: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> Any:
    if gradient_wanted(dy, x, weight):
        raise RuntimeError(f"{_OP}: a graph has no second derivatives; compute them in eager mode")
    with torch._C._AutoDispatchBelowAutograd():
        return _gradients_op(dy, x, weight, *rest)


for _device in ("CPU", "CUDA"):
    library.impl("masked_conv", _native, _device)
    library.impl("masked_conv_gradients", _gradients, _device)
library.impl("masked_conv", _autograd, "Autograd")
library.impl("masked_conv_gradients", _gradients_autograd, "Autograd")
torch.library.register_fake("gossamer::masked_conv", _fake, lib=library)
torch.library.register_fake("gossamer::masked_conv_gradients", _gradients_fake, lib=library)
