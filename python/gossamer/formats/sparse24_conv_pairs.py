"""The 2:4 weight of a convolution as the CPU's kernel reads it fastest; never saved."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _C
from .geometry import check_weight_shape, taps_of
from .sparse24 import PANEL_DTYPES
from .sparse24_conv import Sparse24Conv
from .stored import StoredWeight


@dataclass(frozen=True, eq=False, repr=False)
class Sparse24ConvPairs(StoredWeight):
    """The private layout of a ``Sparse24Conv`` on the CPU: pairs of outputs.

    Two outputs of a block of 16 stand together that keep many channels in common, so that a kernel
    loads those once for both (``csrc/sparse24/conv_pairs.h``). The weights are float32 in it, of
    any dtype.

    Parameters
    ----------
    panels : Tensor
        int32, one dimension, on the CPU.
    shape : tuple of int
        (C_out, C_in / groups, *kernel size), as torch has it.
    groups : int
        The convolution's.
    dtype : torch.dtype
        Of the weights: float32, bfloat16 or float16.

    Raises
    ------
    TypeError, ValueError
        If the panels are not int32 in one dimension, or there is no such weight. What they say is
        checked by whoever reads them.
    """

    panels: Tensor
    shape: tuple[int, ...]
    groups: int
    dtype: torch.dtype

    def __post_init__(self) -> None:
        if self.panels.dtype != torch.int32 or self.dtype not in PANEL_DTYPES:
            raise TypeError(
                f"Sparse24ConvPairs: {self.panels.dtype} panels of {self.dtype} values, expected "
                "int32 panels of float32, bfloat16 or float16 values"
            )
        check_weight_shape(self.shape, self.groups)
        if self.panels.dim() != 1:
            raise ValueError(
                f"Sparse24ConvPairs: panels have shape {list(self.panels.shape)}, expected [words]"
            )

    @classmethod
    def from_sparse24(cls, weight: Sparse24Conv) -> Sparse24ConvPairs:
        """The same weight as pairs; gradients do not flow through them.

        Raises
        ------
        TypeError
            If the weight is float64, which only the serial kernel reads, in the portable form.
        ValueError
            If it is not on the CPU, or too large.
        """
        if weight.dtype not in PANEL_DTYPES:
            raise TypeError(
                f"Sparse24ConvPairs: no pairs for {weight.dtype}, only for float32, bfloat16, "
                "float16"
            )
        if weight.device.type != "cpu":
            raise ValueError(f"Sparse24ConvPairs: the weight is on {weight.device}, not the CPU")
        sizes = (weight.shape[1], taps_of(weight.shape), weight.groups)
        words = torch.empty(
            _C.sparse24_conv_most_pair_words(weight.shape[0], *sizes), dtype=torch.int32
        )
        portable = (weight.values.detach().contiguous(), weight.indices.contiguous())
        count = _C.sparse24_conv_to_pairs(*portable, *sizes, words, torch.get_num_threads())
        return cls(words[:count].clone(), weight.shape, weight.groups, weight.dtype)

    def to_sparse24(self) -> Sparse24Conv:
        """The portable form, exactly."""
        values, indices = torch.ops.gossamer.sparse24_conv_from_pairs(
            self.panels, self.shape, self.groups, self.dtype
        )
        return Sparse24Conv(values, indices, self.shape, self.groups)

    def to_dense(self) -> Tensor:
        """The weight as a dense tensor of ``shape``, exactly."""
        return self.to_sparse24().to_dense()

    def __repr__(self) -> str:
        return (
            f"Sparse24ConvPairs(shape={list(self.shape)}, groups={self.groups}, "
            f"dtype={self.dtype}, device={self.device})"
        )
