"""What the products of a pattern need beside its indices, kept while the indices live."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .. import _C
from ..formats.csr import check_indices, column_dtype


@dataclass
class Known:
    """Indices that were checked, as they were then, and their transpose once it was asked for."""

    crow: Tensor
    versions: tuple[int, int, int, int]
    shape: tuple[int, int]
    transposed: tuple[Tensor, Tensor, Tensor] | None = None
    fingerprint: int = 0  # of the indices that were transposed


_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def checked_pattern(op: str, crow: Tensor, col: Tensor, shape: tuple[int, int]) -> Known:
    """Check the indices of a weight, where nobody has yet.

    Raises
    ------
    ValueError
        With the first index that is out of order or out of range.
    """
    # Tensors of inference mode do not count their changes.
    if crow.is_inference() or col.is_inference():
        check_indices(op, crow.cpu(), col.cpu(), shape)
        return Known(crow, (0, 0, 0, 0), shape)
    # Who writes through .data, NumPy or a collective is not counted, and what such columns say is
    # not checked again; but whoever puts other memory there is seen.
    versions = (crow._version, col._version, crow.data_ptr(), col.data_ptr())
    found: Known | None = _known.get(col)
    if (
        found is None
        or found.crow is not crow
        or (found.versions, found.shape) != (versions, shape)
    ):
        check_indices(op, crow.cpu(), col.cpu(), shape)
        _known[col] = found = Known(crow, versions, shape)
    return found


def forget(indices: Tensor) -> None:
    """Keep nothing of these, not even a weak reference: torch swaps no tensor that has one."""
    _known.pop(indices, None)


def transposed(
    op: str, crow: Tensor, col: Tensor, shape: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """(crow, col, source) on the CPU: of the transposed weight, of ``values[source]``."""
    pattern = checked_pattern(op, crow, col, shape)
    n, k = shape
    # So that changes which torch does not count are seen: a walk over the indices, about a sixth of
    # what the gradient of one row takes.
    fingerprint = _C.csr_fingerprint(crow.contiguous(), col.contiguous(), n, k)
    if pattern.transposed is None or pattern.fingerprint != fingerprint:
        with torch.inference_mode(False):
            crow_out = torch.empty(k + 1, dtype=torch.int32)
            col_out = torch.empty(col.shape[0], dtype=column_dtype(n))
            source = torch.empty(col.shape[0], dtype=torch.int32)
            _C.csr_transpose(crow.contiguous(), col.contiguous(), n, k, crow_out, col_out, source)
        pattern.transposed, pattern.fingerprint = (crow_out, col_out, source), fingerprint
    return pattern.transposed
