"""SparseConv: a convolution that keeps only part of its weight, 2:4 or in blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from ..formats import Block, Sparse24Conv
from ..ops.blocksparse import blocksparse_conv_tensors
from ..ops.conv_geometry import PADDING_MODES, Sizes, padding_of, per_axis
from ..ops.operands import activation_of, autocast_dtype
from ..ops.sparse24_conv import pays_to_pack, sparse24_conv_tensors
from .dense import arguments_of, check_layer
from .patterns import Panels, PatternName, Portable, pattern_of
from .trainable import TrainableModule

# Leaves for torch.fx, which could not follow their branches on x.
torch.fx.wrap("blocksparse_conv_tensors")
torch.fx.wrap("sparse24_conv_tensors")
torch.fx.wrap("_added")

_DENSE = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class SparseConv(TrainableModule):
    """``torch.nn.Conv1d``, ``2d`` or ``3d`` whose weight is 2:4, or zero in whole blocks.

    How many axes it has is that of ``kernel_size`` here; ``SparseConv1d``, ``SparseConv2d`` and
    ``SparseConv3d`` say it by their name. The weight is the Parameter ``values`` under the fixed
    pattern of its indices. For inference ``pack()`` replaces it by ``panels``, which the kernels of
    its device read as they are, where there are faster ones than torch's with a dense weight. A
    ``state_dict``, a pickle and a deep copy hold an open format and are validated before a layer
    takes them over.

    Parameters
    ----------
    in_channels, out_channels : int
        Any numbers from 1 on that ``groups`` divides.
    kernel_size, stride, padding, dilation, groups, bias, padding_mode
        As for ``torch.nn.Conv2d``.
    pattern : "2:4" or Block
        At most two non-zeros in every four input channels of an output, group and tap; or blocks
        of output by input channels.
    device, dtype
        As for ``torch.nn.Conv2d``: float32, bfloat16, float16, or float64.
    density : float, optional
        The share of blocks that are live, in (0, 1], of a pattern of blocks, which needs it.

    Attributes
    ----------
    values : Parameter
        The kept weights, as ``gossamer.formats.Sparse24Conv`` or ``BlockSparse`` has them.
    indices, or crow_indices and col_indices : Tensor
        Where they are; like ``values`` None while packed.
    panels : Tensor or None
        int32, the packed weight (``gossamer.formats.Sparse24ConvPanels``); None while trainable.
    format : Tensor
        int64: what a ``state_dict`` says of itself.
    bias : Parameter or None
        [C_out].
    activation : {None, "relu", "gelu", "silu"}
        What is applied to the result, in the same pass; ``gossamer.fuse_activations`` sets it.

    Raises
    ------
    TypeError, ValueError
        If a size, the pattern, the density or another argument is none of those above.
    """

    axes: ClassVar[int | None] = None

    values: nn.Parameter | None
    indices: Tensor | None
    crow_indices: Tensor
    col_indices: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sizes,
        stride: Sizes = 1,
        padding: Sizes | str = 0,
        dilation: Sizes = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        pattern: PatternName = "2:4",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        density: float | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        axes = self.axes
        if axes is None:
            if not isinstance(kernel_size, Sequence):
                raise ValueError(
                    f"{name}: kernel_size {kernel_size!r}, expected a number an axis, or take "
                    "SparseConv1d, SparseConv2d or SparseConv3d"
                )
            axes = len(kernel_size)
        if groups < 1 or in_channels < 1 or in_channels % groups or out_channels % groups:
            raise ValueError(
                f"{name}: in_channels {in_channels} and out_channels {out_channels} in {groups} "
                "groups: all at least 1, and groups divide both"
            )
        if padding_mode not in PADDING_MODES:
            raise ValueError(
                f"{name}: padding_mode {padding_mode!r}, expected one of {PADDING_MODES}"
            )
        kernel = per_axis(name, "kernel_size", kernel_size, axes, 1)
        held = pattern_of(name, pattern, (out_channels, in_channels // groups, *kernel), groups)
        held.check(name, density, wanted=True)
        padding_of(name, padding, kernel, stride, dilation)  # or it is an error
        self.in_channels, self.out_channels = held.shape[1] * held.groups, held.shape[0]
        self.kernel_size = kernel
        self.stride = per_axis(name, "stride", stride, axes, 1)
        self.padding: str | tuple[int, ...] = (
            padding if isinstance(padding, str) else per_axis(name, "padding", padding, axes, 0)
        )
        self.dilation = per_axis(name, "dilation", dilation, axes, 1)
        self.groups = held.groups
        self.padding_mode = padding_mode
        self.pattern = pattern
        self._set_up(held, bias, density, device, dtype)
        self.reset_parameters()

    @classmethod
    def from_dense(
        cls,
        conv: nn.Conv1d | nn.Conv2d | nn.Conv3d,
        pattern: PatternName = "2:4",
        prune: str | None = None,
        density: float | None = None,
    ) -> SparseConv:
        """A trainable layer with the weight and a copy of the bias of a dense one.

        Parameters
        ----------
        conv : torch.nn.Conv1d, Conv2d or Conv3d
            Its weight must fit the pattern, unless ``prune`` says how to make it fit. Of blocks,
            those are live that hold a non-zero.
        pattern : "2:4" or Block
            The sparsity pattern.
        prune : {None, "magnitude"}
            "magnitude" keeps the two largest of every four input channels
            (``gossamer.prune.magnitude_24``), or the blocks of largest norm
            (``gossamer.prune.magnitude_blocks``).
        density : float, optional
            The share of blocks that pruning keeps.

        Returns
        -------
        SparseConv1d, SparseConv2d or SparseConv3d
            Of as many axes as ``conv``; of the class that this is called on, if it has as many.

        Raises
        ------
        TypeError
            If ``conv`` is no such layer (a transposed one is none), or there are no kernels for
            its dtype.
        ValueError
            If the weight does not fit and ``prune`` is None, or an argument is unknown, missing
            or superfluous.
        """
        op = f"{cls.__name__}.from_dense"
        check_layer(op, conv, *(_DENSE if cls.axes is None else (_DENSE[cls.axes - 1],)))
        held = pattern_of(op, pattern, tuple(conv.weight.shape), conv.groups)
        weight = cls._sparse_weight(conv.weight.detach(), held, prune, density)
        made = _NAMED[len(conv.kernel_size) - 1] if cls is SparseConv else cls
        layer = made(
            **arguments_of(conv),
            pattern=pattern,
            device="meta",
            dtype=weight.dtype,
            density=held.any_density,
        )
        return layer._take_from(conv, weight)

    def to_dense(self) -> nn.Conv1d | nn.Conv2d | nn.Conv3d:
        """A dense layer with the same weight and a copy of the bias."""
        weight = self.weight.to_dense().detach()
        dense = _DENSE[len(self.kernel_size) - 1]
        conv = dense(**arguments_of(self), device="meta", dtype=weight.dtype)
        self._give_to(conv, weight)
        return conv

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """``input`` [batch, C_in, *extents] -> [batch, C_out, *extents]; either without batch.

        ``residual`` is added before the activation, ``relu(conv(x) + y)``: where it has the
        result's shape and dtype by the operation (in one pass where that has a kernel for it),
        anything else as torch adds it.

        Raises
        ------
        RuntimeError
            If a packed layer runs in training mode with gradients enabled.
        """
        activation = self.activation or "none"
        if residual is None or self._is_of_result(residual, input):
            return self._convolve(input, residual, activation)
        return _added(self._convolve(input, None, "none"), residual, activation)

    def _is_of_result(self, residual: Tensor, input: Tensor) -> bool:
        """Whether it has the shape and dtype of the convolution of ``input``."""
        if isinstance(residual, fx.Proxy) or isinstance(input, fx.Proxy):
            return False  # not known yet
        if residual.dtype != (autocast_dtype(input) or input.dtype):
            return False
        axes = len(self.kernel_size)
        extents = input.shape[-axes:]
        if self.padding != "same":
            padding = (0,) * axes if isinstance(self.padding, str) else self.padding
            sizes = zip(extents, self.kernel_size, self.stride, padding, self.dilation, strict=True)
            extents = torch.Size((e + 2 * p - d * (k - 1) - 1) // s + 1 for e, k, s, p, d in sizes)
        return residual.shape == (*input.shape[: -axes - 1], self.out_channels, *extents)

    def _convolve(self, input: Tensor, residual: Tensor | None, activation: str) -> Tensor:
        bias, shape = self.bias, self._pattern.shape
        geometry: tuple[Any, ...] = (self.stride, self.padding, self.dilation, self.padding_mode)
        kind = (bias, shape, self.groups)
        packed, stored = self._panels_dtype is not None, self.values
        if packed:
            self._refuse_training()
            stored = self.panels  # type: ignore[assignment]
        assert stored is not None
        if isinstance(self.pattern, Block):
            blocks = (stored, self.crow_indices, self.col_indices)
            rest = (*kind, *geometry, activation, self.pattern.cols if packed else 0, residual)
            return blocksparse_conv_tensors(input, *blocks, *rest)
        indices = None if packed else self.indices
        rest = (*geometry, activation, residual)
        dtype = self._panels_dtype or stored.dtype
        return sparse24_conv_tensors(input, stored, indices, *kind, dtype, *rest)

    def _packed(self, weight: Portable) -> Panels | None:
        if isinstance(weight, Sparse24Conv):
            steps = (self.stride, self.padding, self.dilation)
            if not pays_to_pack(weight, *steps):
                return None
        return super()._packed(weight)

    def extra_repr(self) -> str:
        parts = [f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}"]
        parts.append(f"stride={self.stride}")
        plain = {
            "padding": (0,) * len(self.kernel_size),
            "dilation": (1,) * len(self.kernel_size),
            "groups": 1,
            "padding_mode": "zeros",
        }
        for name, usual in plain.items():
            if getattr(self, name) != usual:
                parts.append(f"{name}={getattr(self, name)}")
        parts.append(f"bias={self.bias is not None}")
        return ", ".join([*parts, self._pattern_repr()])


class SparseConv1d(SparseConv):
    """``torch.nn.Conv1d`` with a sparse weight: see ``SparseConv``."""

    axes = 1


class SparseConv2d(SparseConv):
    """``torch.nn.Conv2d`` with a sparse weight: see ``SparseConv``."""

    axes = 2


class SparseConv3d(SparseConv):
    """``torch.nn.Conv3d`` with a sparse weight: see ``SparseConv``."""

    axes = 3


def _added(y: Tensor, residual: Tensor | None, activation: str) -> Tensor:
    y = y if residual is None else y + residual  # None where torch.fx could not tell
    activate = activation_of("SparseConv", activation)
    return y if activate is None else activate(y)


_NAMED = (SparseConv1d, SparseConv2d, SparseConv3d)
