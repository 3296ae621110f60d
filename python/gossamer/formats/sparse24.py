"""2:4 weights with floating-point values: the open format, and the kernels' private layouts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .._sharded import whole
from .state import read_header
from .stored import VALUE_DTYPES, SavedWeight, StoredWeight, check_dense

PANEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def sparse24_shapes(
    out_features: int, in_features: int, dtype: torch.dtype | None = None
) -> tuple[tuple[int, int], tuple[int, int]]:
    """The shapes of the values and indices of a [N, K] weight; uint8 holds pairs of int4."""
    groups = (in_features + 3) // 4
    columns = groups if dtype == torch.uint8 else 2 * groups
    return (out_features, columns), (out_features, (groups + 1) // 2)


def sparse24_panels_shape(
    out_features: int, in_features: int, dtype: torch.dtype, device: torch.device
) -> tuple[int, ...]:
    """The shape of the panels of a [N, K] weight on a device; uint8 stands for int4."""
    if device.type == "cuda" and dtype != torch.float32:
        value_bits = 4 if dtype == torch.uint8 else 8 * dtype.itemsize
        words = 16 * 128 * value_bits // 32 + 128
        return (out_features + 15) // 16, (in_features + 255) // 256, words
    word_rows = 1 + (8 if dtype == torch.uint8 else 16) * dtype.itemsize // 4
    return (out_features + 15) // 16, (in_features + 31) // 32, word_rows, 16


def check_matrix_shape(shape: tuple[int, int]) -> None:
    if len(shape) != 2 or not all(isinstance(size, (int, torch.SymInt)) for size in shape):
        raise TypeError(f"a weight of shape {shape!r}: expected two whole numbers (N, K)")
    if shape[0] < 1 or shape[1] < 1:
        raise ValueError(f"a 2:4 weight of shape {list(shape)}: both must be at least 1")


@dataclass(frozen=True, eq=False, repr=False)
class Sparse24(SavedWeight):
    """A [N, K] weight with at most two non-zeros in every four consecutive columns.

    With G = ceil(K / 4) groups a row, a row stores the kept pair of each group in increasing
    column order. A group with fewer than two non-zeros keeps zeros at its lowest free columns.

    Parameters
    ----------
    values : Tensor
        [N, 2G] float32, bfloat16, float16 or float64 (the last for the serial kernels only).
    indices : Tensor
        [N, ceil(G / 2)] uint8 on the same device. Byte b of a row holds group 2b in its low and
        group 2b + 1 in its high four bits, as idx0 | idx1 << 2 with idx0 < idx1 < 4. Four bits
        without a group are 0, and an index past the last column carries the value 0.
    shape : tuple of int
        (N, K), both at least 1.

    Raises
    ------
    TypeError, ValueError
        If dtypes, shapes or devices disagree. What the indices say is checked by ``validate``.

    References
    ----------
    Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021 (arXiv:2104.08378).
    """

    version: ClassVar[int] = 1

    values: Tensor
    indices: Tensor
    shape: tuple[int, int]

    def __post_init__(self) -> None:
        values, indices = self.values, self.indices
        if values.dtype not in VALUE_DTYPES or indices.dtype != torch.uint8:
            raise TypeError(
                f"Sparse24: values are {values.dtype} and indices {indices.dtype}, expected "
                "float32, bfloat16, float16 or float64, and uint8"
            )
        check_matrix_shape(self.shape)
        value_shape, index_shape = sparse24_shapes(*self.shape)
        if values.shape != value_shape or indices.shape != index_shape:
            raise ValueError(
                f"Sparse24: values have shape {list(values.shape)} and indices "
                f"{list(indices.shape)}, a {list(self.shape)} weight needs "
                f"{list(value_shape)} and {list(index_shape)}"
            )
        if values.device != indices.device:
            raise ValueError(
                f"Sparse24: values are on {values.device} and indices on {indices.device}"
            )

    @classmethod
    def from_dense(cls, weight: Tensor) -> Sparse24:
        """The same weight in this format, exactly; -0.0 counts as zero.

        Parameters
        ----------
        weight : Tensor
            [N, K] float32, bfloat16, float16 or float64 on the CPU, of any strides.

        Raises
        ------
        TypeError
            If ``weight`` is not a tensor of those dtypes.
        ValueError
            If it is not a matrix or not 2:4: how many groups hold more than two non-zeros and
            where the first one is. ``gossamer.prune.magnitude_24`` makes a weight fit.
        """
        check_dense("Sparse24.from_dense", weight)
        if weight.dim() != 2:
            raise ValueError(
                f"Sparse24.from_dense: weight has shape {list(weight.shape)}, expected [N, K]"
            )
        out_features, in_features = weight.shape
        check_matrix_shape((out_features, in_features))
        values, indices = torch.ops.gossamer.sparse24_from_dense(weight.detach())
        return cls(values, indices, (out_features, in_features))

    def to_dense(self) -> Tensor:
        """The weight as a dense [N, K] tensor, exactly; differentiable in ``values``."""
        from ..ops.sparse24_layout import to_dense

        dense: Tensor = to_dense(whole(self.values), whole(self.indices), self.in_features)
        return dense

    def validate(self) -> Sparse24:
        """Check every index, and return self.

        Raises
        ------
        ValueError
            With the first row and group whose indices are out of order, point past the last
            column without carrying 0, or sit in four bits that belong to no group.
        """
        values, indices = whole(self.values.detach()), whole(self.indices)
        torch.ops.gossamer.sparse24_validate(values, indices, self.in_features)
        return self

    def to(self, *args: Any, **kwargs: Any) -> Sparse24:
        """Another device or floating-point dtype, given as to ``torch.Tensor.to``."""
        values = self.values.to(*args, **kwargs)
        return Sparse24(values, self.indices.to(values.device), self.shape)

    def state(self) -> dict[str, Tensor]:
        """The tensors that stand for the weight in a file: values, indices and format.

        ``format`` is an int64 tensor (version, N, K), so that the dictionary can go through
        ``torch.load(weights_only=True)`` and safetensors.
        """
        return self._state(*self.shape)

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Sparse24:
        """Rebuild and validate a weight from what ``state`` gave.

        Raises
        ------
        TypeError, ValueError
            If an entry is missing or not what the format, version 1, asks for.
        """
        keys = ("values", "indices", "format")
        out_features, in_features = read_header(
            "Sparse24", state, keys, "version, N, K", cls.version
        )
        return cls(state["values"], state["indices"], (out_features, in_features)).validate()

    def __repr__(self) -> str:
        return f"Sparse24(shape={list(self.shape)}, dtype={self.dtype}, device={self.device})"


@dataclass(frozen=True, eq=False, repr=False)
class Sparse24Panels(StoredWeight):
    """The private layout of a ``Sparse24`` that the kernels of its device read fastest.

    On the CPU, and in float32, 32-bit words of 16 rows lie side by side: a record covers 16 rows x
    32 columns, its first word row holds the index bytes of those 32 columns for each of the 16
    rows, and the others hold the kept values, one (float32) or one pair (16-bit types, slot 0 in
    the low half) a word. N and K are padded with zero words.

    On a GPU, 16-bit values lie as the operands of its sparse matrix products: a record covers 16
    rows x 256 columns, values before metadata (``csrc/sparse24/cuda.h``).

    Parameters
    ----------
    panels : Tensor
        int32 [ceil(N / 16), ceil(K / 32), 17 for float32 or 9 for bfloat16 and float16, 16]; of
        16-bit values on a GPU [ceil(N / 16), ceil(K / 256), 1152].
    shape : tuple of int
        (N, K), both at least 1.
    dtype : torch.dtype
        float32, bfloat16 or float16.

    Raises
    ------
    TypeError, ValueError
        If the panels are not int32 of that shape.
    """

    panels: Tensor
    shape: tuple[int, int]
    dtype: torch.dtype

    def __post_init__(self) -> None:
        if self.panels.dtype != torch.int32 or self.dtype not in PANEL_DTYPES:
            raise TypeError(
                f"Sparse24Panels: {self.panels.dtype} panels of {self.dtype} values, expected "
                "int32 panels of float32, bfloat16 or float16 values"
            )
        check_matrix_shape(self.shape)
        expected = sparse24_panels_shape(*self.shape, self.dtype, self.panels.device)
        if self.panels.shape != expected:
            raise ValueError(
                f"Sparse24Panels: panels have shape {list(self.panels.shape)}, a "
                f"{list(self.shape)} weight of {self.dtype} needs {list(expected)}"
            )

    @classmethod
    def from_sparse24(cls, weight: Sparse24) -> Sparse24Panels:
        """The same weight as panels; gradients do not flow through them.

        Raises
        ------
        TypeError
            If the weight is float64, which only the serial kernels read, in the portable form.
        """
        if weight.dtype not in PANEL_DTYPES:
            raise TypeError(
                f"Sparse24Panels: no panels for {weight.dtype}, only for float32, bfloat16, float16"
            )
        panels = torch.ops.gossamer.sparse24_to_panels(
            weight.values.detach(), weight.indices, weight.in_features
        )
        return cls(panels, weight.shape, weight.dtype)

    def to_sparse24(self) -> Sparse24:
        """The portable form, exactly."""
        values, indices = torch.ops.gossamer.sparse24_from_panels(
            self.panels, self.in_features, self.out_features, self.dtype
        )
        return Sparse24(values, indices, self.shape)

    def to_dense(self) -> Tensor:
        """The weight as a dense [N, K] tensor, exactly."""
        return self.to_sparse24().to_dense()

    def __repr__(self) -> str:
        return f"Sparse24Panels(shape={list(self.shape)}, dtype={self.dtype}, device={self.device})"
