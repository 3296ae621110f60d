"""AutoSparse: thresholds that are trained, with a gradient below them that fades."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...formats import Block
from ..computed import Computed, Standing
from ..patterns import Pattern, Unstructured
from ..scores import Magnitude
from ..sparsifier import Sparsifier


class AutoSparse(Computed):
    """W~ = sign(w) max(|w| - sigmoid(T), 0) in the forward pass, T trained, one for each output.

    The gradient of the maximum is 1 above 0 and alpha below:
    alpha = alpha_0 max((1 + cos(pi i / n)) / 2, 1 - sigmoid(L0 + (L1 - L0) i / n)), L0 = -6 and
    L1 = 6, at step i of n, and 0 from then on. How sparse the model becomes is learned;
    ``finalize_at`` then keeps exactly what a pattern and a sparsity allow. Add ``parameters()`` to
    the optimizer.

    Parameters
    ----------
    model, **options
        As for ``Sparsifier``.
    steps : int
        n.
    threshold : float
        T at the beginning.
    alpha : float
        alpha_0.

    Raises
    ------
    TypeError, ValueError
        As ``Sparsifier`` says, or if ``steps`` is below 1, or ``alpha`` not in [0, 1].

    References
    ----------
    Kundu et al., "AutoSparse: Towards Automated Sparse Training of Deep Neural Networks", 2023
    (arXiv:2304.06941), with the defaults of PQuantML.
    """

    def __init__(
        self,
        model: nn.Module,
        steps: int,
        threshold: float = -5.0,
        alpha: float = 0.5,
        **options: Any,
    ) -> None:
        if steps < 1 or not 0 <= alpha <= 1:
            raise ValueError(f"AutoSparse: steps {steps}, alpha {alpha}: at least 1, in [0, 1]")
        self.n, self.alpha_0 = steps, alpha
        super().__init__(model, Unstructured(), Magnitude(), Standing(0.0), **options)
        self.thresholds = self.compute(lambda layer: _SoftThreshold(layer.weight, threshold, alpha))

    def parameters(self) -> Iterator[nn.Parameter]:
        """The thresholds, for an optimizer."""
        for soft in self.thresholds:
            yield soft.threshold

    def alpha(self, step: int) -> float:
        """The gradient below the threshold after a step."""
        if step >= self.n:
            return 0.0
        part = step / self.n
        sigmoid = 1 / (1 + math.exp(6 - 12 * part))
        return self.alpha_0 * max((1 + math.cos(math.pi * part)) / 2, 1 - sigmoid)

    @torch.no_grad()
    def step(self) -> None:
        self.steps += 1
        for layer, soft in zip(self.layers, self.thresholds, strict=True):
            soft.alpha = self.alpha(self.steps)
            kept = soft(layer.weight) != 0
            layer.mask, layer.kept = kept, kept.reshape(layer.kept.shape)

    @torch.no_grad()
    def finalize_at(
        self, sparsity: float | None = None, pattern: Pattern | Block | str | None = None
    ) -> Sparsifier:
        """Make W~ the weight; then the largest stay, to the entry, under an exact ``Sparsifier``.

        Parameters
        ----------
        sparsity : float, optional
            What was learned by default (of an unstructured pattern).
        pattern : Pattern, Block or str, optional
        """
        return self.leave(
            self.sparsity if sparsity is None else sparsity,
            pattern,
            "global" if pattern is None else "uniform",
        )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        for soft in self.thresholds:
            soft.alpha = self.alpha(self.steps) if self.steps else self.alpha_0


class _SoftThreshold(nn.Module):
    def __init__(self, weight: Tensor, threshold: float, alpha: float) -> None:
        super().__init__()
        shape = (weight.shape[0], *[1] * (weight.dim() - 1))
        self.threshold = nn.Parameter(weight.detach().new_full(shape, threshold))
        self.alpha = alpha

    def forward(self, weight: Tensor) -> Tensor:
        above: Tensor = _LeakyBackward.apply(weight.abs() - self.threshold.sigmoid(), self.alpha)
        return weight.sign() * above


class _LeakyBackward(torch.autograd.Function):
    """max(x, 0), whose gradient is alpha below 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: float) -> Tensor:
        ctx.save_for_backward(x > 0)
        ctx.alpha = alpha
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (positive,) = ctx.saved_tensors
        return torch.where(positive, gradient, ctx.alpha * gradient), None
