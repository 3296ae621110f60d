"""Sparse-IFT: sparse layers that take as many multiplications as the dense one they stand for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..patterns import check_sparsity


@dataclass(frozen=True)
class SparseIFT:
    """Four ways to make a layer larger and sparse, by the sparsity s alone.

    What it builds has dense weights: RigL, say, then keeps them at s. (Of ``doped`` the layer named
    ``sparse`` only.) Linear layers by default, 2-D convolutions with a ``kernel`` k; what more
    ``torch.nn.Conv2d`` takes goes to the one of k x k.

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

    def wide(self, inputs: int, outputs: int, bias: bool = True, **options: Any) -> nn.Module:
        """A layer of ``width`` times as many inputs and outputs."""
        return _layer(round(self.width * inputs), round(self.width * outputs), bias, **options)

    def parallel(self, inputs: int, outputs: int, bias: bool = True, **options: Any) -> nn.Module:
        """The sum of ``branches`` layers."""
        biases = [bias, *[False] * (self.branches - 1)]
        return _Sum([_layer(inputs, outputs, each, **options) for each in biases])

    def factorized(self, inputs: int, outputs: int, bias: bool = True, **options: Any) -> nn.Module:
        """Two layers through ``inner`` features, the second one of 1 x 1."""
        inner = self.inner(inputs, outputs, options.get("kernel", 1))
        return _through(inputs, inner, outputs, bias, **options)

    def doped(self, inputs: int, outputs: int, bias: bool = True, **options: Any) -> nn.Module:
        """A layer, to be made sparse, beside one of low ``rank``."""
        rank = self.rank(inputs, outputs, options.get("kernel", 1))
        summed = _Sum([])
        summed.add_module("sparse", _layer(inputs, outputs, bias, **options))
        summed.add_module("low_rank", _through(inputs, rank, outputs, False, **options))
        return summed


def _layer(
    inputs: int, outputs: int, bias: bool, kernel: int | None = None, **options: Any
) -> nn.Linear | nn.Conv2d:
    if kernel is None:
        return nn.Linear(inputs, outputs, bias, **options)
    return nn.Conv2d(inputs, outputs, kernel, bias=bias, **options)


def _through(inputs: int, inner: int, outputs: int, bias: bool, **options: Any) -> nn.Sequential:
    last = _layer(inner, outputs, bias, 1 if "kernel" in options else None)
    return nn.Sequential(_layer(inputs, inner, False, **options), last)


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
