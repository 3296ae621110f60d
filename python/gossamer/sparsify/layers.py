"""The layers that are sparsified: their weight, their mask, and what was found of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize

from ..conversion.eligibility import Obstacles
from ..conversion.report import ConversionReport
from ..conversion.selection import LayerSite, layer_sites, left_out
from ..convert import convert
from .patterns import Pattern

Names = str | Iterable[str]


@dataclass(eq=False)
class Layer:
    """One layer under a pattern.

    Attributes
    ----------
    name : str
        Of the module, in the model.
    module : nn.Module
        A linear layer or a convolution.
    pattern : Pattern
        What its mask looks like.
    mask : Tensor
        Bool, in the shape of the weight: the entries that live.
    kept : Tensor
        Bool [lanes, units]: the same, by the pattern's units.
    fresh : Tensor or None
        The entries that the last change of the mask brought to life.
    """

    name: str
    module: nn.Module
    pattern: Pattern
    mask: Tensor = field(init=False)
    kept: Tensor = field(init=False)
    fresh: Tensor | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.pattern.check(self.shape, self.groups)
        ones = torch.ones_like(self.weight, dtype=torch.float32)
        self.mask = ones.bool()
        self.kept = self.pattern.units(ones, self.groups, "l2") > 0

    @property
    def weight(self) -> nn.Parameter:
        """The dense Parameter, also where a recipe computes the module's weight from it."""
        module: Any = self.module
        computed = parametrize.is_parametrized(module, "weight")
        weight = module.parametrizations.weight.original if computed else module.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    @property
    def groups(self) -> int:
        return int(getattr(self.module, "groups", 1))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.weight.shape)

    @property
    def gradient(self) -> Tensor:
        grad = self.weight.grad
        if grad is None:
            raise RuntimeError(
                f"{self.name}: no gradient; call step() after optimizer.step() and before "
                "zero_grad()"
            )
        return grad

    @property
    def sparsity(self) -> float:
        """The share of entries that the mask drops."""
        return 1 - float(self.mask.sum()) / self.mask.numel()

    def units(self, score: Tensor, norm: str) -> Tensor:
        return self.pattern.units(score, self.groups, norm)

    def keep(self, sparsity: float) -> int:
        """How many units live at a sparsity."""
        return self.pattern.keep(tuple(self.kept.shape), self.shape, sparsity)

    def take(self, kept: Tensor) -> int:
        """Let these units live alone, and say how many entries of the mask changed."""
        mask = self.pattern.cover(kept, self.shape, self.groups)
        changed, self.fresh = int((mask ^ self.mask).sum()), mask & ~self.mask
        self.kept, self.mask = kept, mask
        return changed

    @property
    def fans(self) -> tuple[int, int]:
        """Outputs and inputs."""
        return self.shape[0], self.shape[1]

    @property
    def taps(self) -> int:
        return math.prod(self.shape[2:])


@dataclass(eq=False)
class MaskNow:
    """The mask of a layer, which a sparsifier changes.

    A copy of the model has no sparsifier: there it is that of the weight given, by magnitude.
    """

    layer: Layer

    def __call__(self, weight: Tensor) -> Tensor:
        return self.layer.mask

    def __reduce__(self) -> tuple[Any, ...]:
        layer = self.layer
        return partial, (layer.pattern.by_magnitude, layer.groups, int(layer.kept.sum()))


def find_layers(
    op: str,
    model: nn.Module,
    pattern: Pattern,
    include: Names | None,
    exclude: Names | None,
) -> list[Layer]:
    """Every linear layer and convolution that is named, all of which have to fit.

    Raises
    ------
    TypeError, ValueError
        If there is none, or one is frozen, tied, no plain torch layer, or of a shape without the
        pattern: with its name and the reason.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: model is {type(model).__name__}, expected torch.nn.Module")
    model = unwrapped(model)
    sites = layer_sites(model)
    out = left_out(model, sites, include, exclude, op)
    obstacles = Obstacles(model)
    layers = []
    for site in sites:
        if site in out:
            continue
        reason = obstacles.not_to_be_written(site.module)
        if reason is None and not site.module.weight.requires_grad:
            reason = "frozen: its weight has requires_grad=False"
        if reason is None:
            try:
                layers.append(Layer(site.name, site.module, pattern))
            except ValueError as error:
                reason = str(error)
        if reason is not None:
            raise ValueError(f"{op}: {site.name}: {reason}; exclude={site.name!r} leaves it alone")
    if not layers:
        raise ValueError(f"{op}: the model has no linear layer and no convolution to sparsify")
    return layers


def to_kernels(
    op: str, model: nn.Module, layers: Sequence[Layer], **options: Any
) -> ConversionReport:
    """Hand layers under one pattern to ``convert``; ValueError where no kernel runs it."""
    pattern = layers[0].pattern
    if pattern.kernels is None:
        raise ValueError(f"{op}: no kernel runs {pattern}")
    names = [layer.name for layer in layers]
    return convert(unwrapped(model), pattern.kernels, include=names, **options)


def replaceable(site: LayerSite) -> bool:
    """Whether another layer may take its place: not where it is the model, or compiled alone."""
    # The name, since asking for the class would import the compiler.
    compiled = any(type(holder).__name__ == "OptimizedModule" for holder, _ in site.holders)
    return bool(site.holders) and not compiled


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself of a DistributedDataParallel one."""
    return model.module if isinstance(model, DistributedDataParallel) else model
