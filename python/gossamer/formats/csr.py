"""Weights of which single places are stored, anywhere: the open format, compressed rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import _C
from .._sharded import whole
from .state import read_header
from .stored import VALUE_DTYPES, SavedWeight, check_dense

_MOST = 2**31 - 1


@dataclass(frozen=True)
class Unstructured:
    """The pattern of a weight of which any places may be live.

    Parameters
    ----------
    density : float, optional
        The share of places that are live, in (0, 1]; where a weight has more non-zeros, pruning
        keeps the largest. Without one, as many as a given weight has non-zeros.

    Raises
    ------
    ValueError
        If it is outside of that range.
    """

    density: float | None = None

    def __post_init__(self) -> None:
        if self.density is not None and not 0 < self.density <= 1:
            raise ValueError(f"Unstructured: density {self.density}, expected above 0, at most 1")

    def __str__(self) -> str:
        return "unstructured"


def column_dtype(columns: int) -> torch.dtype:
    """Of the column numbers of a weight of so many columns."""
    return torch.int16 if columns <= _C.csr_most_narrow else torch.int32


@dataclass(frozen=True, eq=False, repr=False)
class SparseCsr(SavedWeight):
    """The weight of a linear layer that is zero outside of some places.

    Stored are the live places, row by row (compressed rows).

    Parameters
    ----------
    values : Tensor
        [nnz] float32, bfloat16, float16 or float64 (the last for the serial kernels only).
    crow_indices : Tensor
        int32 [N + 1]: where each row begins among the values; 0 first, never decreasing, nnz last.
    col_indices : Tensor
        [nnz] int16 where K is at most 2**15, else int32: the column of each value, increasing
        within a row. Few rows of x take as long as these bytes take to come from memory.
    shape : tuple of int
        (N, K).

    Raises
    ------
    TypeError, ValueError
        If dtypes, shapes or devices disagree. What the indices say is checked by ``validate``, and
        once by the first product that uses them.
    """

    version: ClassVar[int] = 1

    values: Tensor
    crow_indices: Tensor
    col_indices: Tensor
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        values, crow, col = self.values, self.crow_indices, self.col_indices
        if len(self.shape) != 2 or not all(1 <= size <= _MOST for size in self.shape):
            raise ValueError(
                f"SparseCsr: shape {list(self.shape)}, expected [N, K], each 1 to 2**31 - 1"
            )
        numbered = column_dtype(self.shape[1])
        if values.dtype not in VALUE_DTYPES or crow.dtype != torch.int32 or col.dtype != numbered:
            raise TypeError(
                f"SparseCsr: values are {values.dtype}, crow_indices {crow.dtype} and col_indices "
                f"{col.dtype}; of {self.shape[1]} columns expected float32, bfloat16, float16 or "
                f"float64, torch.int32 and {numbered}"
            )
        if crow.shape != (self.shape[0] + 1,) or col.dim() != 1 or values.shape != col.shape:
            raise ValueError(
                f"SparseCsr: values have shape {list(values.shape)}, crow_indices "
                f"{list(crow.shape)} and col_indices {list(col.shape)}, expected [nnz], "
                f"[{self.shape[0] + 1}] and [nnz]"
            )
        _check_count(values.shape[0])
        if crow.device != values.device or col.device != values.device:
            raise ValueError(
                f"SparseCsr: values are on {values.device}, crow_indices on {crow.device} and "
                f"col_indices on {col.device}"
            )

    @classmethod
    def from_dense(cls, weight: Tensor, mask: Tensor | None = None) -> SparseCsr:
        """The same weight in this format, exactly but for -0.0 outside of live places.

        Parameters
        ----------
        weight : Tensor
            [N, K] float32, bfloat16, float16 or float64, of any strides.
        mask : Tensor, optional
            bool [N, K]: the live places, whatever they hold. By default the non-zeros.

        Raises
        ------
        TypeError
            If ``weight`` or ``mask`` is not a tensor of those dtypes.
        ValueError
            If shapes do not fit, or the weight has non-zeros outside of ``mask``: how many, and
            where the first one is.
        """
        check_dense("SparseCsr.from_dense", weight)
        if weight.dim() != 2 or weight.numel() == 0 or weight.is_meta:
            raise ValueError(
                f"SparseCsr.from_dense: weight has shape {list(weight.shape)} on {weight.device}, "
                "expected [N, K] with content"
            )
        if mask is not None and not (isinstance(mask, Tensor) and mask.dtype == torch.bool):
            what = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"SparseCsr.from_dense: mask is {what}, expected a bool tensor")
        if mask is not None and mask.shape != weight.shape:
            raise ValueError(
                f"SparseCsr.from_dense: mask has shape {list(mask.shape)}, the weight "
                f"{list(weight.shape)}"
            )
        weight = weight.detach()
        live = weight != 0 if mask is None else mask.to(weight.device)
        outside = (weight != 0) & ~live
        if mask is not None and bool(outside.any()):
            raise ValueError(
                f"SparseCsr.from_dense: {int(outside.sum())} of {int(weight.count_nonzero())} "
                f"non-zeros lie outside of the mask, the first at {outside.nonzero()[0].tolist()}; "
                "gossamer.prune.magnitude_unstructured makes a weight fit"
            )
        counts = live.sum(1)
        _check_count(int(counts.sum()))
        crow = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
        col = live.nonzero()[:, 1].to(column_dtype(weight.shape[1]))
        return cls(weight[live], crow, col, tuple(weight.shape))

    @classmethod
    def from_torch(cls, weight: Tensor) -> SparseCsr:
        """The same weight as torch's sparse CSR tensor, explicit zeros included.

        Raises
        ------
        TypeError, ValueError
            If it is none, has batches, or holds what this format cannot.
        """
        if not isinstance(weight, Tensor) or weight.layout != torch.sparse_csr:
            what = weight.layout if isinstance(weight, Tensor) else type(weight).__name__
            raise TypeError(f"SparseCsr.from_torch: {what}, expected a torch.sparse_csr tensor")
        if weight.dim() != 2 or weight.dense_dim() != 0:
            raise ValueError(f"SparseCsr.from_torch: shape {list(weight.shape)}, expected [N, K]")
        _check_count(weight.values().shape[0])
        shape = (weight.shape[0], weight.shape[1])
        crow, col = weight.crow_indices(), weight.col_indices()
        bad = (crow < 0) | (crow > len(col))
        if bool(bad.any()):  # before they are rounded to fewer bits
            at = int(bad.nonzero()[0])
            raise ValueError(
                f"SparseCsr: crow_indices[{at}] is {int(crow[at])}, expected 0 to {len(col)}"
            )
        bad = (col < 0) | (col >= shape[1])
        if bool(bad.any()):
            at = int(bad.nonzero()[0])
            raise ValueError(
                f"SparseCsr: col_indices[{at}] is {int(col[at])}, outside of the "
                f"weight's {shape[1]} columns"
            )
        col = col.to(column_dtype(shape[1]))
        return cls(weight.values().detach(), crow.to(torch.int32), col, shape).validate()

    def to_torch(self) -> Tensor:
        """The weight as torch's sparse CSR tensor of int32 indices, sharing values and rows."""
        return torch.sparse_csr_tensor(
            self.crow_indices,
            self.col_indices.to(torch.int32),
            self.values,
            self.shape,
            check_invariants=False,
        )

    def to_dense(self) -> Tensor:
        """The weight as a dense tensor of ``shape``, exactly; differentiable in ``values``."""
        values = whole(self.values)
        dense = values.new_zeros(self.shape[0] * self.shape[1])
        return dense.index_put((self.keys(),), values).view(self.shape)

    def rows(self) -> Tensor:
        """int64 [nnz], the row of each value."""
        crow = self.crow_indices.long()
        rows = torch.arange(self.shape[0], device=crow.device)
        return rows.repeat_interleave(crow.diff(), output_size=self.col_indices.shape[0])

    def keys(self) -> Tensor:
        """int64 [nnz], row * K + column of each value: increasing."""
        return self.rows() * self.shape[1] + self.col_indices

    def validate(self) -> SparseCsr:
        """Check every index, and return self.

        Raises
        ------
        ValueError
            With the first index that is out of order or out of range.
        """
        if not self.values.is_meta:
            crow, col = (t.detach().cpu() for t in (self.crow_indices, self.col_indices))
            check_indices("SparseCsr", crow, col, self.shape)
        return self

    def to(self, *args: Any, **kwargs: Any) -> SparseCsr:
        """Another device or floating-point dtype, given as to ``torch.Tensor.to``."""
        values = self.values.to(*args, **kwargs)
        crow, col = self.crow_indices.to(values.device), self.col_indices.to(values.device)
        return SparseCsr(values, crow, col, self.shape)

    def state(self) -> dict[str, Tensor]:
        """The tensors that stand for the weight in a file.

        values, crow_indices, col_indices and ``format``, an int64 tensor (version, N, K), so that
        the dictionary can go through ``torch.load(weights_only=True)`` and safetensors.
        """
        return self._state(*self.shape)

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> SparseCsr:
        """Rebuild and validate a weight from what ``state`` gave.

        Raises
        ------
        TypeError, ValueError
            If an entry is missing or not what the format, version 1, asks for.
        """
        keys = ("values", "crow_indices", "col_indices", "format")
        rows, columns = read_header("SparseCsr", state, keys, "version, N, K", cls.version)
        indices = (state["crow_indices"], state["col_indices"])
        return cls(state["values"], *indices, (rows, columns)).validate()

    @property
    def density(self) -> float:
        """The share of its places that are live."""
        return self.values.shape[0] / (self.shape[0] * self.shape[1])

    def __repr__(self) -> str:
        return (
            f"SparseCsr(shape={list(self.shape)}, density={self.density:.3g}, dtype={self.dtype}, "
            f"device={self.device})"
        )


def _check_count(count: int) -> None:
    if count > _MOST:
        raise ValueError(f"SparseCsr: {count} live places, at most 2**31 - 1")


def check_indices(op: str, crow: Tensor, col: Tensor, shape: tuple[int, ...]) -> None:
    """Raise ValueError, with the first wrong one, of indices on the CPU of no such weight."""
    _C.csr_validate(op, crow.contiguous(), col.contiguous(), *shape)


def from_keys(keys: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """(crow_indices, col_indices) of increasing row * K + column."""
    starts = torch.arange(shape[0] + 1, device=keys.device) * shape[1]
    crow = torch.searchsorted(keys, starts).to(torch.int32)
    return crow, (keys % shape[1]).to(column_dtype(shape[1]))
