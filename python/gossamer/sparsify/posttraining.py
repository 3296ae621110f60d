"""Pruning after training: layer by layer, by what the layers see of calibration data."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..conversion.report import ConversionReport
from ..formats import Block
from .layers import Layer, Names, find_layers, to_kernels
from .obs import sparsegpt_weight
from .patterns import NM, ConstantFanIn, Pattern, Unstructured, as_pattern
from .report import MaskChange, SparsityReport
from .scores import input_rows
from .trim import nettrim_weight

METHODS = ("magnitude", "wanda", "sparsegpt", "nettrim")


class _Enough(Exception):
    """Ends a forward pass behind the layer that is calibrated."""


class Pruned:
    """What ``prune_after_training`` made: the layers, their report, and the way to the kernels."""

    def __init__(self, model: nn.Module, layers: Sequence[Layer], change: MaskChange) -> None:
        self.model, self.layers, self._change = model, list(layers), change

    @property
    def masks(self) -> dict[str, Tensor]:
        """The bool mask of each layer's weight."""
        return {layer.name: layer.mask for layer in self.layers}

    def report(self) -> SparsityReport:
        return SparsityReport.of(str(self.layers[0].pattern), self.layers, [self._change])

    def finalize(self, **options: Any) -> ConversionReport:
        """Hand the layers to ``gossamer.convert``; ValueError where no kernel runs the pattern."""
        return to_kernels("prune_after_training", self.model, self.layers, **options)


@torch.no_grad()
def prune_after_training(
    model: nn.Module,
    calibration: Iterable[Any] = (),
    pattern: Pattern | Block | str = "2:4",
    method: str = "sparsegpt",
    sparsity: float | None = None,
    include: Names | None = None,
    exclude: Names | None = None,
    progress: bool = True,
    **options: Any,
) -> Pruned:
    """Prune a trained model in place, without training it.

    The layers are done in the order in which the model has them, each on what reaches it through
    the layers that are pruned already. For each, the calibration batches run through the model up
    to that layer; what is kept between batches is one [K, K] matrix of that layer alone (of
    "nettrim", its inputs).

    Parameters
    ----------
    model : nn.Module
        In evaluation mode for the time of the call.
    calibration : iterable
        Batches, which are gone through once for each layer: a tensor, a tuple of positional or a
        dictionary of keyword arguments each. Not needed by "magnitude".
    pattern : Pattern, Block or str
    method : {"magnitude", "wanda", "sparsegpt", "nettrim"}
        |w|; |w| times the norm of its input, compared within each row; second order, with an
        update of what is kept (``sparsegpt_weight``); sparse least squares (``nettrim_weight``).
    sparsity : float, optional
        In [0, 1); N:M has its own.
    include, exclude
        As for ``gossamer.convert``.
    progress : bool
        Whether a bar counts the layers.
    **options
        Of ``sparsegpt_weight`` or ``nettrim_weight``.

    Returns
    -------
    Pruned

    Raises
    ------
    TypeError, ValueError
        As ``Sparsifier``; a method without the calibration it needs, or a layer that it never
        reaches.

    References
    ----------
    Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", ICLR 2024;
    Frantar, Alistarh, "SparseGPT", ICML 2023; Aghasi et al., "Net-Trim", NeurIPS 2017.
    """
    op = "prune_after_training"
    if method not in METHODS:
        raise ValueError(f"{op}: method {method!r}, expected {METHODS}")
    pattern = as_pattern(pattern)
    if isinstance(pattern, NM) and sparsity is None:
        sparsity = 1 - pattern.n / pattern.m
    if sparsity is None or not 0 <= sparsity < 1:
        raise ValueError(f"{op}: sparsity {sparsity}, expected at least 0 and below 1")
    if method == "wanda" and isinstance(pattern, Unstructured):
        pattern = ConstantFanIn()
    layers = find_layers(op, model, pattern, include, exclude)
    for layer in layers:
        layer.keep(sparsity)
    batches = calibration if isinstance(calibration, Sequence) else list(calibration)
    if method != "magnitude" and not batches:
        raise ValueError(f"{op}: {method!r} needs calibration batches")
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    energy, changed = {}, {}
    try:
        for layer in tqdm(layers, op, disable=not progress, unit="layer"):
            before = layer.weight.detach().double().square()
            weight = _pruned(model, layer, batches, method, sparsity, options)
            changed[layer.name] = int((~layer.mask).sum())
            kept = float(before[layer.mask].sum())
            energy[layer.name] = kept / max(float(before.sum()), torch.finfo(torch.float64).tiny)
            layer.weight.copy_(weight)
    finally:
        for module, training in modes:  # each its own: some may have been left in evaluation
            module.training = training
    change = MaskChange(
        0,
        {layer.name: layer.sparsity for layer in layers},
        {layer.name: changed[layer.name] / layer.mask.numel() for layer in layers},
        energy,
    )
    return Pruned(model, layers, change)


def _pruned(
    model: nn.Module,
    layer: Layer,
    batches: Sequence[Any],
    method: str,
    sparsity: float,
    options: Mapping[str, Any],
) -> Tensor:
    """The new weight of a layer, whose mask becomes that of its entries."""
    weight = layer.weight.detach()
    if method == "magnitude":
        _take_best(layer, weight.abs(), sparsity, "l2")
        return weight * layer.mask
    if method == "nettrim":
        parts: list[Tensor] = []
        each_input(model, layer, batches, parts.append)
        solved, mask = nettrim_weight(weight, torch.cat(parts), layer, sparsity, **options)
        layer.take(layer.units(mask.to(torch.float32), "l2") > 0)
        return solved
    hessian = input_products(model, layer, batches)
    if method == "wanda":
        norms = hessian.diagonal().sqrt().to(weight.dtype).view(1, *layer.shape[1:])
        _take_best(layer, weight.abs() * norms, sparsity, "l2")
        return weight * layer.mask
    solved, mask = sparsegpt_weight(weight, hessian, layer, sparsity, **options)
    layer.take(layer.units(mask.to(torch.float32), "l2") > 0)
    return solved


def _take_best(layer: Layer, score: Tensor, sparsity: float, norm: str) -> None:
    layer.take(layer.pattern.select(layer.units(score, norm), layer.keep(sparsity)))


def input_products(model: nn.Module, layer: Layer, batches: Iterable[Any]) -> Tensor:
    """XᵀX over all rows that reach a layer, by their number: [K, K] float64."""
    inputs = layer.weight[0].numel()
    total = torch.zeros(inputs, inputs, dtype=torch.float64, device=layer.weight.device)
    rows = 0

    def add(x: Tensor) -> None:
        nonlocal rows
        total.add_(x.t() @ x)
        rows += len(x)

    each_input(model, layer, batches, add)
    return total / rows


def each_input(
    model: nn.Module, layer: Layer, batches: Iterable[Any], use: Callable[[Tensor], None]
) -> None:
    """Run the model up to a layer and hand over what reaches it: [rows, K] float32.

    Raises
    ------
    ValueError
        If no batch reaches it, or its inputs are not finite or cannot be seen as rows.
    """
    rows = 0

    def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal rows
        given = args[0] if args else next(iter(kwargs.values()))
        x = input_rows(module, given.detach()).float()
        if not bool(x.square().sum().isfinite()):
            raise ValueError(
                f"prune_after_training: {layer.name}: its inputs, or their squares, are not finite"
            )
        rows += len(x)
        use(x)

    def stop(*_: Any) -> None:
        raise _Enough

    hooks = [
        layer.module.register_forward_pre_hook(see, with_kwargs=True),
        layer.module.register_forward_hook(stop),
    ]
    try:
        for batch in batches:
            try:
                _call(model, batch)
            except _Enough:
                continue
    finally:
        for hook in hooks:
            hook.remove()
    if rows == 0:
        raise ValueError(
            f"prune_after_training: {layer.name}: no calibration batch reaches it; "
            f"exclude={layer.name!r} leaves it alone"
        )


def _call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


# Under the names of their papers.
Wanda = functools.partial(prune_after_training, method="wanda")
SparseGPT = functools.partial(prune_after_training, method="sparsegpt")
NetTrim = functools.partial(prune_after_training, method="nettrim")
