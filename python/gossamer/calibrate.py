"""``calibrate_thresholds``: which inputs of a model's linear layers are small enough to skip."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from .conversion.timing import arguments_of, run_evaluating
from .nn import ActSparseLinear
from .ops.actsparse_gradient import masked

# Kept of each layer: rows for the error of its output, magnitudes for the quantiles.
_ROWS, _MAGNITUDES = 64, 1 << 18
_STEPS = 20  # of sparsity that "greedy" tries


@dataclass(frozen=True)
class LayerThreshold:
    """What was chosen for one layer.

    Attributes
    ----------
    name : str
        Of the layer in the model.
    shape : tuple of int
        (out_features, in_features).
    threshold : float
        Inputs of at most this absolute value count as zero.
    sparsity : float
        The share of the calibration's inputs for which that is so, or that are zero anyway.
    error : float
        ‖ΔY‖ / ‖Y‖ of the layer's outputs, without bias, on some of these inputs.
    """

    name: str
    shape: tuple[int, int]
    threshold: float
    sparsity: float
    error: float


@dataclass(frozen=True)
class ThresholdReport:
    """Printed, a table; iterated, its ``LayerThreshold`` rows."""

    layers: tuple[LayerThreshold, ...]

    @property
    def thresholds(self) -> dict[str, float]:
        """By name, as ``convert(model, "activation", thresholds=...)`` takes them."""
        return {layer.name: layer.threshold for layer in self.layers}

    @property
    def sparsity(self) -> float:
        """The share of all weights that the inputs skip, on average."""
        weights = [layer.shape[0] * layer.shape[1] for layer in self.layers]
        skipped = (w * layer.sparsity for w, layer in zip(weights, self.layers, strict=True))
        return sum(skipped) / max(sum(weights), 1)

    def rows(self) -> list[dict[str, Any]]:
        """The table for machines: one dict a layer, of what JSON can hold."""
        return [{**asdict(layer), "shape": list(layer.shape)} for layer in self.layers]

    def __iter__(self) -> Iterator[LayerThreshold]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __str__(self) -> str:
        width = max([5, *(len(layer.name) for layer in self.layers)])
        lines = [f"{'layer':{width}}  {'weight':>13}  threshold  sparsity   error"]
        for layer in self.layers:
            shape = "x".join(map(str, layer.shape))
            lines.append(
                f"{layer.name:{width}}  {shape:>13}  {layer.threshold:9.3g}  {layer.sparsity:8.1%}"
                f"  {layer.error:6.2%}"
            )
        return "\n".join([*lines, f"{self.sparsity:.1%} of all weights skipped"])


def calibrate_thresholds(
    model: nn.Module,
    batches: Iterable[Any],
    sparsity: float,
    method: str = "uniform",
) -> ThresholdReport:
    """Thresholds on the inputs of a model's linear layers, for a wanted sparsity.

    The model runs on all batches, in evaluation mode without gradients, and is left as it was. No
    threshold is applied meanwhile: what one layer's changes in the inputs of the next is not seen.

    Parameters
    ----------
    model : nn.Module
        Every ``torch.nn.Linear`` and ``ActSparseLinear`` that a batch reaches gets a threshold.
    batches : iterable
        What the model is called with: tensors, tuples of arguments or dicts of keyword arguments.
    sparsity : float
        In [0, 1): the share of inputs, each weighted by the weights that it saves, that is to
        count as zero. Where more are zero already, the threshold is 0.
    method : {"uniform", "greedy"}
        "uniform" gives each layer this share. "greedy" starts from what is zero already and skips
        in small steps, each where it adds least to a layer's relative squared error for the
        weights it saves, until the share is reached for the whole model.

    Returns
    -------
    ThresholdReport
        A table when printed; ``report.thresholds`` for ``gossamer.convert``.

    Raises
    ------
    ValueError
        If the sparsity is not in [0, 1), the method unknown, no layer was reached, or so many
        inputs of one are NaN or infinite that no threshold skips the share.
    TypeError
        If a batch is of another type.

    References
    ----------
    Liu et al., "Training-Free Activation Sparsity in Large Language Models", 2024
    (arXiv:2408.14690), for magnitudes, and for greedy steps there over the blocks of a model.

    Examples
    --------
    >>> import torch, gossamer
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(16, 64), nn.SiLU(), nn.Linear(64, 8))
    >>> report = gossamer.calibrate_thresholds(model, [torch.randn(8, 16)], sparsity=0.5)
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"calibrate_thresholds: sparsity is {sparsity}, expected in [0, 1)")
    if method not in ("uniform", "greedy"):
        raise ValueError(f"calibrate_thresholds: method {method!r}, expected 'uniform' or 'greedy'")
    with torch.no_grad():
        seen = _run(model, batches)
        if not seen:
            raise ValueError("calibrate_thresholds: no linear layer was reached by a batch")
        greedy = method == "greedy"
        shares = _greedy_shares(seen, sparsity) if greedy else [sparsity] * len(seen)
        return ThresholdReport(
            tuple(layer.judge(share) for layer, share in zip(seen, shares, strict=True))
        )


class _Inputs:
    """Of one layer: some rows of its inputs, and as many magnitudes as give a quantile."""

    def __init__(self, name: str, layer: nn.Linear | ActSparseLinear) -> None:
        self.name, self.layer = name, layer
        self._rows: list[Tensor] = []
        self._magnitudes = torch.empty(0, device="cpu")
        self._share = 1.0  # of the magnitudes seen that are kept: the same of every batch
        self._generator = torch.Generator("cpu").manual_seed(0)

    @property
    def weights(self) -> int:
        return self.layer.in_features * self.layer.out_features

    def record(self, x: Tensor) -> None:
        rows = x.detach().reshape(-1, x.shape[-1])
        kept = sum(map(len, self._rows))
        if kept < _ROWS:
            self._rows.append(rows[: _ROWS - kept].clone())
        fresh = rows.float().abs().flatten().cpu()
        self._magnitudes = torch.cat([self._magnitudes, self._draw(fresh, self._share)])
        if len(self._magnitudes) > _MAGNITUDES:
            share = _MAGNITUDES / 2 / len(self._magnitudes)
            self._magnitudes = self._draw(self._magnitudes, share)
            self._share *= share

    def _draw(self, values: Tensor, share: float) -> Tensor:
        if share == 1:
            return values
        count = max(1, round(share * len(values)))
        return values[torch.randint(len(values), (count,), generator=self._generator, device="cpu")]

    @property
    def reached(self) -> bool:
        return len(self._rows) > 0

    def finish(self) -> _Inputs:
        self._magnitudes = self._magnitudes.sort().values
        return self

    def threshold(self, share: float) -> float:
        """The least that skips this share of the inputs."""
        count = round(share * len(self._magnitudes))
        return float(self._magnitudes[count - 1]) if count else 0.0

    def sparsity(self, threshold: float) -> float:
        skipped = torch.searchsorted(self._magnitudes, threshold, right=True)
        return int(skipped) / len(self._magnitudes)

    def error(self, threshold: float) -> float:
        rows, weight = torch.cat(self._rows).float(), self.layer.weight.float()
        size = F.linear(rows, weight).norm()
        skipped = rows - (masked(rows, threshold) if threshold else rows)
        return float(F.linear(skipped, weight).norm() / size) if size > 0 else 0.0

    def judge(self, share: float) -> LayerThreshold:
        threshold = self.threshold(share)
        if not math.isfinite(threshold):
            raise ValueError(
                f"calibrate_thresholds: {self.name}: the inputs of the batches are not finite"
            )
        shape = (self.layer.out_features, self.layer.in_features)
        sparsity, error = self.sparsity(threshold), self.error(threshold)
        return LayerThreshold(self.name, shape, threshold, sparsity, error)


def _run(model: nn.Module, batches: Iterable[Any]) -> list[_Inputs]:
    layers = {
        module: _Inputs(name, module)
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, ActSparseLinear))
    }

    def record(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        if isinstance(x, Tensor) and not x.is_nested and x.numel() > 0:
            layers[layer].record(x)

    hooks = [layer.register_forward_pre_hook(record, with_kwargs=True) for layer in layers]
    try:
        # The bar appears only where somebody would wait: after two seconds, on a terminal.
        for batch in tqdm(batches, desc="calibrate", unit="batch", delay=2, disable=None):
            run_evaluating(model, *arguments_of("calibrate_thresholds: a batch", batch))
    finally:
        for hook in hooks:
            hook.remove()
    return [seen.finish() for seen in layers.values() if seen.reached]


def _greedy_shares(seen: list[_Inputs], sparsity: float) -> list[float]:
    """Each layer's share of skipped inputs, by steps that cost least error a weight saved."""
    levels = [one.sparsity(0.0) for one in seen]
    most = max(1 - 1 / _STEPS, sparsity)  # of a layer that is not yet there by itself
    errors = [0.0] * len(seen)
    total = sum(one.weights for one in seen)

    def step(i: int) -> tuple[float, float, float]:
        """The price of a layer's next step, the share after it and its error."""
        share = min(levels[i] + 1 / _STEPS, most)
        if share <= levels[i]:
            return float("inf"), levels[i], errors[i]
        error = seen[i].error(seen[i].threshold(share)) ** 2
        return (error - errors[i]) / ((share - levels[i]) * seen[i].weights), share, error

    steps = [step(i) for i in range(len(seen))]
    while True:
        missing = sparsity * total - sum(
            level * one.weights for level, one in zip(levels, seen, strict=True)
        )
        cheapest = min(range(len(seen)), key=lambda i: steps[i][0])
        if missing <= 0 or steps[cheapest][0] == float("inf"):
            return levels
        # The last step only as far as it has to go.
        share = min(steps[cheapest][1], levels[cheapest] + missing / seen[cheapest].weights)
        levels[cheapest], errors[cheapest] = share, steps[cheapest][2]
        steps[cheapest] = step(cheapest)
