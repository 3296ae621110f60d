"""Weights that are zero in whole blocks: the open format, block compressed rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from .._sharded import whole
from .block import Block
from .geometry import (
    GEOMETRY_FIELDS,
    channels_last,
    read_geometry,
    taps_of,
    torch_layout,
    write_geometry,
)
from .state import read_header
from .stored import VALUE_DTYPES, SavedWeight, check_dense


@dataclass(frozen=True, eq=False, repr=False)
class BlockSparse(SavedWeight):
    """The weight of a linear layer or a convolution that is zero outside of some blocks.

    The weight is seen as the matrix [C_out, taps * C_in / groups], in which all input channels of
    a tap of the kernel stand side by side, and cut into blocks as ``Block`` says. Stored are the
    live ones, row by row of blocks (block compressed rows).

    Parameters
    ----------
    values : Tensor
        [nnz, rows, cols] float32, bfloat16, float16 or float64 (the last for the serial kernels
        only): the live blocks; what sticks out over the edge of a group or tap is 0.
    crow_indices : Tensor
        int32 [block rows + 1]: where each block row begins among the blocks; 0 first, never
        decreasing, nnz last.
    col_indices : Tensor
        int32 [nnz]: the block column of each block, increasing within a block row. The columns of
        tap t begin at t * ceil(C_in / groups / cols).
    shape : tuple of int
        Of the weight, as torch has it: (N, K), or (C_out, C_in / groups, *kernel size) of 1 to 3
        axes.
    groups : int
        The convolution's.

    Raises
    ------
    TypeError, ValueError
        If dtypes, shapes or devices disagree. What the indices say is checked by ``validate``, and
        whenever they are used.

    References
    ----------
    Gray, Radford, Kingma, "GPU Kernels for Block-Sparse Weights", 2017 (OpenAI).
    """

    version: ClassVar[int] = 1

    values: Tensor
    crow_indices: Tensor
    col_indices: Tensor
    shape: tuple[int, ...]
    groups: int = 1

    def __post_init__(self) -> None:
        values, indices = self.values, (self.crow_indices, self.col_indices)
        if values.dtype not in VALUE_DTYPES or any(t.dtype != torch.int32 for t in indices):
            raise TypeError(
                f"BlockSparse: values are {values.dtype}, crow_indices {indices[0].dtype} and "
                f"col_indices {indices[1].dtype}, expected float32, bfloat16, float16 or float64, "
                "and int32"
            )
        if values.dim() != 3:
            raise ValueError(
                f"BlockSparse: values have shape {list(values.shape)}, expected [nnz, rows, cols]"
            )
        block_rows, _ = self.grid
        if indices[0].shape != (block_rows + 1,) or indices[1].shape != (values.shape[0],):
            raise ValueError(
                f"BlockSparse: crow_indices have shape {list(indices[0].shape)} and col_indices "
                f"{list(indices[1].shape)}, {values.shape[0]} blocks of {self.block} of a weight "
                f"{list(self.shape)} in {self.groups} group(s) need [{block_rows + 1}] and "
                f"[{values.shape[0]}]"
            )
        if any(t.device != values.device for t in indices):
            raise ValueError(
                f"BlockSparse: values are on {values.device}, crow_indices on {indices[0].device} "
                f"and col_indices on {indices[1].device}"
            )

    @classmethod
    def from_dense(
        cls, weight: Tensor, block: Block, mask: Tensor | None = None, groups: int = 1
    ) -> BlockSparse:
        """The same weight in this format, exactly but for -0.0 outside of live blocks.

        Parameters
        ----------
        weight : Tensor
            [N, K] or [C_out, C_in / groups, *kernel size], float32, bfloat16, float16 or float64,
            of any strides.
        block : Block
            The size of its blocks.
        mask : Tensor, optional
            bool, one entry a block (``block.grid`` says its shape): the live ones, whatever they
            hold. By default those that hold a non-zero.
        groups : int
            The convolution's.

        Raises
        ------
        TypeError
            If ``weight`` or ``mask`` is not a tensor of those dtypes, or ``block`` no ``Block``.
        ValueError
            If shapes do not fit, or the weight has non-zeros outside of ``mask``: how many, and
            where the first one is.
        """
        check_dense("BlockSparse.from_dense", weight)
        if not isinstance(block, Block):
            raise TypeError(f"BlockSparse.from_dense: block is {block!r}, expected gossamer.Block")
        if weight.is_meta:
            raise ValueError(
                "BlockSparse.from_dense: weight is on the meta device, where no block is live"
            )
        shape = tuple(weight.shape)
        grid = block.grid(shape, groups)
        if mask is not None and not (isinstance(mask, Tensor) and mask.dtype == torch.bool):
            what = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"BlockSparse.from_dense: mask is {what}, expected a bool tensor")
        if mask is not None and mask.shape != grid:
            raise ValueError(
                f"BlockSparse.from_dense: mask has shape {list(mask.shape)}, blocks of {block} of "
                f"a weight {list(shape)} in {groups} group(s) are {list(grid)}"
            )
        dense, size = channels_last(weight.detach()), (block.rows, block.cols)
        live = mask
        if live is None:
            live = torch.ops.gossamer.blocksparse_find_live(dense, *size, groups).view(torch.bool)
        crow, col = compressed_rows(live.to(dense.device))
        values = torch.ops.gossamer.blocksparse_gather(dense, crow, col, *size, groups)
        made = cls(values, crow, col, shape, groups)
        if mask is not None and values.count_nonzero() != dense.count_nonzero():
            made._fail_outside(weight.detach())
        return made

    def _fail_outside(self, weight: Tensor) -> NoReturn:
        ones = replace(self, values=torch.ones_like(self.values))
        outside = (weight != 0) & (ones.to_dense() == 0)
        raise ValueError(
            f"BlockSparse.from_dense: {int(outside.sum())} of {int(weight.count_nonzero())} "
            f"non-zeros lie outside of the mask, the first at {outside.nonzero()[0].tolist()}; "
            "gossamer.prune.magnitude_blocks makes a weight fit"
        )

    def to_dense(self) -> Tensor:
        """The weight as a dense tensor of ``shape``, exactly; differentiable in ``values``."""
        from ..ops.blocksparse_layout import to_dense

        indices = (self.crow_indices, self.col_indices)
        dense: Tensor = to_dense(whole(self.values), *indices, *self._sizes())
        return torch_layout(dense, self.shape)

    def validate(self) -> BlockSparse:
        """Check every index and the padding, and return self.

        Raises
        ------
        ValueError
            With the first index that is out of order or out of range, or the first block whose
            padding is not 0.
        """
        torch.ops.gossamer.blocksparse_validate(
            whole(self.values.detach()), self.crow_indices, self.col_indices, *self._sizes()
        )
        return self

    def to(self, *args: Any, **kwargs: Any) -> BlockSparse:
        """Another device or floating-point dtype, given as to ``torch.Tensor.to``."""
        values = self.values.to(*args, **kwargs)
        crow, col = self.crow_indices.to(values.device), self.col_indices.to(values.device)
        return BlockSparse(values, crow, col, self.shape, self.groups)

    def state(self) -> dict[str, Tensor]:
        """The tensors that stand for the weight in a file.

        values, crow_indices, col_indices and ``format``, an int64 tensor (version, rows, cols,
        groups, axes, C_out, C_in / groups, kd, kh, kw) with 1 for the axes that the kernel lacks,
        so that the dictionary can go through ``torch.load(weights_only=True)`` and safetensors.
        """
        return self._state(*self.values.shape[1:], *write_geometry(self.shape, self.groups))

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> BlockSparse:
        """Rebuild and validate a weight from what ``state`` gave.

        Raises
        ------
        TypeError, ValueError
            If an entry is missing or not what the format, version 1, asks for.
        """
        keys = ("values", "crow_indices", "col_indices", "format")
        fields = f"version, rows, cols, {GEOMETRY_FIELDS}"
        rows, cols, *numbers = read_header("BlockSparse", state, keys, fields, cls.version)
        shape, groups = read_geometry("BlockSparse", numbers)
        if state["values"].shape[1:] != (rows, cols):
            raise ValueError(
                f"BlockSparse: values have shape {list(state['values'].shape)}, 'format' says "
                f"blocks of {rows}x{cols}"
            )
        indices = (state["crow_indices"], state["col_indices"])
        return cls(state["values"], *indices, shape, groups).validate()

    @property
    def block(self) -> Block:
        """The size of its blocks."""
        return Block(self.values.shape[1], self.values.shape[2])

    @property
    def grid(self) -> tuple[int, int]:
        """Block rows and block columns of the weight."""
        return self.block.grid(self.shape, self.groups)

    @property
    def density(self) -> float:
        """The share of its blocks that are live."""
        block_rows, block_columns = self.grid
        return self.values.shape[0] / (block_rows * block_columns)

    def _sizes(self) -> tuple[int, int, int, int]:
        return self.shape[0], taps_of(self.shape), self.shape[1], self.groups

    def __repr__(self) -> str:
        return (
            f"BlockSparse(shape={list(self.shape)}, groups={self.groups}, block={self.block}, "
            f"density={self.density:.3g}, dtype={self.dtype}, device={self.device})"
        )


def compressed_rows(mask: Tensor) -> tuple[Tensor, Tensor]:
    """(crow_indices, col_indices) of a bool mask of blocks."""
    crow = F.pad(mask.sum(1).cumsum(0), (1, 0)).to(torch.int32)
    return crow, mask.nonzero()[:, 1].to(torch.int32)
