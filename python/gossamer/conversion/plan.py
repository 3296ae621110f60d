"""Decides what becomes of every linear layer of a model, and changes none of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from .. import _C
from ..nn import SparseLinear
from .cost_table import worth_swapping
from .eligibility import Obstacles, dtype_name
from .selection import LinearSite, left_out, linear_sites
from .timing import Calls, Speed, measure_speed, output_error, record_calls

# A smaller measured gain is within the noise of the measurement, so the layer stays dense.
SWAP_THRESHOLD = 1.05


@dataclass
class LayerPlan:
    """What will happen to one layer; nothing has happened to it yet."""

    site: LinearSite
    reason: str
    pruned: bool = False
    replacement: SparseLinear | None = None
    kernel: str | None = None
    measured: dict[str, Any] = field(default_factory=dict)


def plan_layers(
    model: nn.Module,
    prune: str | None,
    include: str | Iterable[str] | None,
    exclude: str | Iterable[str] | None,
    sample_input: Any,
    force: bool,
) -> list[LayerPlan]:
    sites = linear_sites(model)
    unwanted = left_out(model, sites, include, exclude)
    obstacles = Obstacles(model)
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
            pruned = prune is not None and obstacle.prunable
            left = "" if pruned or prune is None else "; not pruned"
            plans.append(LayerPlan(site, obstacle.reason + left, pruned))
        else:
            plans.append(_try_sparse(site, prune, calls, force, speeds))
    return plans


def _try_sparse(
    site: LinearSite,
    prune: str | None,
    calls: dict[nn.Module, Calls] | None,
    force: bool,
    speeds: dict[Any, Speed],
) -> LayerPlan:
    """Builds the packed layer, asks what it gains, and keeps or drops it."""
    layer = site.module
    assert isinstance(layer, nn.Linear)
    try:
        sparse = SparseLinear.from_dense(layer, prune=prune)
    except ValueError as error:  # of a layer without obstacle only the pattern can be wrong
        return LayerPlan(site, str(error))
    dense_weight = sparse.weight.to_dense()
    sparse.pack()
    mine = None if calls is None else calls[layer]
    swap, reason, measured = _gain(layer, sparse, mine, speeds)
    plan = LayerPlan(site, reason, pruned=prune is not None, measured=measured)
    if swap or force:
        error_max, error_mean = output_error(dense_weight, layer.bias, sparse, mine)
        plan.measured |= {"error_max": error_max, "error_mean": error_mean}
        plan.reason = reason if swap else f"forced: {reason}"
        plan.kernel = _kernel(layer, measured.get("rows"))
        # The same Parameter, so that ties and optimizers stay whole.
        sparse.bias = layer.bias
        plan.replacement = sparse
    return plan


def _gain(
    layer: nn.Linear, sparse: SparseLinear, calls: Calls | None, speeds: dict[Any, Speed]
) -> tuple[bool, str, dict[str, Any]]:
    """Whether to swap, why, and the measurement, which layers of one shape share in ``speeds``."""
    if calls is None:
        dtype = dtype_name(layer.weight.dtype)
        verdict = worth_swapping(layer.out_features, layer.in_features, dtype, _target(layer))
        return (*verdict, {})
    if not calls.rows:
        return False, "the sample does not reach it", {}
    shape = (*layer.weight.shape, layer.weight.dtype, layer.bias is None)
    key = (shape, frozenset(calls.rows.items()), calls.autocast)
    if key not in speeds:
        speeds[key] = measure_speed(layer, sparse, calls)
    speed = speeds[key]
    swap = speed.ratio >= SWAP_THRESHOLD
    reason = "measured" if swap else f"measured {speed.ratio:.2f}x, below {SWAP_THRESHOLD}x"
    measured = {
        "rows": calls.rows.most_common(1)[0][0],
        "dense_seconds": speed.dense_seconds,
        "sparse_seconds": speed.sparse_seconds,
        "speedup": speed.ratio,
    }
    return swap, reason, measured


def _kernel(layer: nn.Linear, rows: int | None) -> str:
    """``target/kernel``; the kernel depends on the rows, which only a sample tells."""
    if rows is None:
        return _target(layer)
    shape = (rows, layer.out_features, layer.in_features)
    dtype = dtype_name(layer.weight.dtype)
    if layer.weight.is_cuda:
        chosen = _C.sparse24_choose_cuda(*shape, dtype, layer.weight.get_device())
    else:
        chosen = _C.sparse24_choose(*shape, dtype, torch.get_num_threads())
    return f"{chosen['target']}/{chosen['kernel']}"


def _target(layer: nn.Linear) -> str:
    return "cuda" if layer.weight.is_cuda else _C.target()
