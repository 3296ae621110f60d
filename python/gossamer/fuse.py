"""``fuse_activations`` lets sparse layers apply what is behind them: residuals and activations."""

from __future__ import annotations

import inspect
import operator
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from types import BuiltinFunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from .conversion.eligibility import Obstacles, hooks_of
from .conversion.kinds import replaced
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
_ADDITIONS = {operator.add, operator.iadd, torch.add, "add", "add_"}
_IN_PLACE = {operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.setitem}


@dataclass(frozen=True)
class FusionReport:
    """Which layers apply the activation behind them.

    Attributes
    ----------
    model : nn.Module
        The model that was given, or what stands for it.
    fused : tuple of (str, str)
        Name of a layer and of its activation: "relu", "silu" or "gelu"; "add, relu" and so on where
        it adds a residual first.
    """

    model: nn.Module
    fused: tuple[tuple[str, str], ...]

    def __len__(self) -> int:
        return len(self.fused)

    def __str__(self) -> str:
        lines = [f"{layer} applies {activation}" for layer, activation in self.fused]
        return "\n".join([*lines, f"{len(self.fused)} activations fused"])


class _Forward:
    """What a GraphModule does, of the tensors and layers of the module that it was made of."""

    def __init__(self, module: nn.Module, graph_module: fx.GraphModule) -> None:
        self.module, self.graph_module = module, graph_module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.graph_module).forward(self.module, *args, **kwargs)


@dataclass
class _Part:
    """A module with a graph in which calls of activations are to go."""

    module: nn.Module
    graph: fx.Graph
    fusions: list[_Fusion]


@dataclass
class _Fusion:
    """A call of a layer, and what becomes of its result."""

    layer: SparseConv | SparseLinear
    call: fx.Node
    output: fx.Node  # the call, or the last Identity behind it
    addition: fx.Node | None
    activation: str
    applied: fx.Node  # the call of the activation

    @property
    def name(self) -> str:
        return self.activation if self.addition is None else f"add, {self.activation}"


def fuse_activations(model: nn.Module) -> FusionReport:
    """Let sparse layers apply the ReLU, SiLU or exact GELU behind them, at no cost of their own.

    A kernel activates its sums before it writes them, which spares reading and writing the result
    once more. Before that, convolutions add a residual: ``relu(conv(x) + y)``, the end of a
    residual block, becomes one pass, too. The layers are ``gossamer.nn.SparseLinear`` and the
    sparse convolutions, so call it after ``gossamer.convert``, and after
    ``gossamer.fold_batchnorm``; activations are modules of torch or functions (``F.relu``,
    ``x.relu()`` and so on).

    What follows what is read by ``torch.fx``. A part of the model in which something is fused
    becomes a ``torch.fx.GraphModule``: it holds the same layers under the same names, so its
    ``state_dict`` does not change, and does in its forward what the part did in evaluation mode;
    methods of its own are lost. A module whose forward takes optional arguments, or that cannot be
    traced, stays, and each part of it is read by itself and taken to be called as a whole. Who
    still holds a module that became one may call it: it does the same, but what reads the forward
    of its class (``torch.fx``) does not see that. An activation stays where the layer's output is
    used elsewhere too, where the layer is called twice or is shared, or where one of the two has
    hooks; with a residual also where something may be written to in place between the layer and the
    addition. What turns out not to have the result's shape and dtype when the model runs is added
    as ``conv(x) + y`` does, by torch, also where the model added in place. The model is changed at
    the very end: an error leaves it as it was.

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
        for fusion in part.fusions:
            fusion.layer.activation = fusion.activation
            fused.append((names[fusion.layer], fusion.name))
        for holder, attribute in obstacles.holders(part.module):
            setattr(holder, attribute, graph_module)
        # Whoever still holds the module shares its layers: it would activate twice.
        part.module.forward = _Forward(part.module, graph_module).forward
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
    fusions = list(_fusions(module, graph, obstacles))
    if fusions:
        yield _Part(module, graph, fusions)


def _trace(module: nn.Module) -> fx.Graph | None:
    """The graph of a module that a GraphModule can stand for."""
    parameters = inspect.signature(module.forward).parameters.values()
    # A graph takes one way through branches on an argument.
    if any(p.default is not p.empty or p.kind is not p.POSITIONAL_OR_KEYWORD for p in parameters):
        return None
    if hooks_of(module) or replaced(module, "forward"):  # the class's is what is traced
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


def _fusions(module: nn.Module, graph: fx.Graph, obstacles: Obstacles) -> Iterator[_Fusion]:
    calls = Counter(str(node.target) for node in graph.nodes if node.op == "call_module")
    taken: set[fx.Node] = set()  # activations; of the two operands of an addition one takes it
    for node in graph.nodes:
        if node.op != "call_module" or calls[str(node.target)] > 1:
            continue
        layer = module.get_submodule(str(node.target))
        if not isinstance(layer, (SparseConv, SparseLinear)) or layer.activation is not None:
            continue
        if len(obstacles.holders(layer)) != 1 or hooks_of(layer) or "forward" in layer.__dict__:
            continue
        if type(layer).forward not in (SparseConv.forward, SparseLinear.forward):
            continue
        follower, output = _only_user(module, node)
        addition = None
        if follower is not None and _adds_residual(module, node, output, follower):
            addition = follower
            follower, _ = _only_user(module, follower)
        activation = None if follower is None else _activation_of(module, follower)
        if follower is not None and activation is not None and follower not in taken:
            taken.add(follower)
            yield _Fusion(layer, node, output, addition, activation, follower)


def _only_user(module: nn.Module, node: fx.Node) -> tuple[fx.Node | None, fx.Node]:
    """What alone uses the output of a call, through every Identity; and the last of these."""
    while len(node.users) == 1:
        (user,) = node.users
        if user.op != "call_module":
            return user, node
        called = module.get_submodule(str(user.target))
        if type(called) is not nn.Identity or hooks_of(called):
            return user, node
        node = user
    return None, node


def _adds_residual(module: nn.Module, call: fx.Node, output: fx.Node, addition: fx.Node) -> bool:
    """Whether a node adds to the output of a call what the call may be given as its residual."""
    layer = module.get_submodule(str(call.target))
    if not isinstance(layer, SparseConv) or len(call.args) != 1 or call.kwargs:
        return False
    if addition.op not in ("call_function", "call_method") or addition.target not in _ADDITIONS:
        return False
    if len(addition.args) != 2 or addition.kwargs:
        return False
    first, second = addition.args
    residual = second if first is output else first
    if residual is output or not isinstance(residual, fx.Node) or residual.op == "get_attr":
        return False
    if addition.target in (operator.iadd, "add_") and first is not output:
        return False  # others may read what it writes to
    # The call moves to the addition. What is overwritten until then may be what it reads.
    node = call.next
    while node is not addition:
        if _writes(module, node):
            return False
        node = node.next
    return True


def _writes(module: nn.Module, node: fx.Node) -> bool:
    """Whether a node may write to what it is given."""
    if node.kwargs.get("inplace") or "out" in node.kwargs or True in node.args:
        return True
    if node.op == "call_module":
        called = module.get_submodule(str(node.target))
        known = type(called).__module__.startswith(("torch.", "gossamer."))
        return not known or bool(getattr(called, "inplace", False))
    if node.op == "call_method":
        return str(node.target).endswith("_")
    if node.op != "call_function":
        return False
    name = getattr(node.target, "__name__", "")
    known = isinstance(node.target, BuiltinFunctionType) or (
        str(getattr(node.target, "__module__", "")).startswith(("torch.", "gossamer."))
    )
    return not known or node.target in _IN_PLACE or name.endswith("_")


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
        return _FUNCTIONS.get(node.target)  # type: ignore[arg-type]
    return _METHODS.get(str(node.target)) if node.op == "call_method" else None


def _move_into(graph: fx.Graph, call: fx.Node, output: fx.Node, addition: fx.Node) -> None:
    """Let the call of a layer, at the place of the addition, add what is added to its output."""
    first, second = addition.args
    residual = second if first is output else first
    with graph.inserting_before(addition):
        fused = graph.call_module(str(call.target), (*call.args, residual))
    addition.replace_all_uses_with(fused)
    graph.erase_node(addition)
    while output is not call:
        identity, output = output, output.args[0]  # type: ignore[assignment]
        graph.erase_node(identity)
    graph.erase_node(call)


def _take_order(made: nn.Module, given: nn.Module) -> None:
    """Register what a GraphModule has in the order of its module, not in that of the calls."""
    for held in ("_parameters", "_buffers", "_modules"):
        ours = getattr(made, held)
        for name in getattr(given, held):
            if name in ours:
                ours[name] = ours.pop(name)
    for name, child in made._modules.items():
        twin = given._modules.get(name)
        if child is not None and twin is not None and child is not twin:
            _take_order(child, twin)


def _graph_module(part: _Part) -> fx.GraphModule:
    for fusion in part.fusions:
        if fusion.addition is not None:
            _move_into(part.graph, fusion.call, fusion.output, fusion.addition)
        fusion.applied.replace_all_uses_with(fusion.applied.args[0])  # type: ignore[arg-type]
        part.graph.erase_node(fusion.applied)
    for node in part.graph.nodes:
        if isinstance(node.type, str):  # an annotation, which a pickle would look up as a class
            node.type = None
    made = fx.GraphModule(part.module, part.graph, type(part.module).__name__)
    _take_order(made, part.module)
    for name, value in part.module.__dict__.items():
        if not name.startswith("_"):
            made.__dict__.setdefault(name, value)
    return made.train(part.module.training)
