"""The layout of an 8-bit or 4-bit 2:4 weight that the kernels read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .sparse24 import Sparse24, check_matrix_shape, sparse24_panels_shape
from .sparse24_quantized import (
    Sparse24Quantized,
    resolve_group,
    sparse24_quantized_shapes,
    value_type_of,
)
from .stored import StoredWeight


@dataclass(frozen=True, eq=False, repr=False)
class Sparse24QuantizedPanels(StoredWeight):
    """The private layout of a ``Sparse24Quantized``, which depends on the device.

    On the CPU a record covers 16 rows x 32 columns: a line of index nibbles and the values of all
    rows side by side (``csrc/sparse24/sparse24.h``). On a GPU values and indices lie as the
    operands of its sparse matrix products: a record covers 16 rows x 256 columns, values before
    metadata (``csrc/sparse24/cuda.h``).

    Parameters
    ----------
    panels : Tensor
        int32; on the CPU [ceil(N / 16), ceil(K / 32), 5, 16], of int4 values 3 lines a record; on
        a GPU [ceil(N / 16), ceil(K / 256), 640], of int4 values 384 words a record.
    scales : Tensor
        float32 [N, ceil(K / group)], as in ``Sparse24Quantized``.
    shape : tuple of int
        (N, K), both at least 1.
    group : int
        The columns of W that share a scale: K, or for int4 a multiple of 4 below K (of which a GPU
        has products for those that 32 divides).
    value_type : {"int8", "float8_e4m3fn", "int4"}
        What the panels hold.

    Raises
    ------
    TypeError, ValueError
        If dtypes, shapes, group or devices disagree, or the value type is unknown.
    """

    panels: Tensor
    scales: Tensor
    shape: tuple[int, int]
    group: int
    value_type: str

    def __post_init__(self) -> None:
        panels, scales = self.panels, self.scales
        if panels.dtype != torch.int32 or scales.dtype != torch.float32:
            raise TypeError(
                f"Sparse24QuantizedPanels: panels are {panels.dtype} and scales {scales.dtype}, "
                "expected int32 and float32"
            )
        check_matrix_shape(self.shape)
        if self.group != resolve_group(self.value_type, self.in_features, self.group):
            raise ValueError(
                f"Sparse24QuantizedPanels: group is {self.group} for a {list(self.shape)} weight, "
                f"expected at most {self.in_features}"
            )
        shapes = (
            sparse24_panels_shape(*self.shape, self.storage, panels.device),
            sparse24_quantized_shapes(self.value_type, self.shape, self.group)[2],
        )
        if (panels.shape, scales.shape) != shapes:
            raise ValueError(
                f"Sparse24QuantizedPanels: panels have shape {list(panels.shape)} and scales "
                f"{list(scales.shape)}, a {list(self.shape)} {self.value_type} weight in groups "
                f"of {self.group} needs {list(shapes[0])} and {list(shapes[1])}"
            )
        if panels.device != scales.device:
            raise ValueError(
                f"Sparse24QuantizedPanels: panels are on {panels.device} and scales on "
                f"{scales.device}"
            )

    @classmethod
    def from_quantized(cls, weight: Sparse24Quantized) -> Sparse24QuantizedPanels:
        """The same weight as panels of the device it is on, beside the same scales."""
        panels = torch.ops.gossamer.sparse24_to_panels(
            weight.values, weight.indices, weight.in_features
        )
        return cls(panels, weight.scales, weight.shape, weight.group, weight.value_type)

    def to_quantized(self) -> Sparse24Quantized:
        """The portable form, exactly, with the same scales."""
        values, indices = torch.ops.gossamer.sparse24_from_panels(
            self.panels, self.in_features, self.out_features, self.storage
        )
        return Sparse24Quantized(values, indices, self.scales, self.shape, self.group)

    def to_sparse24(self, dtype: torch.dtype = torch.float32) -> Sparse24:
        """The weight that this stands for: value times scale, rounded to ``dtype``."""
        return self.to_quantized().to_sparse24(dtype)

    def to_dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight that this stands for as a dense [N, K] tensor."""
        return self.to_quantized().to_dense(dtype)

    @property
    def storage(self) -> torch.dtype:
        """The dtype of ``Sparse24Quantized.values``; uint8 holds pairs of int4."""
        return value_type_of(self.value_type).storage

    def __repr__(self) -> str:
        return (
            f"Sparse24QuantizedPanels(shape={list(self.shape)}, value_type={self.value_type}, "
            f"group={self.group}, device={self.device})"
        )
