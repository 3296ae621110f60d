"""Decides what becomes of every candidate of a model, and changes none of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .. import _C
from .._wide import has_loops_only
from ..formats import (
    Block,
    BlockSparse,
    BlockSparsePanels,
    Sparse24Conv,
    Sparse24ConvPanels,
    Unstructured,
)
from ..nn import ActSparseLinear
from ..nn.patterns import PatternName
from ..ops.actsparse_gradient import active
from ..ops.blocksparse_choice import blocksparse_choice
from ..ops.sparse24_conv import sparse24_conv_choice
from .cost_table import NO_FIGURES, worth_swapping
from .eligibility import Obstacles, dtype_name
from .kinds import ACTIVATION, SparseLayer, is_conv, make_sparse
from .selection import LayerSite, layer_sites, left_out
from .timing import Calls, Speed, measure_speed, noise_shape, output_error, record_calls

# A smaller measured gain is within the noise of the measurement, so the layer stays dense.
SWAP_THRESHOLD = 1.05


@dataclass(frozen=True)
class Wanted:
    """The pattern that layers are to get, and how they are made to fit it.

    ``thresholds`` are those of inputs by name of the layer, or one for all of them.
    """

    pattern: PatternName
    prune: str | None
    density: float | None
    thresholds: float | Mapping[str, float] = 0.0

    def threshold(self, names: tuple[str, ...]) -> float:
        if not isinstance(self.thresholds, Mapping):
            return self.thresholds
        given = [self.thresholds[name] for name in names if name in self.thresholds]
        return given[0] if given else 0.0


@dataclass
class LayerPlan:
    """What will happen to one layer; nothing has happened to it yet."""

    site: LayerSite
    reason: str
    pruned: bool = False
    replacement: SparseLayer | ActSparseLinear | None = None
    kernel: str | None = None
    measured: dict[str, Any] = field(default_factory=dict)


def plan_layers(
    model: nn.Module,
    wanted: Wanted,
    include: str | Iterable[str] | None,
    exclude: str | Iterable[str] | None,
    sample_input: Any,
    force: bool,
) -> list[LayerPlan]:
    sites = layer_sites(model)
    unwanted = left_out(model, sites, include, exclude)
    obstacles = Obstacles(model, wanted.pattern)
    found = {site: obstacles.judge(site) for site in sites if site not in unwanted}
    calls: dict[nn.Module, Calls] | None = None
    if sample_input is not None:
        free = [site.module for site, obstacle in found.items() if obstacle is None]
        calls = record_calls(model, free, sample_input)
    speeds: dict[Any, Speed] = {}
    plans = []
    # The bar appears only where somebody would wait: after two seconds, on a terminal.
    for site in tqdm(sites, desc="convert", unit="layer", delay=2, disable=None, leave=False):
        if site in unwanted:
            plans.append(LayerPlan(site, unwanted[site]))
        elif (obstacle := found[site]) is not None:
            pruned = wanted.prune is not None and obstacle.prunable
            left = "" if pruned or wanted.prune is None else "; not pruned"
            plans.append(LayerPlan(site, obstacle.reason + left, pruned))
        elif wanted.pattern == ACTIVATION:
            plans.append(_try_skipping(site, wanted, calls, force, speeds))
        else:
            plans.append(_try_sparse(site, wanted, calls, force, speeds))
    return plans


def _try_sparse(
    site: LayerSite,
    wanted: Wanted,
    calls: dict[nn.Module, Calls] | None,
    force: bool,
    speeds: dict[Any, Speed],
) -> LayerPlan:
    """Builds the packed layer, asks what it gains, and keeps or drops it."""
    layer = site.module
    try:
        sparse = make_sparse(layer, wanted.pattern, wanted.prune, wanted.density)
    except ValueError as error:  # of a layer without obstacle only the pattern can be wrong
        return LayerPlan(site, str(error))
    dense_weight = sparse.weight.to_dense().detach()
    sparse.pack()
    mine = None if calls is None else calls[layer]
    swap, reason, measured = _gain(layer, sparse, mine, speeds)
    plan = LayerPlan(site, reason, pruned=wanted.prune is not None, measured=measured)
    if swap or force:
        error_max, error_mean = output_error(layer, dense_weight, sparse, mine)
        plan.measured |= {"error_max": error_max, "error_mean": error_mean}
        plan.reason = reason if swap else f"forced: {reason}"
        plan.kernel = _kernel(layer, sparse, mine)
        # The same Parameter, so that ties and optimizers stay whole.
        sparse.bias = layer.bias  # type: ignore[assignment]
        plan.replacement = sparse
    return plan


def _try_skipping(
    site: LayerSite,
    wanted: Wanted,
    calls: dict[nn.Module, Calls] | None,
    force: bool,
    speeds: dict[Any, Speed],
) -> LayerPlan:
    """The same for a layer that keeps its weight and skips inactive inputs."""
    layer = site.module
    assert isinstance(layer, nn.Linear)
    sparse = ActSparseLinear.from_dense(layer, wanted.threshold(site.names))
    mine = None if calls is None else calls[layer]
    swap, reason, measured = _gain(layer, sparse, mine, speeds)
    plan = LayerPlan(site, reason, measured=measured)
    if mine is not None and mine.commonest is not None:
        x = mine.example(mine.commonest)
        share = float(active(x, sparse.threshold).float().mean())
        plan.reason = reason = f"{reason}; {share:.0%} of its inputs active"
    if swap or force:
        error_max, error_mean = output_error(layer, layer.weight, sparse, mine)
        plan.measured |= {"error_max": error_max, "error_mean": error_mean}
        plan.reason = reason if swap else f"forced: {reason}"
        dtype = dtype_name(layer.weight.dtype)
        target = "cuda" if layer.weight.is_cuda else _C.actsparse_target(dtype)
        plan.kernel = f"{target}/rows"
        plan.replacement = sparse
    return plan


def _gain(
    layer: nn.Module,
    sparse: SparseLayer | ActSparseLinear,
    calls: Calls | None,
    speeds: dict[Any, Speed],
) -> tuple[bool, str, dict[str, Any]]:
    """Whether to swap, why, and the measurement, which equal layers share in ``speeds``."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if calls is None:
        if isinstance(sparse, ActSparseLinear):
            return False, NO_FIGURES.format("zeros that nobody has counted"), {}
        if isinstance(sparse.pattern, Block):
            return False, NO_FIGURES.format("blocks"), {}
        if isinstance(sparse.pattern, Unstructured):
            return False, NO_FIGURES.format("unstructured weights"), {}
        if is_conv(layer):
            return False, NO_FIGURES.format("convolutions"), {}
        sizes = (weight.shape[0], weight.shape[1])
        where, dtype = _target(weight), dtype_name(weight.dtype)
        cpu = {"intel": _C.intel_cores(), "loops": has_loops_only(weight)}
        return (*worth_swapping(*sizes, dtype, where, **cpu), {})
    if (commonest := calls.commonest) is None:
        return False, "the sample does not reach it", {}
    # What a layer says of itself, and how much of it is stored.
    kind = (type(layer), layer.extra_repr(), weight.dtype, sparse.weight.nbytes)
    key: Any = (kind, frozenset(calls.given.items()), calls.autocast)
    if isinstance(sparse, ActSparseLinear):
        key = (layer,)  # each has inputs of its own
    if key not in speeds:
        speeds[key] = measure_speed(layer, sparse, calls)
    speed = speeds[key]
    swap = speed.ratio >= SWAP_THRESHOLD
    reason = "measured" if swap else f"measured {speed.ratio:.2f}x, below {SWAP_THRESHOLD}x"
    measured = {
        "rows": commonest.rows,
        "dense_seconds": speed.dense_seconds,
        "sparse_seconds": speed.sparse_seconds,
        "speedup": speed.ratio,
    }
    return swap, reason, measured


def _kernel(layer: Any, sparse: SparseLayer, calls: Calls | None) -> str:
    """``target/kernel``; which one may depend on the shape of x, which only a sample tells."""
    weight, given = layer.weight, None if calls is None else calls.commonest
    stored = sparse.weight
    if isinstance(sparse.pattern, Unstructured):
        rows = noise_shape(layer)[0] if given is None else given.rows
        chosen = _C.csr_choose(rows, dtype_name(weight.dtype))
        return "torch/dense" if weight.is_cuda else f"{chosen['target']}/{chosen['kernel']}"
    if is_conv(layer) or isinstance(sparse.pattern, Block):
        shape = noise_shape(layer) if given is None else (given.rows, *given.shape)
        names = ("stride", "padding", "dilation", "padding_mode") if is_conv(layer) else ()
        geometry = {name: getattr(layer, name) for name in names}
        geometry["channels_last"] = given is not None and given.channels_last
        if isinstance(stored, (BlockSparse, BlockSparsePanels)):
            chosen = blocksparse_choice(shape, stored, **geometry)
        else:
            assert isinstance(stored, (Sparse24Conv, Sparse24ConvPanels))
            chosen = sparse24_conv_choice(shape, stored, **geometry)
        dense = chosen["kernel"] == "dense"
        return f"{'torch' if dense else chosen['target']}/{chosen['kernel']}"
    if given is None:
        return _target(weight)
    sizes, dtype = (given.rows, weight.shape[0], weight.shape[1]), dtype_name(weight.dtype)
    if weight.is_cuda:
        chosen = _C.sparse24_choose_cuda(*sizes, dtype, weight.get_device())
    else:
        chosen = _C.sparse24_choose(*sizes, dtype, torch.get_num_threads())
    return f"{chosen['target']}/{chosen['kernel']}"


def _target(weight: Tensor) -> str:
    return "cuda" if weight.is_cuda else _C.target()
