"""The layout of a block-sparse weight that the kernels read as it is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .block import Block
from .blocksparse import BlockSparse
from .sparse24 import PANEL_DTYPES
from .stored import StoredWeight


@dataclass(frozen=True, eq=False, repr=False)
class BlockSparsePanels(StoredWeight):
    """A ``BlockSparse`` whose blocks lie as the kernels of the CPU read them.

    The 32-bit words of each block, one (float32) or two columns (16-bit types), are transposed.

    Parameters
    ----------
    panels : Tensor
        [nnz, ceil(cols / w), rows, w] float32, bfloat16 or float16, with w values in a word.
    crow_indices, col_indices : Tensor
        As in ``BlockSparse``.
    shape : tuple of int
        Of the weight, as torch has it.
    groups : int
        The convolution's.
    block : Block
        The size of its blocks.

    Raises
    ------
    TypeError, ValueError
        If dtypes, shapes or devices disagree.
    """

    panels: Tensor
    crow_indices: Tensor
    col_indices: Tensor
    shape: tuple[int, ...]
    groups: int
    block: Block

    def __post_init__(self) -> None:
        panels = self.panels
        if panels.dtype not in PANEL_DTYPES:
            raise TypeError(
                f"BlockSparsePanels: no panels of {panels.dtype}, expected float32, bfloat16 or "
                "float16"
            )
        words, per_word = _words(self.block.cols, panels.dtype)
        expected = (words, self.block.rows, per_word)
        if panels.dim() != 4 or panels.shape[1:] != expected:
            raise ValueError(
                f"BlockSparsePanels: panels have shape {list(panels.shape)}, blocks of "
                f"{self.block} in {panels.dtype} need [nnz, {words}, {self.block.rows}, {per_word}]"
            )
        # Which checks the rest.
        values = panels.new_empty(1).expand(panels.shape[0], self.block.rows, self.block.cols)
        BlockSparse(values, self.crow_indices, self.col_indices, self.shape, self.groups)

    @classmethod
    def from_blocksparse(cls, weight: BlockSparse) -> BlockSparsePanels:
        """The same weight as panels; no gradients flow back to its values.

        Raises
        ------
        TypeError
            If the weight is float64, which only the serial kernels read, in the portable form.
        """
        return cls(
            blocks_to_panels(weight.values.detach()), weight.crow_indices, weight.col_indices,
            weight.shape, weight.groups, weight.block,
        )  # fmt: skip

    def to_blocksparse(self) -> BlockSparse:
        """The portable form, exactly."""
        values = panels_to_blocks(self.panels, self.block.cols)
        return BlockSparse(values, self.crow_indices, self.col_indices, self.shape, self.groups)

    def to_dense(self) -> Tensor:
        """The weight as a dense tensor of ``shape``, exactly."""
        return self.to_blocksparse().to_dense()

    @property
    def density(self) -> float:
        """The share of its blocks that are live."""
        block_rows, block_columns = self.block.grid(self.shape, self.groups)
        return self.panels.shape[0] / (block_rows * block_columns)

    @property
    def dtype(self) -> torch.dtype:
        """Of the values."""
        return self.panels.dtype

    def __repr__(self) -> str:
        return (
            f"BlockSparsePanels(shape={list(self.shape)}, groups={self.groups}, "
            f"block={self.block}, density={self.density:.3g}, dtype={self.dtype}, "
            f"device={self.device})"
        )


def blocks_to_panels(values: Tensor) -> Tensor:
    """Blocks [nnz, rows, cols] as panels."""
    words, per_word = _words(values.shape[2], values.dtype)
    padded = F.pad(values, (0, words * per_word - values.shape[2]))
    return padded.unflatten(2, (words, per_word)).transpose(1, 2).contiguous()


def panels_to_blocks(panels: Tensor, cols: int) -> Tensor:
    """Panels as blocks [nnz, rows, cols]."""
    return panels.transpose(1, 2).flatten(2)[..., :cols].contiguous()


def _words(cols: int, dtype: torch.dtype) -> tuple[int, int]:
    """The words that hold a row of a block, and the values in a word."""
    per_word = max(4 // dtype.itemsize, 1)
    return -(-cols // per_word), per_word
