"""Blocks: their size as a pattern, and how they are laid over a weight."""

from __future__ import annotations

from dataclasses import dataclass

from .. import _C
from .geometry import check_weight_shape, taps_of, whole_number

MAX_BLOCK = _C.blocksparse_max_block


@dataclass(frozen=True)
class Block:
    """The pattern of a weight that is zero in whole blocks.

    Blocks lie on the weight seen as the matrix [C_out, taps * C_in / groups], in which all input
    channels of a tap of the kernel stand side by side; a linear layer is one tap and one group.
    They are laid per group and per tap and padded with zeros at each one's edges, so that any size
    fits any layer.

    Parameters
    ----------
    rows, cols : int
        Output and input channels of a block, each from 1 to 64.

    Raises
    ------
    TypeError, ValueError
        If they are no whole numbers, or outside of that range.
    """

    rows: int
    cols: int

    def __post_init__(self) -> None:
        for name in ("rows", "cols"):
            try:
                object.__setattr__(self, name, whole_number(getattr(self, name)))
            except TypeError:
                text = f"Block: {self.rows!r} x {self.cols!r}, expected whole numbers"
                raise TypeError(text) from None
        if not (1 <= self.rows <= MAX_BLOCK and 1 <= self.cols <= MAX_BLOCK):
            raise ValueError(f"Block: {self.rows} x {self.cols}, expected 1 to {MAX_BLOCK} of each")

    def __str__(self) -> str:
        return f"{self.rows}x{self.cols}"

    def grid(self, shape: tuple[int, ...], groups: int = 1) -> tuple[int, int]:
        """How many block rows and block columns such blocks make of a weight.

        Parameters
        ----------
        shape : tuple of int
            Of the weight, as torch has it: [C_out, C_in / groups, *kernel size].
        groups : int
            The convolution's.

        Returns
        -------
        tuple of int
            groups * ceil(C_out / groups / rows) and taps * ceil(C_in / groups / cols). The columns
            of a tap stand together, taps follow each other in the kernel's order.

        Raises
        ------
        TypeError, ValueError
            If there is no such weight.
        """
        check_weight_shape(shape, groups)
        row_blocks = (shape[0] // groups + self.rows - 1) // self.rows
        return groups * row_blocks, taps_of(shape) * ((shape[1] + self.cols - 1) // self.cols)
