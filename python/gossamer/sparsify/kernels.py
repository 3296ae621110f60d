"""Masked layers that are computed by the kernels of their pattern while they are trained.

The dense Parameter stays what is trained: each pass gathers what lives into the format of the
kernels, and the gradient of that is scattered back, 0 where the mask drops.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .._wide import matmul
from ..conversion.kinds import replaced
from ..formats import Block, BlockSparse, Sparse24, SparseCsr, Unstructured
from ..formats.blocksparse import compressed_rows
from ..formats.csr import from_keys
from ..formats.geometry import channels_last
from ..ops.blocksparse import blocksparse_conv, blocksparse_linear
from ..ops.blocksparse_layout import gather as block_gather
from ..ops.conv_operands import Geometry, dense_gradients
from ..ops.csr import csr_linear
from ..ops.sparse24 import sparse24_linear
from ..ops.sparse24_layout import gather as sparse24_gather
from .layers import Layer, MaskNow
from .patterns import Blocks, Pattern

Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def has_kernels(pattern: Pattern, layer: Any, straight: bool = False) -> bool:
    """Whether a layer may be trained through kernels: with no forward pass of its own."""
    if replaced(layer, "forward"):
        return False
    if isinstance(pattern, Blocks):
        if straight and hasattr(layer, "kernel_size"):
            plain = layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
            return plain and type(layer) in (nn.Conv1d, nn.Conv2d, nn.Conv3d)
        return type(layer) in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    kernels = pattern.kernels
    return (kernels == "2:4" or isinstance(kernels, Unstructured)) and type(layer) is nn.Linear


def product_of(layer: Layer) -> Product | None:
    """(x, dense weight, bias) -> y by the kernels of the layer's mask; None where none has it."""
    if isinstance(layer.pattern, Blocks):
        return _block_product(layer, layer.pattern.block)
    if isinstance(layer.pattern.kernels, Unstructured):
        return _places_product(layer)
    groups = nn.functional.pad(layer.mask, (0, -layer.shape[1] % 4)).unflatten(1, (-1, 4))
    if int(groups.sum(-1).max()) > 2:
        return None  # a schedule that is still on its way to 2:4
    indices = Sparse24.from_dense(layer.mask.float().cpu()).indices.to(layer.mask.device)
    shape = (layer.shape[0], layer.shape[1])

    def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        values = sparse24_gather(weight, indices)
        return sparse24_linear(x, Sparse24(values, indices, shape), bias)

    return product


def _places_product(layer: Layer) -> Product:
    shape = (layer.shape[0], layer.shape[1])
    places = layer.mask.flatten().nonzero()[:, 0]
    crow, col = from_keys(places, shape)

    def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        values = weight.flatten().index_select(0, places)
        return csr_linear(x, SparseCsr(values, crow, col, shape), bias)

    return product


def _block_product(layer: Layer, block: Block) -> Product:
    shape, groups = layer.shape, layer.groups
    mask = layer.kept.view(block.grid(shape, groups))
    crow, col = compressed_rows(mask)
    conv: Any = layer.module

    def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        size = (block.rows, block.cols)
        values = block_gather(channels_last(weight), crow, col, *size, groups)
        live = BlockSparse(values, crow, col, shape, groups)
        if len(shape) == 2:
            return blocksparse_linear(x, live, bias)
        return blocksparse_conv(
            x, live, bias, conv.stride, conv.padding, conv.dilation, conv.padding_mode
        )

    return product


class _Straight(torch.autograd.Function):
    """y as it is; its gradient also goes to the dense weight, as if y were of that."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, weight: Tensor, x: Tensor, module: nn.Module) -> Tensor:
        ctx.save_for_backward(weight, x)
        ctx.module = module
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, None, None]:
        weight, x = ctx.saved_tensors
        x, conv = x.to(g.dtype), ctx.module
        if isinstance(conv, nn.Linear):
            rows = matmul(g.reshape(-1, g.shape[-1]).t(), x.reshape(-1, x.shape[-1]))
            return g, rows.to(weight.dtype), None, None
        dy = g
        if x.dim() < weight.dim():  # one image
            dy, x = g[None], x[None]
        geometry = Geometry(weight.shape, conv.groups, conv.stride, conv.padding, conv.dilation)
        _, found = dense_gradients(dy, x, None, x.shape, geometry)
        assert found is not None
        return g, found.to(weight.dtype), None, None


@dataclass(eq=False)
class Through:
    """The forward pass of a layer: by the kernels, or dense where ``dense()`` says so.

    ``straight``: the gradient of the weight is that of a dense layer, masked entries included.
    """

    layer: Layer
    dense: Callable[[], bool]
    straight: bool = False
    _mask: Tensor | None = None
    _product: Product | None = None

    def __call__(self, input: Tensor) -> Tensor:
        x = input  # torch's name for it
        module: Any = self.layer.module
        if self._mask is not self.layer.mask:
            self._mask, self._product = self.layer.mask, None
            if self.layer.sparsity > 0:
                self._product = product_of(self.layer)
        if self._product is None or (self.dense() and torch.is_grad_enabled()):
            return type(module).forward(module, x)
        if not self.straight:
            return self._product(x, module.weight, module.bias)
        y = self._product(x, module.weight.detach(), module.bias)
        return _Straight.apply(y, module.weight, x.detach(), module)

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy of the model has no sparsifier, whose optimizer and masks would else go with it.
        if self.straight:
            return partial, (_masked_forward, self.layer.module, MaskNow(self.layer))
        return _own_forward, (self.layer.module,)


def _own_forward(module: nn.Module) -> MethodType:
    return MethodType(type(module).forward, module)


def _masked_forward(module: Any, mask: Callable[[Tensor], Tensor], input: Tensor) -> Tensor:
    weight = Masked.apply(module.weight, mask(module.weight))
    if isinstance(module, nn.Linear):
        return nn.functional.linear(input, weight, module.bias)
    return module._conv_forward(input, weight, module.bias)


class Masked(torch.autograd.Function):
    """The weight under a mask, whose gradient it gets whole."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor) -> Tensor:
        return weight.masked_fill(~mask, 0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None
