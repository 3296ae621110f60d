"""How a layer holds a weight of one pattern: its tensors, and how it comes from a dense weight."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..formats import (
    Block,
    BlockSparse,
    BlockSparsePanels,
    Sparse24,
    Sparse24Conv,
    Sparse24ConvPanels,
    Sparse24Panels,
    SparseCsr,
    Unstructured,
    random_places,
    sparse24_shapes,
)
from ..formats.csr import column_dtype, from_keys
from ..formats.geometry import check_weight_shape, whole_number
from ..formats.sparse24_conv import sparse24_matrix_shape
from ..prune import (
    check_density,
    count_kept,
    largest_blocks,
    largest_places,
    magnitude_24,
    magnitude_blocks,
    magnitude_unstructured,
)

Portable = Sparse24 | Sparse24Conv | BlockSparse | SparseCsr
Panels = Sparse24Panels | Sparse24ConvPanels | BlockSparsePanels
PatternName = str | Block | Unstructured  # what a user calls a pattern


@dataclass(frozen=True)
class Pattern:
    """The pattern of one layer's weight.

    Parameters
    ----------
    shape : tuple of int
        Of the dense weight.
    groups : int
        The convolution's.
    """

    index_names: ClassVar[tuple[str, ...]]  # the layer's buffers beside its values
    packed_names: ClassVar[tuple[str, ...]] = ()  # those of them that a packed layer keeps
    any_density: ClassVar[float | None]  # for a layer that is given its weight afterwards

    shape: tuple[int, ...]
    groups: int

    def check(self, op: str, density: float | None, wanted: bool) -> None:
        """Raise ValueError unless a density is given where one is wanted, and only there."""
        raise NotImplementedError

    def prune(self, dense: Tensor, density: float | None) -> Tensor:
        """A dense weight, on any device, that keeps its largest parts and fits."""
        raise NotImplementedError

    def pruned(self, dense: Tensor, density: float | None) -> Portable:
        """The weight with the largest parts of a dense one that the pattern has room for."""
        raise NotImplementedError

    def drawn(self, held: Portable) -> Portable:
        """A random weight of as much as there is in another."""
        dense = held.values.new_empty(self.shape)
        nn.init.kaiming_uniform_(dense, a=math.sqrt(5))
        return self.pruned(dense, getattr(held, "density", None))

    def from_dense(self, dense: Tensor) -> Portable:
        """The weight of a dense one that fits; ValueError of one that does not."""
        raise NotImplementedError

    def empty(
        self, density: float | None, device: torch.device | str | int | None, dtype: torch.dtype
    ) -> Portable:
        """A weight of no content."""
        raise NotImplementedError

    def portable(self, values: Tensor, *indices: Tensor) -> Portable:
        """The weight of a layer's tensors."""
        raise NotImplementedError

    def packed(self, weight: Portable) -> Panels | None:
        """The weight in the layout that its device reads fastest, or None if there is no other."""
        return None

    def held_panels(self, panels: Tensor, dtype: torch.dtype, *indices: Tensor) -> Panels:
        """The weight of a packed layer's tensors."""
        raise NotImplementedError

    def unpacked(self, weight: Panels) -> Portable:
        """The weight in the portable form."""
        raise NotImplementedError


@dataclass(frozen=True)
class Pattern24(Pattern):
    """2:4 along the inputs."""

    index_names, any_density = ("indices",), None

    def check(self, op: str, density: float | None, wanted: bool) -> None:
        if density is not None:
            raise ValueError(f"{op}: density {density} with pattern '2:4', which has its own")

    def prune(self, dense: Tensor, density: float | None) -> Tensor:
        return magnitude_24(dense, dim=1)

    def pruned(self, dense: Tensor, density: float | None) -> Sparse24 | Sparse24Conv:
        return self.from_dense(self.prune(dense, density))

    def from_dense(self, dense: Tensor) -> Sparse24 | Sparse24Conv:
        if len(self.shape) == 2:
            return Sparse24.from_dense(dense)
        return Sparse24Conv.from_dense(dense, self.groups)

    def empty(
        self, density: float | None, device: torch.device | str | int | None, dtype: torch.dtype
    ) -> Sparse24 | Sparse24Conv:
        matrix = self.shape if len(self.shape) == 2 else sparse24_matrix_shape(self.shape)
        value_shape, index_shape = sparse24_shapes(matrix[0], matrix[1])
        values = torch.empty(value_shape, device=device, dtype=dtype)
        return self.portable(values, torch.empty(index_shape, device=device, dtype=torch.uint8))

    def portable(self, values: Tensor, *indices: Tensor) -> Sparse24 | Sparse24Conv:
        (positions,) = indices
        if len(self.shape) == 2:
            return Sparse24(values, positions, (self.shape[0], self.shape[1]))
        return Sparse24Conv(values, positions, self.shape, self.groups)

    def packed(self, weight: Portable) -> Panels | None:
        if isinstance(weight, Sparse24):
            return Sparse24Panels.from_sparse24(weight)
        assert isinstance(weight, Sparse24Conv)
        return Sparse24ConvPanels.from_sparse24(weight)

    def held_panels(
        self, panels: Tensor, dtype: torch.dtype, *indices: Tensor
    ) -> Sparse24Panels | Sparse24ConvPanels:
        if len(self.shape) == 2:
            return Sparse24Panels(panels, (self.shape[0], self.shape[1]), dtype)
        return Sparse24ConvPanels(panels, self.shape, self.groups, dtype)

    def unpacked(self, weight: Panels) -> Sparse24 | Sparse24Conv:
        assert isinstance(weight, (Sparse24Panels, Sparse24ConvPanels))
        return weight.to_sparse24()


@dataclass(frozen=True)
class PatternBlocks(Pattern):
    """Zero in whole blocks."""

    index_names, any_density = ("crow_indices", "col_indices"), 1.0
    packed_names = index_names

    block: Block

    def check(self, op: str, density: float | None, wanted: bool) -> None:
        if (density is not None) != wanted:
            given = "no density" if density is None else f"density {density}"
            raise ValueError(
                f"{op}: {given}: a pattern of blocks takes the share of them to keep where there "
                "is something to prune, and only there"
            )
        if density is not None:
            check_density(op, density)

    def prune(self, dense: Tensor, density: float | None) -> Tensor:
        assert density is not None
        pruned = magnitude_blocks(dense, self.block, density, self.groups)
        assert isinstance(pruned, Tensor)
        return pruned

    def pruned(self, dense: Tensor, density: float | None) -> BlockSparse:
        assert density is not None
        # With its mask: a block that is kept may hold zeros alone.
        mask = largest_blocks(dense, self.block, density, self.groups)
        return BlockSparse.from_dense(self.prune(dense, density), self.block, mask, self.groups)

    def from_dense(self, dense: Tensor) -> BlockSparse:
        return BlockSparse.from_dense(dense, self.block, groups=self.groups)

    def empty(
        self, density: float | None, device: torch.device | str | int | None, dtype: torch.dtype
    ) -> BlockSparse:
        block_rows, block_columns = self.block.grid(self.shape, self.groups)
        live = 0 if density is None else count_kept(block_rows * block_columns, density)
        values = torch.empty(live, self.block.rows, self.block.cols, device=device, dtype=dtype)
        crow = torch.empty(block_rows + 1, device=device, dtype=torch.int32)
        return self.portable(values, crow, torch.empty(live, device=device, dtype=torch.int32))

    def portable(self, values: Tensor, *indices: Tensor) -> BlockSparse:
        crow, col = indices
        return BlockSparse(values, crow, col, self.shape, self.groups)

    def packed(self, weight: Portable) -> BlockSparsePanels | None:
        assert isinstance(weight, BlockSparse)
        return BlockSparsePanels.from_blocksparse(weight) if weight.device.type == "cpu" else None

    def held_panels(
        self, panels: Tensor, dtype: torch.dtype, *indices: Tensor
    ) -> BlockSparsePanels:
        crow, col = indices
        return BlockSparsePanels(panels, crow, col, self.shape, self.groups, self.block)

    def unpacked(self, weight: Panels) -> BlockSparse:
        assert isinstance(weight, BlockSparsePanels)
        return weight.to_blocksparse()


@dataclass(frozen=True)
class PatternUnstructured(Pattern):
    """Live places anywhere. The kernels read the portable form, so there is nothing to pack."""

    index_names = ("crow_indices", "col_indices")

    density: float | None

    @property
    def any_density(self) -> float | None:  # type: ignore[override]
        # One place: the weight is yet to come.
        return 2.0**-62 if self.density is None else None

    def check(self, op: str, density: float | None, wanted: bool) -> None:
        if density is not None and not wanted:
            raise ValueError(f"{op}: density {density}, but nothing is pruned: prune is None")
        if density is not None and self.density is not None:
            raise ValueError(
                f"{op}: density {density} beside gossamer.Unstructured({self.density}): one says it"
            )
        if wanted and self.density is None and density is None:
            raise ValueError(
                f"{op}: gossamer.Unstructured() without a density, which is needed to prune or to "
                "begin without a weight"
            )
        if density is not None:
            check_density(op, density)

    def prune(self, dense: Tensor, density: float | None) -> Tensor:
        return magnitude_unstructured(dense, self._share(density))

    def pruned(self, dense: Tensor, density: float | None) -> SparseCsr:
        self._check_linear()
        # With its mask: a place that is kept may hold a zero.
        mask = largest_places(dense, self._share(density))
        return SparseCsr.from_dense(dense.detach().masked_fill(~mask, 0), mask)

    def drawn(self, held: Portable) -> SparseCsr:
        count, nothing = held.values.shape[0], held.values.new_empty(0, dtype=torch.int64)
        row, column = random_places(self.shape, nothing, count)
        crow, col = from_keys(row * self.shape[1] + column, self.shape)
        bound = min(1.0, (self.shape[0] / count) ** 0.5)
        return self.portable(torch.empty_like(held.values).uniform_(-bound, bound), crow, col)

    def from_dense(self, dense: Tensor) -> SparseCsr:
        self._check_linear()
        weight = SparseCsr.from_dense(dense)
        count, most = weight.values.shape[0], dense.numel()
        if self.density is not None and count > (most := count_kept(most, self.density)):
            raise ValueError(
                f"the weight has {count} non-zeros, density {self.density} allows {most}: "
                "prune='magnitude' keeps the largest"
            )
        return weight

    def empty(
        self, density: float | None, device: torch.device | str | int | None, dtype: torch.dtype
    ) -> SparseCsr:
        self._check_linear()
        n, k = self.shape
        live = count_kept(n * k, self._share(density))
        values = torch.empty(live, device=device, dtype=dtype)
        crow = torch.empty(n + 1, device=device, dtype=torch.int32)
        return self.portable(values, crow, torch.empty(live, device=device, dtype=column_dtype(k)))

    def portable(self, values: Tensor, *indices: Tensor) -> SparseCsr:
        crow, col = indices
        return SparseCsr(values, crow, col, self.shape)

    def _share(self, density: float | None) -> float:
        share = self.density if density is None else density
        assert share is not None
        return share

    def _check_linear(self) -> None:
        if len(self.shape) != 2:
            raise ValueError(
                f"unstructured weights are run by linear layers only, this one is "
                f"{list(self.shape)}"
            )


def pattern_of(op: str, pattern: PatternName, shape: tuple[int, ...], groups: int = 1) -> Pattern:
    """The pattern of a layer by what a user calls it.

    Raises
    ------
    TypeError, ValueError
        If there is no such pattern, or no such weight.
    """
    try:
        shape, groups = tuple(map(whole_number, shape)), whole_number(groups)
        check_weight_shape(shape, groups)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{op}: {error}") from None
    if isinstance(pattern, Block):
        return PatternBlocks(shape, groups, pattern)
    if isinstance(pattern, Unstructured):
        return PatternUnstructured(shape, groups, pattern.density)
    if pattern != "2:4":
        raise ValueError(
            f"{op}: pattern {pattern!r}, expected '2:4', a gossamer.Block or gossamer.Unstructured"
        )
    return Pattern24(shape, groups)
