"""Sparse-IFT: sparse layers that take as many multiplications as the dense one they stand for."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ..patterns import check_sparsity


@dataclass(frozen=True)
class SparseIFT:
    """Four ways to make a layer larger and sparse, by the sparsity s alone.

    What it builds has dense weights: RigL, say, then keeps them at s. (Of ``doped`` the linear
    layer named ``sparse`` only.)

    Parameters
    ----------
    sparsity : float
        s in [0, 1); 0.5, 0.75, 0.9 in the paper.

    References
    ----------
    Thangarasa et al., "Sparse-IFT: Sparse Iso-FLOP Transformations for Maximizing Training
    Efficiency", ICML 2024.
    """

    sparsity: float

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity)

    @property
    def width(self) -> float:
        """Sparse Wide: by what inputs and outputs are multiplied, sqrt(1 / (1 - s))."""
        return (1 / (1 - self.sparsity)) ** 0.5

    @property
    def branches(self) -> int:
        """Sparse Parallel: how many, 1 / (1 - s)."""
        return max(1, round(1 / (1 - self.sparsity)))

    def inner(self, inputs: int, outputs: int, kernel: int = 1) -> int:
        """Sparse Factorised: k^2 f_in f_out / ((1 - s) (k^2 f_in + f_out))."""
        return max(1, round(self._dense_rank(inputs, outputs, kernel) / (1 - self.sparsity)))

    def rank(self, inputs: int, outputs: int, kernel: int = 1) -> int:
        """Sparse Doped: s k^2 f_in f_out / (k^2 f_in + f_out)."""
        return max(1, round(self.sparsity * self._dense_rank(inputs, outputs, kernel)))

    @staticmethod
    def _dense_rank(inputs: int, outputs: int, kernel: int) -> float:
        taps = kernel * kernel
        return taps * inputs * outputs / (taps * inputs + outputs)

    def wide(self, inputs: int, outputs: int, bias: bool = True) -> nn.Linear:
        """A linear layer of ``width`` times as many inputs and outputs."""
        return nn.Linear(round(self.width * inputs), round(self.width * outputs), bias)

    def parallel(self, inputs: int, outputs: int, bias: bool = True) -> nn.Module:
        """The sum of ``branches`` linear layers."""
        return _Sum([nn.Linear(inputs, outputs, bias and i == 0) for i in range(self.branches)])

    def factorized(self, inputs: int, outputs: int, bias: bool = True) -> nn.Sequential:
        """Two linear layers through ``inner`` features."""
        inner = self.inner(inputs, outputs)
        return nn.Sequential(nn.Linear(inputs, inner, False), nn.Linear(inner, outputs, bias))

    def doped(self, inputs: int, outputs: int, bias: bool = True) -> nn.Module:
        """A linear layer, to be made sparse, beside one of low ``rank``."""
        rank = self.rank(inputs, outputs)
        low = nn.Sequential(nn.Linear(inputs, rank, False), nn.Linear(rank, outputs, False))
        summed = _Sum([])
        summed.add_module("sparse", nn.Linear(inputs, outputs, bias))
        summed.add_module("low_rank", low)
        return summed


class _Sum(nn.Module):
    def __init__(self, branches: list[nn.Module]) -> None:
        super().__init__()
        for i, branch in enumerate(branches):
            self.add_module(str(i), branch)

    def forward(self, x: Tensor) -> Tensor:
        first, *others = self.children()
        y: Tensor = first(x)
        for branch in others:
            y = y + branch(x)
        return y
