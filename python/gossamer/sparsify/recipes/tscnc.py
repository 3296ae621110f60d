"""TSCNC: pruning under penalties that keep a sparse network robust."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...formats import Block
from ..patterns import Pattern
from .gradual import GMP


def transformed_l1(weight: Tensor, a: float = 1.0) -> Tensor:
    """sum (a + 1) |w| / (a + |w|): |w|_0 for a -> 0, |w|_1 for a -> infinity.

    References
    ----------
    Zhang, Xin, "Minimization of transformed L1 penalty", Mathematical Programming 2018.
    """
    size = weight.abs()
    return ((a + 1) * size / (a + size)).sum()


def log_condition_number(weight: Tensor) -> Tensor:
    """ln(sigma_max / sigma_min) of [N, ...] as [N, K], without singular values that are 0.

    As for its rank, what is below max(N, K) eps sigma_max counts as 0. It costs a singular value
    decomposition.
    """
    matrix = weight.flatten(1)
    if matrix.dtype not in (torch.float32, torch.float64):
        matrix = matrix.float()
    values = torch.linalg.svdvals(matrix)
    least = max(matrix.shape) * torch.finfo(matrix.dtype).eps * values[0].detach()
    live = values[values > least]
    return (live[0] / live[-1]).log() if len(live) else values.sum() * 0


class TSCNC(GMP):
    """L_adv + a sum of transformed L1 + b sum of ln(condition number), under gradual pruning.

    The loss is that of adversarial inputs (``pgd_attack``), and the two penalties are added to it
    in each step::

        x = pgd_attack(model, loss, x, y)
        (loss(model(x), y) + made.penalty()).backward()

    Sparsity alone lets the least singular value of a layer fall and so its condition number rise,
    and with it what a small change of the input can do; the second penalty works against it.

    Parameters
    ----------
    model, sparsity, begin, end, every, pattern, **options
        As for ``GMP``.
    sparse_strength, condition_strength : float
        a and b. Not known from the paper, as is the schedule: ours.

    Raises
    ------
    TypeError, ValueError
        As ``Sparsifier`` says, or if a strength is negative.

    References
    ----------
    "Lipschitzness meets condition number": the transformed sparse constraint joint with a
    condition number constraint. The two forms are read from their names.
    """

    def __init__(
        self,
        model: nn.Module,
        sparsity: float,
        begin: int,
        end: int,
        every: int = 100,
        pattern: Pattern | Block | str | None = None,
        sparse_strength: float = 1e-5,
        condition_strength: float = 1e-3,
        **options: Any,
    ) -> None:
        if sparse_strength < 0 or condition_strength < 0:
            raise ValueError(
                f"TSCNC: strengths {sparse_strength} and {condition_strength}, expected at least 0"
            )
        self.sparse_strength, self.condition_strength = sparse_strength, condition_strength
        super().__init__(model, sparsity, begin, end, every, pattern, **options)

    def penalty(self) -> Tensor:
        """What is added to the loss."""
        weights = [layer.weight for layer in self.layers]
        sparse = sum((transformed_l1(w) for w in weights[1:]), transformed_l1(weights[0]))
        log = log_condition_number
        condition = sum((log(w) for w in weights[1:]), log(weights[0]))
        return self.sparse_strength * sparse + self.condition_strength * condition
