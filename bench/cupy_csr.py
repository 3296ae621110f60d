"""A sparse linear layer through CuPy: cuSPARSE's CSR product, sharing memory with torch.

    python bench/cupy_csr.py        on a machine with a GPU; pip install "gossamer[cupy]"

This is how a CuPy user and torch work on the same memory: nothing is copied, in either direction.
CuPy's sparse matrices hold float32 and float64 only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class CsrLinear:
    """``y = x @ weight.T`` with the non-zeros of ``weight`` [N, K] in CSR, on a GPU.

    Attributes
    ----------
    matrix : cupyx.scipy.sparse.csr_matrix
        [N, K], over the memory of the torch tensors ``values``, ``columns`` and ``row_starts``.
    """

    def __init__(self, weight: Tensor) -> None:
        import cupy
        from cupyx.scipy.sparse import csr_matrix

        csr = weight.float().to_sparse_csr()
        self.values = csr.values()
        self.columns, self.row_starts = csr.col_indices().int(), csr.crow_indices().int()
        parts = (self.values, self.columns, self.row_starts)
        shared = tuple(cupy.from_dlpack(part) for part in parts)
        self.matrix = csr_matrix(shared, shape=tuple(weight.shape), copy=False)
        for ours, theirs in zip(
            parts, (self.matrix.data, self.matrix.indices, self.matrix.indptr), strict=True
        ):
            if theirs.data.ptr != ours.data_ptr():
                raise RuntimeError("CuPy copied a part of the matrix")
        self.matrix.has_canonical_format = True  # as torch makes it; else CuPy looks in every call

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.columns.nbytes + self.row_starts.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        """[M, N] float32 of a contiguous [M, K] float32 x, on torch's current stream."""
        y = x.new_empty(x.shape[0], self.matrix.shape[0])
        self.product(columns_of(x), columns_of(y))
        return y

    def product(self, x: Any, y: Any) -> None:
        """y [N, M] = W x for x [K, M], CuPy arrays that lie column by column."""
        import cupy
        from cupyx import cusparse

        stream = torch.cuda.current_stream(self.values.device)
        with cupy.cuda.ExternalStream(stream.cuda_stream):
            cusparse.spmm(self.matrix, x, c=y)


def columns_of(rows: Tensor) -> Any:
    """A contiguous [M, K] tensor as a CuPy array [K, M] in column-major order: the same memory."""
    import cupy

    return cupy.from_dlpack(rows).T


def main() -> None:
    import gossamer

    weight = gossamer.prune.magnitude_24(torch.randn(4096, 4096, device="cuda"))
    x = torch.randn(16, 4096, device="cuda")
    error = (CsrLinear(weight)(x) - x @ weight.t()).abs().max().item()
    print(f"CSR through CuPy against dense, 4096 x 4096, 16 rows: largest difference {error:.1e}")


if __name__ == "__main__":
    main()
