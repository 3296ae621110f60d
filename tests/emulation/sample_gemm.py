"""The sample 2:4 GEMM, its planted faults, and the product it should give."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from cases import integers, sparse_24
from emulator import KernelLibrary
from gossamer import reference
from gossamer.formats import Sparse24
from torch import Tensor

# In the order of `enum Plant` in kernels/sparse24_gemm.cu.
PLANTS = (
    "none",
    "no_barrier_after_wait",
    "no_barrier_at_loop_end",
    "no_commit",
    "lax_wait",
    "read_before_wait",
    "divergent_warp",
    "skipped_barrier",
    "illegal_metadata",
    "misaligned_matrix",
    "unwaited_copy",
    "matrix_past_tile",
    "shared_read_past_tile",
    "shared_write_past_tile",
    "copy_past_tensor",
    "global_read_past_tensor",
    "early_return",
    "partial_warp",
    "narrow_mask",
)


@dataclass
class Gemm:
    """Operands of whole numbers, so that every order of summation gives the same float32."""

    x: Tensor
    weight: Sparse24
    expected: Tensor

    @classmethod
    def of(cls, m: int, n: int, k: int) -> Gemm:
        weight = sparse_24(n, k, torch.bfloat16)
        values = integers(*weight.values.shape, limit=4, dtype=torch.bfloat16)
        weight = Sparse24(values, weight.indices, (n, k))
        x = integers(m, k, limit=4, dtype=torch.bfloat16)
        expected = reference.sparse24_linear(
            x.double(), values.double(), weight.indices, None, k, None
        )
        return cls(x, weight, expected.float())

    def run(self, library: KernelLibrary, plant: str = "none") -> Tensor:
        (m, k), n = self.x.shape, self.weight.shape[0]
        y = torch.full((m, n), torch.nan, device=self.x.device)
        library.call(
            "sparse24_gemm",
            y,
            self.x,
            self.weight.values,
            self.weight.indices,
            *(m, n, k),
            PLANTS.index(plant),
        )
        return y
