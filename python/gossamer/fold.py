"""``fold_batchnorm`` lets layers do what the BatchNorm behind them does."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .conversion.eligibility import Obstacles, hooks_of
from .conversion.kinds import dense_class
from .nn import SparseConv, SparseLinear
from .pointcloud import BatchNorm
from .pointcloud.convolution_base import Convolution

# What follows what: a BatchNorm1d takes the rows of a linear layer too.
_NORM_OF: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: nn.BatchNorm1d,
    nn.Conv1d: nn.BatchNorm1d,
    nn.Conv2d: nn.BatchNorm2d,
    nn.Conv3d: nn.BatchNorm3d,
    Convolution: BatchNorm,
}
_LAYERS = (*_NORM_OF, SparseLinear, SparseConv)


@dataclass(frozen=True)
class FoldReport:
    """What became of every BatchNorm of a model.

    Attributes
    ----------
    folded : tuple of (str, str)
        Names of a layer and of the BatchNorm that it does as well now.
    left : dict
        Name of a BatchNorm that stays -> why.
    """

    folded: tuple[tuple[str, str], ...]
    left: dict[str, str]

    def __len__(self) -> int:
        return len(self.folded)

    def __str__(self) -> str:
        lines = [f"{norm} folded into {layer}" for layer, norm in self.folded]
        lines += [f"{norm} stays: {reason}" for norm, reason in self.left.items()]
        count = len(self.folded) + len(self.left)
        return "\n".join([*lines, f"{len(self.folded)} of {count} BatchNorm layers folded"])


def fold_batchnorm(model: nn.Module) -> FoldReport:
    """Multiply BatchNorm layers into the linear layers and convolutions before them.

    A BatchNorm in evaluation mode scales and shifts each channel, which the layer before can do by
    its own weight and bias. The model is changed in place, at the very end: an error leaves it as
    it was. Folded BatchNorms become ``torch.nn.Identity``. Which weights are zero does not change,
    so fold before ``gossamer.convert``.

    Who follows whom is read by ``torch.fx``, with arguments that have a default at that default; of
    a model that it cannot trace, each part that it can is read by itself, and is taken to be called
    as a whole. A BatchNorm stays where the output of the layer before it is used elsewhere too,
    where either of them is called twice, has hooks, is shared, or is computed from something else.
    What a linear layer hands to a BatchNorm1d is taken to be [batch, features]. Convolutions of
    ``gossamer.pointcloud`` take its ``BatchNorm`` in.

    Parameters
    ----------
    model : nn.Module
        In evaluation mode.

    Returns
    -------
    FoldReport
        What was folded into what, and why the others stay.

    Raises
    ------
    TypeError
        If ``model`` is not a module.
    ValueError
        If one of its BatchNorms is in training mode.

    References
    ----------
    Ioffe, Szegedy, "Batch Normalization", 2015 (arXiv:1502.03167), section 3.1.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fold_batchnorm: model is {type(model).__name__}, expected an nn.Module")
    norms = {name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm)}
    names: dict[nn.Module, str] = {module: name for name, module in norms.items()}
    training = [name for name, norm in norms.items() if norm.training]
    if training:
        raise ValueError(
            f"fold_batchnorm: {len(training)} of {len(norms)} BatchNorm layers are in training "
            f"mode, the first is {training[0]!r}; call eval() first"
        )
    obstacles = Obstacles(model)
    pairs: list[tuple[str, str]] = []
    left = dict.fromkeys(norms, "no linear layer or convolution before it was found")
    for prefix, graph in _graphs(model):
        for layer, norm, reason in _followers(model, prefix, graph):
            modules = (model.get_submodule(layer), model.get_submodule(norm))
            reason = reason or _obstacle(obstacles, *modules, whole=prefix == "")
            if reason is None:
                pairs.append((layer, norm))
            left[names[modules[1]]] = reason or ""
    left = {name: reason for name, reason in left.items() if reason}
    # Parameters made in inference mode could never be trained.
    with torch.inference_mode(False), torch.no_grad():
        made = [_folded(model.get_submodule(a), model.get_submodule(b)) for a, b in pairs]
        for (layer_name, norm_name), tensors in zip(pairs, made, strict=True):
            _put(model.get_submodule(layer_name), *tensors)
            for holder, attribute in obstacles.holders(model.get_submodule(norm_name)):
                setattr(holder, attribute, nn.Identity())
    return FoldReport(tuple(pairs), left)


class Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not m._modules or super().is_leaf_module(m, module_qualified_name)


def _graphs(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, fx.Graph]]:
    """The graph of a module, or those of its parts; each with the name of what it describes."""
    if not module._modules:
        return
    try:
        parameters = inspect.signature(module.forward).parameters.values()
        fixed = {p.name: p.default for p in parameters if p.default is not p.empty}
        yield prefix, Tracer().trace(module, concrete_args=fixed)
    except Exception:  # whatever the model's own code makes of what it is given
        for name, child in module.named_children():
            yield from _graphs(child, f"{prefix}{name}.")


def _followers(
    model: nn.Module, prefix: str, graph: fx.Graph
) -> Iterator[tuple[str, str, str | None]]:
    """(layer, BatchNorm after it, what the graph has against folding)."""
    calls = Counter(str(node.target) for node in graph.nodes if node.op == "call_module")
    read = [str(node.target) for node in graph.nodes if node.op == "get_attr"]
    for node in graph.nodes:
        if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
            continue
        before, norm = node.args[0], prefix + str(node.target)
        if not isinstance(model.get_submodule(norm), _BatchNorm):
            continue
        if not isinstance(before, fx.Node) or before.op != "call_module":
            continue
        layer = prefix + str(before.target)
        if not isinstance(model.get_submodule(layer), _LAYERS):
            continue
        reason = None
        if len(before.users) > 1:
            reason = f"the output of {layer} is used {len(before.users)} times"
        for name in (str(before.target), str(node.target)):
            if calls[name] > 1:
                reason = f"{prefix}{name} is called {calls[name]} times"
            if any(target.startswith(f"{name}.") for target in read):
                reason = f"parameters of {prefix}{name} are read directly"
        yield layer, norm, reason


def _obstacle(obstacles: Obstacles, layer: Any, norm: Any, whole: bool) -> str | None:
    """What the two modules have against folding; ``whole`` says that all their calls are known."""
    if not whole and any(len(obstacles.holders(module)) != 1 for module in (layer, norm)):
        return "it or the layer before it is held in several places"
    voxels = isinstance(layer, Convolution)
    if voxels and type(layer).forward is not Convolution.forward:
        return f"the layer before it: {type(layer).__name__} overrides forward"
    written = obstacles.not_its_own if voxels else obstacles.not_to_be_written
    reason = written(layer) or obstacles.tied(layer, "bias")
    if reason is not None:
        return f"the layer before it: {reason}"
    for module, what in ((layer, "the layer before it"), (norm, "it")):
        if hooks := hooks_of(module):
            return f"{what} has {' and '.join(hooks)}"
    kind = Convolution if voxels else dense_class(layer)
    if kind is None or type(norm) is not _NORM_OF[kind] or "forward" in norm.__dict__:
        return f"it is a {type(norm).__name__} after a {type(layer).__name__}"
    if norm.running_mean is None or norm.running_var is None:
        return "it has no running statistics"
    if norm.running_mean.is_meta or norm.num_features != layer.weight.shape[_outputs_axis(layer)]:
        return f"it has {norm.num_features} channels on {norm.running_mean.device}"
    return None


def _outputs_axis(layer: nn.Module) -> int:
    """Where the weight has the output channels."""
    return -1 if isinstance(layer, Convolution) else 0


def _folded(layer: Any, norm: Any) -> tuple[Tensor, Tensor]:
    """The weight and the bias of a layer that does both, from float64."""
    weight, scale = layer.weight.double(), (norm.running_var.double() + norm.eps).rsqrt()
    shift = -norm.running_mean.double()
    if layer.bias is not None:
        shift = shift + layer.bias.double()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = shift * scale
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    shape = [1] * weight.dim()
    shape[_outputs_axis(layer)] = -1
    weight = weight * scale.view(shape)
    return weight.to(layer.weight.dtype), shift.to(layer.weight.dtype)


def _put(layer: Any, weight: Tensor, bias: Tensor) -> None:
    """Write both into the layer's own Parameters, where it has them."""
    # Tensors made in inference mode can be written to in inference mode only.
    with torch.inference_mode(layer.weight.is_inference()), torch.no_grad():
        layer.weight.copy_(weight)
        if layer.bias is not None:
            layer.bias.copy_(bias)
    if layer.bias is None:
        layer.bias = nn.Parameter(bias, requires_grad=layer.weight.requires_grad)
