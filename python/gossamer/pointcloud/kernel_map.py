"""Which input voxel meets which output voxel under which tap of a kernel."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

from torch import Tensor


@dataclass(frozen=True, eq=False)
class KernelMap:
    """The pairs of a convolution over voxels, tap by tap, in the sorted orders of both sides.

    Within a tap ``in_index`` and ``out_index`` both ascend strictly: a tap is a translation, which
    keeps the lexicographic order.

    Attributes
    ----------
    in_index, out_index : Tensor
        int32 [P], ranks in the sorted orders of the input and of the output coordinates; the pairs
        of tap t are ``[tap_offsets[t], tap_offsets[t + 1])``.
    tap_offsets : Tensor
        int64 [T + 1], on the CPU. Taps count in the order of torch's convolution weights, the last
        axis fastest.
    in_order, out_order : Tensor or None
        int32 [n_in] and [n_out], the row of the user's tensor for each rank; None where its rows
        are sorted already.
    n_in, n_out : int
        The voxels on each side.
    kernel_size : tuple of int
        One a spatial axis; T is their product.
    repeats : bool
        Whether outputs may repeat within a tap, as where every voxel meets its sample: for pooling
        alone, and asked on a GPU, which would have to be waited for to see.
    """

    in_index: Tensor
    out_index: Tensor
    tap_offsets: Tensor
    in_order: Tensor | None
    out_order: Tensor | None
    n_in: int
    n_out: int
    kernel_size: tuple[int, ...]
    repeats: bool = False

    @property
    def taps(self) -> int:
        """How many taps the kernel has."""
        return prod(self.kernel_size)

    @property
    def pairs(self) -> int:
        """How many pairs there are, over all taps."""
        return len(self.in_index)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """In the order in which the ops take them."""
        return self.in_index, self.out_index, self.tap_offsets, self.in_order, self.out_order

    def transposed(self) -> KernelMap:
        """The same pairs with the roles of input and output swapped; no tensor is copied."""
        return replace(
            self,
            in_index=self.out_index,
            out_index=self.in_index,
            in_order=self.out_order,
            out_order=self.in_order,
            n_in=self.n_out,
            n_out=self.n_in,
        )

    def __repr__(self) -> str:
        size = "x".join(map(str, self.kernel_size))
        return f"KernelMap({size}, {self.n_in} -> {self.n_out} voxels, {self.pairs} pairs)"
