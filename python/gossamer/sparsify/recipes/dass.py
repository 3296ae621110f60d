"""DASS: the masks of the operations that an architecture search mixes are learned with it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ...formats import Block
from ..computed import Computed, Standing
from ..layers import Layer, MaskNow
from ..patterns import Pattern, Unstructured
from ..scores import Score
from ..sparsifier import Sparsifier


class MaskScores(Score):
    """|s| of the trained mask scores; |w|, which they begin with, before there are any."""

    norm = "l2"

    def __call__(self, layer: Layer) -> Tensor:
        if parametrize.is_parametrized(layer.module, "weight"):
            scored: Any = layer.module.parametrizations.weight[0]  # type: ignore[union-attr, index]
            return scored.scores.detach().abs()
        return layer.weight.detach().abs()


class DASS(Computed):
    """Sparse linear layers and convolutions, W~ = M(s) W, as operations of a search.

    M keeps the entries of largest |s|, anew in each step that trains scores; the gradient passes it
    unchanged: dL/ds = dL/dW~ W and dL/dW = dL/dW~ M. Scores begin as w / max |w| of a layer. The
    inner loop trains weights, then scores, then weights under the masks that were found; the outer
    one the architecture by the validation loss of the pruned network, which is what the model
    computes at any time::

        cell = MixedOp([nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 32), nn.Linear(32, 8))])
        made = DASS(cell, 0.9)
        made.train_scores()   # or made.train_weights()
        loss(cell(x)).backward(); optimizer.step(); made.step()

    Parameters
    ----------
    model, pattern, **options
        As for ``Sparsifier``.
    sparsity : float
    log_every : int
        Steps between entries of the report's history while scores are trained.

    Raises
    ------
    TypeError, ValueError
        As ``Sparsifier`` says, or if ``log_every`` is below 1.

    References
    ----------
    Mousavi et al., "DASS: Differentiable Architecture Search for Sparse Neural Networks", ACM
    TECS 2023. The operations are from memory; the scores' beginning and gradient are those of
    Sehwag et al., "HYDRA", NeurIPS 2020, without its factor.
    """

    def __init__(
        self,
        model: nn.Module,
        sparsity: float,
        pattern: Pattern | Block | str | None = None,
        log_every: int = 100,
        **options: Any,
    ) -> None:
        if log_every < 1:
            raise ValueError(f"DASS: log_every {log_every}, expected at least 1")
        self.log_every = log_every
        super().__init__(
            model, pattern or Unstructured(), MaskScores(), Standing(sparsity), **options
        )
        self._ops = self.compute(_Scored)
        self.train_weights()

    def parameters(self) -> Iterator[nn.Parameter]:
        """The mask scores, which are among the model's parameters."""
        for op in self._ops:
            yield op.scores

    def train_weights(self) -> None:
        """From now on masks stand and weights are trained under them."""
        self._let(scores=False)

    def train_scores(self) -> None:
        """From now on weights stand and masks are trained."""
        self._let(scores=True)

    def _let(self, scores: bool) -> None:
        for layer, op in zip(self.layers, self._ops, strict=True):
            op.scores.requires_grad_(scores)
            layer.weight.requires_grad_(not scores)
            op.scores.grad = layer.weight.grad = None

    @torch.no_grad()
    def step(self) -> None:
        self.steps += 1
        if self._ops[0].scores.requires_grad:
            noted = self.steps % self.log_every == 0
            self._take(self._selected(self.schedule.sparsity), noted)

    @torch.no_grad()
    def finalize_at(self) -> Sparsifier:
        """Make W~ the weight, under an exact ``Sparsifier``."""
        self.train_weights()
        return self.leave(self.schedule.sparsity, distribution=self.distribution)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "trains scores": self._ops[0].scores.requires_grad}

    def load_state_dict(self, state: Any) -> None:
        super().load_state_dict(state)
        self._let(state["trains scores"])


class MixedOp(nn.Module):
    """y = sum_i softmax(a)_i op_i(x): candidate operations, and how much each is wanted.

    Parameters
    ----------
    ops : iterable of nn.Module
        Of results of one shape.

    Attributes
    ----------
    a : Parameter
        [operations], 0 at the beginning; of the outer loop's optimizer.

    Raises
    ------
    ValueError
        If there are no operations.

    References
    ----------
    Liu, Simonyan, Yang, "DARTS: Differentiable Architecture Search", ICLR 2019.
    """

    def __init__(self, ops: Iterable[nn.Module]) -> None:
        super().__init__()
        self.ops = nn.ModuleList(ops)
        if len(self.ops) == 0:
            raise ValueError("MixedOp: no operations, expected at least one")
        self.a = nn.Parameter(torch.zeros(len(self.ops)))

    def forward(self, x: Tensor) -> Tensor:
        shares = self.a.softmax(0)
        first, *others = (share * op(x) for share, op in zip(shares, self.ops, strict=True))
        return sum(others, first)

    def best(self) -> nn.Module:
        """The operation that is wanted most."""
        return self.ops[int(self.a.argmax())]


class _Scored(nn.Module):
    def __init__(self, layer: Layer) -> None:
        super().__init__()
        weight = layer.weight.detach()
        top = weight.abs().amax().clamp(min=torch.finfo(weight.dtype).tiny)
        self.scores = nn.Parameter(weight / top)
        self._mask = MaskNow(layer)

    def forward(self, weight: Tensor) -> Tensor:
        masked: Tensor = _MaskedByScores.apply(weight, self.scores, self._mask(self.scores))
        return masked


class _MaskedByScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, scores: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(weight, mask)
        return weight.masked_fill(~mask, 0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        weight, mask = ctx.saved_tensors
        of_weight = gradient.masked_fill(~mask, 0) if ctx.needs_input_grad[0] else None
        return of_weight, gradient * weight if ctx.needs_input_grad[1] else None, None
