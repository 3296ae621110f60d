"""Scores: what an entry of a weight is worth. The larger is kept."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import Layer

State = dict[str, Tensor]


class Score:
    """What entries are worth, from the weight or from what ``observe`` has seen of training.

    Attributes
    ----------
    norm : {"l2", "sum", "abs_sum"}
        How the entries of a unit add up, of a pattern of blocks or filters.
    sees_gradients : bool
    masked_gradients : {"none", "due", "all"}
        Of a score that sees gradients, whether those of masked entries make a difference: never
        (where they are multiplied by the weight, which is 0), at the step after which masks
        change, or at each step.
    """

    norm: ClassVar[str] = "sum"
    sees_gradients: ClassVar[bool] = False
    masked_gradients: ClassVar[str] = "all"

    def attach(self, layers: Sequence[Layer]) -> None:
        """Called once, before anything else, with all layers."""

    def detach(self) -> None:
        """Leave no hook behind."""

    def observe(self, layers: Sequence[Layer]) -> None:
        """Called at each step, with the gradients of that step in place and finite."""

    def __call__(self, layer: Layer) -> Tensor:
        """The score of each entry, in the shape of the weight, none below 0."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` gave."""


class Magnitude(Score):
    """|w|, and the L2 norm of a unit."""

    norm = "l2"

    def __call__(self, layer: Layer) -> Tensor:
        return layer.weight.detach().abs()


class Gradient(Score):
    """|g|, the gradient of the last step, dense also where the weight is masked."""

    sees_gradients = True
    masked_gradients = "due"

    def __call__(self, layer: Layer) -> Tensor:
        return layer.gradient.detach().abs()


class WeightGradient(Score):
    """|w g|, with the gradient of the last step.

    References
    ----------
    Ding et al., "Global Sparse Momentum SGD for Pruning Very Deep Neural Networks", NeurIPS 2019.
    """

    sees_gradients = True
    masked_gradients = "none"

    def __call__(self, layer: Layer) -> Tensor:
        return (layer.weight.detach() * layer.gradient.detach()).abs()


class Averaged(Score):
    """A score from a running average m <- b m + (1 - b) f(w, g), or with b = 1 from the mean."""

    sees_gradients = True

    def __init__(self, decay: float = 1.0) -> None:
        if not 0 <= decay <= 1:
            raise ValueError(f"{type(self).__name__}: decay {decay}, expected in [0, 1]")
        self.decay = decay
        self.steps = 0
        self.means: State = {}

    def sample(self, weight: Tensor, gradient: Tensor) -> Tensor:
        """f(w, g) of one step."""
        return gradient

    def observe(self, layers: Sequence[Layer]) -> None:
        self.steps += 1
        share = 1 / self.steps if self.decay == 1 else 1 - self.decay
        for layer in layers:
            value = self.sample(layer.weight.detach(), layer.gradient.detach())
            mean = self.means.setdefault(layer.name, torch.zeros_like(value))
            mean.lerp_(value, share)

    def mean(self, layer: Layer) -> Tensor:
        if layer.name not in self.means:
            raise RuntimeError(f"{type(self).__name__}: {layer.name}: no step was seen yet")
        return self.means[layer.name]

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "means": {k: v.clone() for k, v in self.means.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps = state["steps"]
        self.means = {name: mean.clone() for name, mean in state["means"].items()}


class SNIP(Averaged):
    """|w g| with the mean gradient over the steps seen.

    References
    ----------
    Lee, Ajanthan, Torr, "SNIP: Single-shot Network Pruning based on Connection Sensitivity",
    ICLR 2019. Divided by the sum over all entries there, which changes no order.
    """

    masked_gradients = "none"

    def __call__(self, layer: Layer) -> Tensor:
        return (layer.weight.detach() * self.mean(layer)).abs()


class Momentum(Averaged):
    """|m|, the exponentially smoothed gradient (b = 0.9).

    References
    ----------
    Dettmers, Zettlemoyer, "Sparse Networks from Scratch", 2019 (arXiv:1907.04840).
    """

    def __init__(self, decay: float = 0.9) -> None:
        super().__init__(decay)

    def __call__(self, layer: Layer) -> Tensor:
        return self.mean(layer).abs()


class Fisher(Averaged):
    """The diagonal of the empirical Fisher information: the mean of g squared.

    That of the mean over a batch; of single samples where each step sees one.

    References
    ----------
    Sung, Nair, Raffel, "Training Neural Networks with Fixed Sparse Masks", NeurIPS 2021.
    """

    def sample(self, weight: Tensor, gradient: Tensor) -> Tensor:
        return gradient.square()

    def __call__(self, layer: Layer) -> Tensor:
        return self.mean(layer)


class FisherPruning(Fisher):
    """w squared times the Fisher information: the rise of the loss, to second order, doubled.

    References
    ----------
    Theis et al., "Faster gaze prediction with dense networks and Fisher pruning", 2018
    (arXiv:1801.05787).
    """

    masked_gradients = "none"

    def __call__(self, layer: Layer) -> Tensor:
        return layer.weight.detach().square() * self.mean(layer)


class Taylor(Averaged):
    """|w g| averaged; of a unit |sum w g|, the change of the loss, to first order, without it.

    References
    ----------
    Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019.
    """

    masked_gradients = "none"

    norm = "abs_sum"

    def sample(self, weight: Tensor, gradient: Tensor) -> Tensor:
        return weight * gradient

    def __call__(self, layer: Layer) -> Tensor:
        return self.mean(layer)


def check_inputs_seen(layer: nn.Module) -> None:
    """Raise ValueError of a convolution whose inputs ``input_rows`` cannot lay out."""
    if hasattr(layer, "kernel_size") and not (
        isinstance(layer, nn.Conv2d)
        and layer.groups == 1
        and not isinstance(layer.padding, str)
        and layer.padding_mode == "zeros"
    ):
        raise ValueError(
            "inputs are seen of linear layers and of Conv2d with one group and a number of zeros "
            f"around them, not of {layer}"
        )


def input_rows(layer: nn.Module, x: Tensor) -> Tensor:
    """What each output is a sum over: [rows, K], K the entries of a weight's row."""
    check_inputs_seen(layer)
    if not isinstance(layer, nn.Conv2d):
        return x.reshape(-1, x.shape[-1])
    padding: Any = layer.padding  # no string
    unfolded = F.unfold(x, layer.kernel_size, layer.dilation, padding, layer.stride)
    return unfolded.transpose(1, 2).flatten(0, 1)


class InputScore(Score):
    """A score from the inputs of the layers, which hooks see in each forward pass."""

    def __init__(self) -> None:
        self.rows: dict[str, int] = {}
        self.sums: State = {}
        self._hooks: list[Any] = []

    def attach(self, layers: Sequence[Layer]) -> None:
        for layer in layers:
            check_inputs_seen(layer.module)
        for layer in layers:
            # No local function: a copy of the model is to have a score of its own.
            see = functools.partial(self._see_call, layer)
            self._hooks.append(layer.module.register_forward_hook(see, with_kwargs=True))

    def _see_call(
        self,
        layer: Layer,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> None:
        given = args[0] if args else next(iter(kwargs.values()))
        self.see(layer, given.detach())

    def detach(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def see(self, layer: Layer, x: Tensor) -> None:
        """Add the inputs of one forward pass."""
        rows = input_rows(layer.module, x).float()
        self.rows[layer.name] = self.rows.get(layer.name, 0) + len(rows)
        total = self.total(rows)
        self.sums[layer.name] = self.sums[layer.name] + total if layer.name in self.sums else total

    def total(self, rows: Tensor) -> Tensor:
        """What is summed over the rows."""
        return rows.square().sum(0)

    def mean(self, layer: Layer) -> Tensor:
        if layer.name not in self.sums:
            raise RuntimeError(f"{type(self).__name__}: {layer.name}: no inputs were seen yet")
        return self.sums[layer.name] / max(1, self.rows[layer.name])

    def state_dict(self) -> dict[str, Any]:
        return {"rows": dict(self.rows), "sums": {k: v.clone() for k, v in self.sums.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.rows = dict(state["rows"])
        self.sums = {name: total.clone() for name, total in state["sums"].items()}


class WandaScore(InputScore):
    """|w| times the L2 norm of its input.

    References
    ----------
    Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", ICLR 2024.
    """

    norm = "l2"

    def __call__(self, layer: Layer) -> Tensor:
        weight = layer.weight.detach()
        return weight.abs() * self.mean(layer).sqrt().to(weight.dtype).view(1, *layer.shape[1:])


class SecondOrder(InputScore):
    """w squared over the diagonal of (X^T X / rows + damping)^-1: the outputs' error without w.

    Parameters
    ----------
    damping : float
        What is added to the diagonal, as a share of its mean.

    References
    ----------
    Hassibi, Stork, "Optimal Brain Surgeon", NeurIPS 1993.
    """

    def __init__(self, damping: float = 0.01) -> None:
        super().__init__()
        self.damping = damping

    def total(self, rows: Tensor) -> Tensor:
        return rows.t() @ rows

    def __call__(self, layer: Layer) -> Tensor:
        inverse = damped_inverse(self.mean(layer), self.damping)
        weight = layer.weight.detach()
        return (weight.flatten(1).square() / inverse.diagonal()).view(layer.shape).to(weight.dtype)


def damped_inverse(hessian: Tensor, damping: float) -> Tensor:
    """The inverse of [K, K] with a share of its mean diagonal added, and 1 where that is 0."""
    hessian = hessian.double()
    diagonal = hessian.diagonal().clone()
    added = damping * diagonal.mean() + (diagonal == 0)
    if not math.isfinite(float(diagonal.sum())):
        raise ValueError("the inputs of a layer are not finite")
    return torch.cholesky_inverse(torch.linalg.cholesky(hessian + torch.diag(added)))
