"""2:4 weights of convolutions: at most two of every four input channels of a tap."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .geometry import (
    GEOMETRY_FIELDS,
    channels_last,
    check_weight_shape,
    read_geometry,
    taps_of,
    torch_layout,
    write_geometry,
)
from .sparse24 import Sparse24
from .state import read_header
from .stored import SavedWeight, check_dense


@dataclass(frozen=True, eq=False, repr=False)
class Sparse24Conv(SavedWeight):
    """The weight of a convolution, 2:4 along the input channels of each output, group and tap.

    It is stored as the ``Sparse24`` of the matrix [C_out, taps * P], in which the input channels of
    a tap stand side by side, padded with zeros to P, a multiple of 4.

    Parameters
    ----------
    values, indices : Tensor
        Of that matrix; see ``Sparse24``.
    shape : tuple of int
        (C_out, C_in / groups, *kernel size), as torch has it.
    groups : int
        The convolution's.

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
    shape: tuple[int, ...]
    groups: int = 1

    def __post_init__(self) -> None:
        check_weight_shape(self.shape, self.groups)
        if len(self.shape) == 2:
            raise ValueError(
                f"Sparse24Conv: a weight of shape {list(self.shape)} is a linear layer's: Sparse24"
            )
        _ = self.matrix  # which checks its tensors

    @property
    def matrix(self) -> Sparse24:
        """The weight as it is stored: [C_out, taps * P]."""
        return Sparse24(self.values, self.indices, sparse24_matrix_shape(self.shape))

    @classmethod
    def from_dense(cls, weight: Tensor, groups: int = 1) -> Sparse24Conv:
        """The same weight in this format, exactly; -0.0 counts as zero.

        Parameters
        ----------
        weight : Tensor
            [C_out, C_in / groups, *kernel size] float32, bfloat16, float16 or float64, of any
            strides.
        groups : int
            The convolution's.

        Raises
        ------
        TypeError
            If ``weight`` is not a tensor of those dtypes.
        ValueError
            If it is not 2:4: how many groups of four hold more than two non-zeros, and where the
            first one is in the matrix. ``gossamer.prune.magnitude_24(weight, dim=1)`` makes a
            weight fit.
        """
        check_dense("Sparse24Conv.from_dense", weight)
        shape = tuple(weight.shape)
        check_weight_shape(shape, groups)
        columns = F.pad(channels_last(weight.detach()), (0, -shape[1] % 4)).flatten(1)
        matrix = Sparse24.from_dense(columns)
        return cls(matrix.values, matrix.indices, shape, groups)

    def to_dense(self) -> Tensor:
        """The weight as a dense tensor of ``shape``, exactly; differentiable in ``values``."""
        columns = self.matrix.to_dense().unflatten(1, (taps_of(self.shape), -1))
        return torch_layout(columns[:, :, : self.shape[1]], self.shape)

    def validate(self) -> Sparse24Conv:
        """Check every index and the padding, and return self.

        Raises
        ------
        ValueError
            As ``Sparse24.validate`` does of the matrix, or with the first tap whose padding is
            not 0.
        """
        with torch.no_grad():
            columns = self.matrix.validate().to_dense().unflatten(1, (taps_of(self.shape), -1))
        padding = columns[:, :, self.shape[1] :]
        if not padding.is_meta and padding.count_nonzero() > 0:
            row, tap, _ = padding.nonzero()[0].tolist()
            raise ValueError(
                f"Sparse24Conv: row {row}, tap {tap} has a number that is not 0 past its last "
                f"channel, {self.shape[1] - 1}"
            )
        return self

    def to(self, *args: Any, **kwargs: Any) -> Sparse24Conv:
        """Another device or floating-point dtype, given as to ``torch.Tensor.to``."""
        values = self.values.to(*args, **kwargs)
        return Sparse24Conv(values, self.indices.to(values.device), self.shape, self.groups)

    def state(self) -> dict[str, Tensor]:
        """The tensors that stand for the weight in a file: values, indices and format.

        ``format`` is an int64 tensor (version, groups, axes, C_out, C_in / groups, kd, kh, kw) with
        1 for the axes that the kernel lacks.
        """
        return self._state(*write_geometry(self.shape, self.groups))

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Sparse24Conv:
        """Rebuild and validate a weight from what ``state`` gave.

        Raises
        ------
        TypeError, ValueError
            If an entry is missing or not what the format, version 1, asks for.
        """
        keys, fields = ("values", "indices", "format"), f"version, {GEOMETRY_FIELDS}"
        numbers = read_header("Sparse24Conv", state, keys, fields, cls.version)
        shape, groups = read_geometry("Sparse24Conv", numbers)
        return cls(state["values"], state["indices"], shape, groups).validate()

    def __repr__(self) -> str:
        return (
            f"Sparse24Conv(shape={list(self.shape)}, groups={self.groups}, dtype={self.dtype}, "
            f"device={self.device})"
        )


def sparse24_matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """The matrix [C_out, taps * P] of a convolution's weight."""
    return shape[0], taps_of(shape) * ((shape[1] + 3) // 4 * 4)
