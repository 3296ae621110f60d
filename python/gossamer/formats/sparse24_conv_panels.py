"""The 2:4 weight of a convolution as its device reads it fastest; never saved."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _C
from .geometry import check_weight_shape, taps_of
from .sparse24 import PANEL_DTYPES, Sparse24Panels
from .sparse24_conv import Sparse24Conv, sparse24_matrix_shape
from .stored import StoredWeight


@dataclass(frozen=True, eq=False, repr=False)
class Sparse24ConvPanels(StoredWeight):
    """The private layout of a ``Sparse24Conv`` that the kernels of its device read fastest.

    On the CPU it is pairs: two outputs of a block of 16 stand together that keep many channels in
    common, so that a kernel loads those once for both (``csrc/sparse24/conv_pairs.h``). The weights
    are float32 in it, of any dtype. On a GPU it is the ``Sparse24Panels`` of the weight's matrix.

    Parameters
    ----------
    panels : Tensor
        int32; on the CPU of one dimension.
    shape : tuple of int
        (C_out, C_in / groups, *kernel size), as torch has it.
    groups : int
        The convolution's.
    dtype : torch.dtype
        Of the weights: float32, bfloat16 or float16.

    Raises
    ------
    TypeError, ValueError
        If the panels are not int32 of such a shape, or there is no such weight. What they say is
        checked by whoever reads them.
    """

    panels: Tensor
    shape: tuple[int, ...]
    groups: int
    dtype: torch.dtype

    def __post_init__(self) -> None:
        if self.panels.dtype != torch.int32 or self.dtype not in PANEL_DTYPES:
            raise TypeError(
                f"Sparse24ConvPanels: {self.panels.dtype} panels of {self.dtype} values, expected "
                "int32 panels of float32, bfloat16 or float16 values"
            )
        check_weight_shape(self.shape, self.groups)
        if not _has_pairs(self.panels):
            _ = self._matrix  # which checks them
        elif self.panels.dim() != 1:
            raise ValueError(
                f"Sparse24ConvPanels: panels have shape {list(self.panels.shape)}, expected [words]"
            )

    @property
    def _matrix(self) -> Sparse24Panels:
        """The weight's matrix, of which a GPU has the panels."""
        return Sparse24Panels(self.panels, sparse24_matrix_shape(self.shape), self.dtype)

    @classmethod
    def from_sparse24(cls, weight: Sparse24Conv) -> Sparse24ConvPanels:
        """The same weight as panels; gradients do not flow through them.

        Raises
        ------
        TypeError
            If the weight is float64, which only the serial kernel reads, in the portable form.
        ValueError
            If it has no values, or is too large for pairs.
        """
        if weight.dtype not in PANEL_DTYPES:
            raise TypeError(
                f"Sparse24ConvPanels: no panels for {weight.dtype}, only for float32, bfloat16, "
                "float16"
            )
        if weight.device.type == "meta":
            raise ValueError("Sparse24ConvPanels: the weight is on meta and has no values")
        if not _has_pairs(weight.values):
            panels = Sparse24Panels.from_sparse24(weight.matrix).panels
            return cls(panels, weight.shape, weight.groups, weight.dtype)
        sizes = (weight.shape[1], taps_of(weight.shape), weight.groups)
        words = torch.empty(
            _C.sparse24_conv_most_pair_words(weight.shape[0], *sizes), dtype=torch.int32
        )
        portable = (weight.values.detach().contiguous(), weight.indices.contiguous())
        count = _C.sparse24_conv_to_pairs(*portable, *sizes, words, torch.get_num_threads())
        return cls(words[:count].clone(), weight.shape, weight.groups, weight.dtype)

    def to_sparse24(self) -> Sparse24Conv:
        """The portable form, exactly."""
        if _has_pairs(self.panels):
            values, indices = torch.ops.gossamer.sparse24_conv_from_pairs(
                self.panels, self.shape, self.groups, self.dtype
            )
        else:
            matrix = self._matrix.to_sparse24()
            values, indices = matrix.values, matrix.indices
        return Sparse24Conv(values, indices, self.shape, self.groups)

    def to_dense(self) -> Tensor:
        """The weight as a dense tensor of ``shape``, exactly."""
        return self.to_sparse24().to_dense()

    def __repr__(self) -> str:
        return (
            f"Sparse24ConvPanels(shape={list(self.shape)}, groups={self.groups}, "
            f"dtype={self.dtype}, device={self.device})"
        )


def _has_pairs(t: Tensor) -> bool:
    """Whether the panels of a weight that lies beside it are pairs."""
    return not t.is_cuda
