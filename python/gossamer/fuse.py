"""``fuse_activations`` lets sparse layers apply the activation behind them."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import fx, nn

from .conversion.eligibility import Obstacles, hooks_of
from .fold import Tracer
from .nn import SparseConv, SparseLinear

_MODULES: dict[type[nn.Module], str] = {nn.ReLU: "relu", nn.SiLU: "silu", nn.GELU: "gelu"}
_FUNCTIONS = {
    F.relu: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    F.silu: "silu",
    F.gelu: "gelu",
}
_METHODS = {"relu": "relu", "relu_": "relu"}


@dataclass(frozen=True)
class FusionReport:
    """Which layers apply the activation behind them.

    Attributes
    ----------
    model : nn.Module
        The model that was given, or what stands for it.
    fused : tuple of (str, str)
        Name of a layer and of its activation: "relu", "silu" or "gelu".
    """

    model: nn.Module
    fused: tuple[tuple[str, str], ...]

    def __len__(self) -> int:
        return len(self.fused)

    def __str__(self) -> str:
        lines = [f"{layer} applies {activation}" for layer, activation in self.fused]
        return "\n".join([*lines, f"{len(self.fused)} activations fused"])


@dataclass
class _Part:
    """A module with a graph in which calls of activations are to go."""

    module: nn.Module
    graph: fx.Graph
    # The layer, its activation, and the call of that.
    pairs: list[tuple[SparseConv | SparseLinear, str, fx.Node]]


def fuse_activations(model: nn.Module) -> FusionReport:
    """Let sparse layers apply the ReLU, SiLU or exact GELU behind them, at no cost of their own.

    A kernel activates its sums before it writes them, which spares reading and writing the result
    once more. The layers are ``gossamer.nn.SparseLinear`` and the sparse convolutions, so call it
    after ``gossamer.convert``, and after ``gossamer.fold_batchnorm``; activations are modules of
    torch or functions (``F.relu``, ``x.relu()`` and so on).

    What follows what is read by ``torch.fx``. A part of the model in which something is fused
    becomes a ``torch.fx.GraphModule``: it holds the same layers under the same names, so its
    ``state_dict`` does not change, and does in its forward what the part did in evaluation mode;
    methods of its own are lost. A module whose forward takes optional arguments, or that cannot be
    traced, stays, and each part of it is read by itself and taken to be called as a whole. An
    activation stays where the layer's output is used elsewhere too, where the layer is called
    twice or is shared, or where one of the two has hooks. The model is changed at the very end: an
    error leaves it as it was.

    Parameters
    ----------
    model : nn.Module
        In evaluation mode.

    Returns
    -------
    FusionReport
        What was fused, and the model: the one that was given, unless all of it was traced.

    Raises
    ------
    TypeError
        If ``model`` is not a module.
    ValueError
        If it is in training mode.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fuse_activations: model is {type(model).__name__}, expected an nn.Module")
    if model.training:
        raise ValueError("fuse_activations: the model is in training mode; call eval() first")
    obstacles = Obstacles(model)
    names = {module: name for name, module in model.named_modules()}
    parts = list(_parts(model, obstacles))
    made = [(part, _graph_module(part)) for part in parts]
    fused: list[tuple[str, str]] = []
    for part, graph_module in made:
        for layer, activation, _ in part.pairs:
            layer.activation = activation
            fused.append((names[layer], activation))
        for holder, attribute in obstacles.holders(part.module):
            setattr(holder, attribute, graph_module)
        if part.module is model:
            model = graph_module
    return FusionReport(model, tuple(fused))


def _parts(module: nn.Module, obstacles: Obstacles) -> Iterator[_Part]:
    """The outermost modules that can be traced, where there is something to fuse."""
    if not module._modules:
        return
    graph = _trace(module)
    if graph is None:
        for child in module.children():
            yield from _parts(child, obstacles)
        return
    pairs = list(_pairs(module, graph, obstacles))
    if pairs:
        yield _Part(module, graph, pairs)


def _trace(module: nn.Module) -> fx.Graph | None:
    """The graph of a module that a GraphModule can stand for."""
    parameters = inspect.signature(module.forward).parameters.values()
    # A graph takes one way through branches on an argument.
    if any(p.default is not p.empty or p.kind is not p.POSITIONAL_OR_KEYWORD for p in parameters):
        return None
    if hooks_of(module):
        return None
    try:
        graph = Tracer().trace(module)
    except Exception:  # whatever the model's own code makes of what it is given
        return None
    reached = {str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr")}
    kept = [name for name, _ in (*module.named_parameters(), *module.named_buffers())]
    lost = [
        name
        for name in kept
        if not any(name == target or name.startswith(f"{target}.") for target in reached)
    ]
    inner = [m for name, m in module.named_modules() if name and m._modules and hooks_of(m)]
    return None if lost or inner else graph


def _pairs(
    module: nn.Module, graph: fx.Graph, obstacles: Obstacles
) -> Iterator[tuple[SparseConv | SparseLinear, str, fx.Node]]:
    calls = Counter(str(node.target) for node in graph.nodes if node.op == "call_module")
    for node in graph.nodes:
        if node.op != "call_module" or calls[str(node.target)] > 1:
            continue
        layer = module.get_submodule(str(node.target))
        if not isinstance(layer, (SparseConv, SparseLinear)) or layer.activation is not None:
            continue
        if len(obstacles.holders(layer)) != 1 or hooks_of(layer) or "forward" in layer.__dict__:
            continue
        follower = _only_user(module, node)
        activation = None if follower is None else _activation_of(module, follower)
        if follower is not None and activation is not None:
            yield layer, activation, follower


def _only_user(module: nn.Module, node: fx.Node) -> fx.Node | None:
    """What alone uses the output of a call, through every Identity."""
    while len(node.users) == 1:
        (user,) = node.users
        if user.op != "call_module":
            return user
        called = module.get_submodule(str(user.target))
        if type(called) is not nn.Identity or hooks_of(called):
            return user
        node = user
    return None


def _activation_of(module: nn.Module, node: fx.Node) -> str | None:
    """The activation that a node is, of nothing but its one input."""
    if node.op == "call_module":
        called = module.get_submodule(str(node.target))
        if hooks_of(called) or len(node.args) != 1 or node.kwargs:
            return None
        exact = getattr(called, "approximate", "none") == "none"
        return _MODULES.get(type(called)) if exact else None
    if len(node.args) != 1 or set(node.kwargs) - {"inplace", "approximate"}:
        return None
    if node.kwargs.get("approximate", "none") != "none":
        return None
    if node.op == "call_function":
        return _FUNCTIONS.get(node.target)  # type: ignore[call-overload, no-any-return]
    return _METHODS.get(str(node.target)) if node.op == "call_method" else None


def _graph_module(part: _Part) -> fx.GraphModule:
    for _, _, node in part.pairs:
        node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
        part.graph.erase_node(node)
    for node in part.graph.nodes:
        if isinstance(node.type, str):  # an annotation, which a pickle would look up as a class
            node.type = None
    made = fx.GraphModule(part.module, part.graph, type(part.module).__name__)
    for name, value in part.module.__dict__.items():
        if not name.startswith("_"):
            made.__dict__.setdefault(name, value)
    return made.train(part.module.training)
