"""Straight-through training: the forward pass sees masked weights, the optimizer dense ones."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from ..conversion.report import ConversionReport
from ..conversion.selection import layer_sites
from ..formats import Block
from ..nn import SparseTrainingLinear
from ..nn.called import keep_called
from ..projection24 import add_dropped_24
from .computed import Standing
from .hooks import before_update
from .kernels import Masked, Through
from .layers import Layer, MaskNow, replaceable, to_kernels, unwrapped
from .patterns import NM, Blocks, Pattern, as_pattern
from .scores import Magnitude
from .sparsifier import Sparsifier


class STE(Sparsifier):
    """W~ = M W in the forward pass, M by magnitude and anew; dL/dW = dL/dW~ + decay (1 - M) W.

    ``step()`` comes after ``optimizer.step()``, as with any ``Sparsifier``. Linear layers whose
    pattern is 2:4 become ``gossamer.nn.SparseTrainingLinear``, which multiplies by the 2:4 kernels
    and shares the Parameters; other layers and patterns are masked. The decay is added to the
    gradient right before the optimizer's step: once, however many batches were accumulated, after
    a scaler has unscaled it, and it enters the momentum. A deep copy of the model, such as an
    average of it, masks by its own weights.

    Parameters
    ----------
    model : nn.Module
    optimizer : torch.optim.Optimizer, optional
        Needed for a decay.
    pattern : Pattern, Block or str
        Any; 2:4 by default.
    sparsity : float, optional
        Of patterns other than N:M, which have their own.
    decay : float
        Of what is masked.
    refresh : int
        Steps between searches for the masks.
    log_every : int
        Steps between entries of the report's history, whose ``changed`` is the SAD since the last.
    kernels : bool
        Whether layers of blocks are computed by their kernels, all but the dense gradient of the
        weight.
    **options
        ``include``, ``exclude`` of ``Sparsifier``.

    Raises
    ------
    TypeError, ValueError
        As ``Sparsifier`` says, or if a number is out of its range, the pattern needs a sparsity,
        or a decay an optimizer.

    References
    ----------
    Bengio, Leonard, Courville, "Estimating or Propagating Gradients Through Stochastic Neurons for
    Conditional Computation", 2013 (arXiv:1308.3432).
    """

    computes = True
    projection = "hard"
    mvue = False

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        pattern: Pattern | Block | str = "2:4",
        sparsity: float | None = None,
        decay: float = 0.0,
        refresh: int = 1,
        log_every: int = 100,
        kernels: bool = False,
        **options: Any,
    ) -> None:
        op = type(self).__name__
        pattern = as_pattern(pattern)
        if isinstance(pattern, NM):
            sparsity = 1 - pattern.n / pattern.m if sparsity is None else sparsity
        if sparsity is None:
            raise ValueError(f"{op}: {pattern} needs a sparsity")
        if not 0 <= decay < math.inf or (decay > 0 and optimizer is None):
            raise ValueError(f"{op}: decay {decay}: expected none below 0, and with an optimizer")
        if refresh < 1 or log_every < 1:
            raise ValueError(f"{op}: refresh {refresh}, log_every {log_every}: at least 1 each")
        if self.projection != "hard" and pattern != NM(2, 4):
            raise ValueError(f"{op}: has the pattern 2:4, got {pattern}")
        self.decay, self.refresh, self.log_every = decay, refresh, log_every
        self._swapped: dict[str, SparseTrainingLinear] = {}
        self._kept_called: list[RemovableHandle] = []
        super().__init__(
            model, pattern, Magnitude(), Standing(sparsity), optimizer=optimizer, **options
        )
        self._enter(kernels)
        self._hook = None
        if optimizer is not None and decay > 0:
            self._hook = before_update(optimizer, self._add_decay)

    def _enter(self, kernels: bool) -> None:
        """Let the forward pass see projected weights."""
        op = type(self).__name__
        sites = {site.name: site for site in layer_sites(unwrapped(self.model))}
        swapped = {
            layer.name
            for layer in self.layers
            if self.pattern == NM(2, 4)
            and type(layer.module) is nn.Linear
            and replaceable(sites[layer.name])
        }
        for layer in self.layers:  # before any is changed
            if self.projection != "hard" and layer.name not in swapped:
                raise ValueError(f"{op}: {layer.name}: a plain Linear inside a model is expected")
            if kernels and layer.name not in swapped:
                self._check_kernels(layer, isinstance(self.pattern, Blocks), straight=True)
        for layer in self.layers:
            linear = layer.module
            if layer.name in swapped:
                assert isinstance(linear, nn.Linear)
                fast = SparseTrainingLinear.from_dense(
                    linear, self.projection, self.refresh, self.mvue
                )
                self._swapped[layer.name] = layer.module = fast
                sites[layer.name].replace(fast)
            elif kernels:
                layer.module.forward = Through(layer, _never, straight=True)
                self._kept_called.append(keep_called(layer.module))
            else:
                parametrize.register_parametrization(layer.module, "weight", _Masked(layer))

    def apply(self) -> None:
        """Leave the dense weights alone."""

    @torch.no_grad()
    def step(self) -> None:
        self.steps += 1
        due, logged = self.steps % self.refresh == 0, self.steps % self.log_every == 0
        if logged or (due and len(self._swapped) < len(self.layers)):
            masks = self._selected(self.schedule.sparsity) if due else self._multiplied()
            self._take(masks, noted=logged)

    def _multiplied(self) -> list[Tensor]:
        """The units that the forward pass keeps at present."""
        return [
            layer.units(self._swapped[layer.name].mask.float(), "l2") > 0
            if layer.name in self._swapped
            else layer.kept
            for layer in self.layers
        ]

    def _selected(self, sparsity: float) -> list[Tensor]:
        if not self._swapped:
            return super()._selected(sparsity)
        return [
            held
            if layer.name in self._swapped
            else self.pattern.select(self.scored(layer, self.score), layer.keep(sparsity))
            for layer, held in zip(self.layers, self._multiplied(), strict=True)
        ]

    @torch.no_grad()
    def _add_decay(self) -> None:
        """Add decay (W - M W) to the gradients, which are dense."""
        for layer in self.layers:
            grad, fast = layer.weight.grad, self._swapped.get(layer.name)
            if grad is not None:
                masked = layer.weight * layer.mask if fast is None else fast.projected()
                add_dropped_24(grad, layer.weight, masked, self.decay)

    @torch.no_grad()
    def to_dense(self, project: bool = False) -> None:
        """Put torch's own layers back, with the dense weights or with what was multiplied."""
        sites = {site.name: site for site in layer_sites(unwrapped(self.model))}
        for layer in self.layers:
            fast = self._swapped.pop(layer.name, None)
            if fast is None:
                # torch's function would leave the weight without its Parameter.
                weight = layer.weight
                if parametrize.is_parametrized(layer.module, "weight"):
                    parametrize.remove_parametrizations(
                        layer.module, "weight", leave_parametrized=False
                    )
                if project:
                    weight.masked_fill_(~layer.mask, 0)
                continue
            if project:
                fast.weight.copy_(fast.projected())
            linear = nn.Linear(1, 1, fast.bias is not None, device="meta")
            linear.in_features, linear.out_features = fast.in_features, fast.out_features
            linear.weight, linear.bias = fast.weight, fast.bias
            layer.module = linear.train(fast.training)
            sites[layer.name].replace(linear)
        self.detach()

    def detach(self) -> None:
        super().detach()
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        for handle in self._kept_called:
            handle.remove()

    @torch.no_grad()
    def finalize(self, **options: Any) -> ConversionReport:
        """Make the weights what was multiplied and hand the layers to ``gossamer.convert``.

        Raises
        ------
        ValueError
            If no kernel runs the pattern; nothing is changed then.
        """
        op = type(self).__name__
        if self.pattern.kernels is None:
            raise ValueError(f"{op}: no kernel runs {self.pattern}; to_dense(project=True) masks")
        self._take(self._multiplied())
        self.to_dense(project=True)
        return to_kernels(op, self.model, self.layers, **options)


class SRSTE(STE):
    """Sparse-refined straight-through estimator: ``STE`` with a decay of what is masked.

    Parameters
    ----------
    model, optimizer, pattern, **options
        As for ``STE``.
    decay : float
        lambda_W of the paper.

    References
    ----------
    Zhou et al., "Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch", ICLR
    2021.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        pattern: Pattern | Block | str = "2:4",
        decay: float = 2e-4,
        **options: Any,
    ) -> None:
        super().__init__(model, optimizer, pattern, decay=decay, **options)


class SSTE(STE):
    """W~ = beta S(W), S the soft threshold of each four and beta frozen; the gradient goes to W.

    beta = <W, S(W)> / <S(W), S(W)> of each weight as it is when this is made. The gradient is not
    multiplied by beta, as in the authors' code. Linear layers only, 2:4 only.

    Parameters
    ----------
    model, **options
        As for ``STE``.
    mvue : bool
        Whether weight gradients come from a 2:4 estimate of the output's gradient. The paper's do,
        for its speed on a GPU; here it costs time and adds noise, so it has to be asked for.

    References
    ----------
    Hu et al., "S-STE: Continuous Pruning Function for Efficient 2:4 Sparse Pre-training", NeurIPS
    2024. Without its FP8.
    """

    projection = "soft"

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        mvue: bool = False,
        **options: Any,
    ) -> None:
        self.mvue = mvue
        super().__init__(model, optimizer, **options)


class MaskedDecay(STE):
    """2:4 training with masks that are 2:4 both ways, a decay of what is masked, dense in the end.

    Masks are searched every 40 steps. The paper trains dense for the last sixth of the steps:
    ``to_dense()``.

    Parameters
    ----------
    model, optimizer, **options
        As for ``STE``.
    decay : float
        6e-5 or 2e-4 in the paper, by the size of the model.
    mvue : bool
        Whether weight gradients come from a 2:4 estimate of the output's gradient.

    References
    ----------
    Hu et al., "Accelerating Transformer Pre-training with 2:4 Sparsity", ICML 2024.
    """

    projection = "transposable"

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        decay: float = 6e-5,
        refresh: int = 40,
        mvue: bool = False,
        **options: Any,
    ) -> None:
        self.mvue = mvue
        super().__init__(model, optimizer, decay=decay, refresh=refresh, **options)


def _never() -> bool:
    return False


class _Masked(nn.Module):
    """The parametrisation of a weight that is masked in the forward pass alone."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self._mask = MaskNow(layer)

    def forward(self, weight: Tensor) -> Tensor:
        masked: Tensor = Masked.apply(weight, self._mask(weight))
        return masked
