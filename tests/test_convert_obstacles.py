"""Layers that convert() has to leave dense, and what it says of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import gossamer
import pytest
import torch
from cases import bits
from gossamer.nn import SparseLinear
from gossamer.prune import magnitude_24
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Renamed(nn.Linear):
    """A subclass that changes nothing about the computation."""


@dataclass
class Case:
    """A model with one layer that has to stay dense."""

    model: nn.Module
    layer: str
    reason: str
    pruned: bool


def tied() -> Case:
    model = nn.Sequential(nn.Embedding(50, 64), nn.Linear(64, 64), nn.Linear(64, 50, bias=False))
    model[2].weight = model[0].weight
    return Case(model, "2", "tied: 0.weight = 2.weight", False)


def tied_through_memory() -> Case:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 32))
    model[1].weight = nn.Parameter(model[0].weight.detach()[16:48])
    return Case(model, "1", "tied", False)


def expanded() -> Case:
    model = nn.Sequential(nn.Linear(64, 64))
    model[0].weight = nn.Parameter(torch.randn(64).expand(64, 64))
    return Case(model, "0", "share memory", False)


def parametrised() -> Case:
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(64, 64)))
    return Case(model, "0", "parametri", False)


def parametrised_bias() -> Case:
    layer = nn.Linear(64, 64)
    nn.utils.parametrize.register_parametrization(layer, "bias", nn.Softplus())
    return Case(nn.Sequential(layer), "0", "bias parametrised", False)


def spectrally_normed() -> Case:
    return Case(nn.Sequential(spectral_norm(nn.Linear(64, 64))), "0", "SpectralNorm", False)


def masked() -> Case:
    layer = prune.l1_unstructured(nn.Linear(64, 64), "weight", amount=0.5)
    return Case(nn.Sequential(layer), "0", "computed before each call", False)


def attention() -> Case:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(64, 4)})
    return Case(model, "attention.out_proj", "MultiheadAttention", True)


def encoder_layer() -> Case:
    model = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    return Case(model, "linear1", "fast path", True)


def compiled() -> Case:
    return Case(torch.compile(nn.Linear(64, 64), backend="eager"), "_orig_mod", "compile", True)


def hooked() -> Case:
    layer = nn.Linear(64, 64)
    layer.register_forward_hook(lambda *_: None)
    return Case(nn.Sequential(layer), "0", "forward hooks", True)


def with_more_tensors() -> Case:
    layer = Renamed(64, 64)
    layer.register_buffer("scale", torch.ones(1))
    return Case(nn.Sequential(layer), "0", "scale", True)


def overriding() -> Case:
    return Case(nn.Sequential(Doubled(64, 64)), "0", "Doubled overrides forward", False)


def patched() -> Case:
    layer = nn.Linear(64, 64)
    layer.forward = lambda x: x
    return Case(nn.Sequential(layer), "0", "replaced on this instance", False)


def double_precision() -> Case:
    return Case(nn.Sequential(nn.Linear(64, 64, dtype=torch.float64)), "0", "float64", True)


def eight_bits() -> Case:
    model = nn.Sequential(nn.Linear(64, 64).to(torch.float8_e4m3fn))
    return Case(model, "0", "neither pruner nor kernel", False)


def on_meta() -> Case:
    return Case(nn.Sequential(nn.Linear(64, 64, device="meta")), "0", "meta", False)


def lazy() -> Case:
    return Case(nn.Sequential(nn.LazyLinear(64)), "0", "not initialised", False)


def quantised() -> Case:
    layer = nn.Linear(64, 64)
    scale = torch.ones(64)
    layer.weight = nn.Parameter(torch.ones(64, 64, dtype=torch.int8), requires_grad=False)
    layer.register_buffer("weight_scale", scale)
    return Case(nn.Sequential(layer), "0", "int8", False)


def already_sparse() -> Case:
    return Case(nn.Sequential(SparseLinear(64, 64)), "0", "already", False)


def empty() -> Case:
    return Case(nn.Sequential(nn.Linear(64, 0)), "0", "empty", False)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")
@pytest.mark.parametrize(
    "make",
    [
        tied,
        tied_through_memory,
        expanded,
        parametrised,
        parametrised_bias,
        spectrally_normed,
        masked,
        lambda: Case(nn.Sequential(weight_norm(nn.Linear(64, 64))), "0", "WeightNorm", False),
        attention,
        encoder_layer,
        compiled,
        hooked,
        with_more_tensors,
        overriding,
        patched,
        double_precision,
        eight_bits,
        on_meta,
        lazy,
        quantised,
        already_sparse,
        empty,
    ],
)
def test_obstacle_keeps_layer_dense(make: Callable[[], Case]) -> None:
    case = make()
    layer = case.model.get_submodule(case.layer)
    before = readable_tensors(layer)
    report = gossamer.convert(case.model, prune="magnitude", force=True)
    row = report[case.layer]
    assert not row.swapped
    assert case.reason in row.reason
    assert row.pruned == case.pruned
    assert case.model.get_submodule(case.layer) is layer
    if case.pruned:
        before["weight"] = magnitude_24(before["weight"])
    else:
        assert "not pruned" in row.reason
    after = readable_tensors(layer)
    assert all(torch.equal(bits(after[name]), bits(before[name])) for name in before)


def readable_tensors(layer: nn.Module) -> dict[str, Tensor]:
    state = layer.state_dict()
    return {
        name: tensor.clone()
        for name, tensor in state.items()
        if not tensor.is_meta and not is_lazy(tensor)
    }


def test_tie_leaves_the_other_layers_alone() -> None:
    case = tied()
    assert gossamer.convert(case.model, prune="magnitude", force=True)["1"].swapped


def test_subclass_without_forward_is_swapped() -> None:
    model = nn.Sequential(Renamed(64, 64))
    assert gossamer.convert(model, prune="magnitude", force=True)["0"].swapped
