"""What keeps a layer dense when ``convert`` swaps the layers of a model."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from .._cuda_module import obstacle
from ..formats import VALUE_DTYPES, Unstructured
from ..nn.patterns import PatternName
from .kinds import ACTIVATION, dense_class, is_conv, is_sparse, replaced
from .selection import LayerSite

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_HOOK_TABLES = (
    "_forward_pre_hooks",
    "_forward_hooks",
    "_backward_pre_hooks",
    "_backward_hooks",
    "_state_dict_pre_hooks",
    "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


@dataclass(frozen=True)
class Obstacle:
    """Why a layer has to stay dense, and whether its weight may still be pruned in place."""

    reason: str
    prunable: bool


class Obstacles:
    """Looks once at who holds and shares what in a model, then judges its layers."""

    def __init__(self, model: nn.Module, pattern: PatternName = "2:4") -> None:
        self._pattern = pattern
        self._holders: dict[nn.Module, list[tuple[nn.Module, str]]] = defaultdict(list)
        self._spans: dict[str, tuple[int, int]] = {}
        for name, module in model.named_modules():
            for attribute, child in module._modules.items():
                if child is not None:
                    self._holders[child].append((module, attribute))
            for attribute, tensor in (*module._parameters.items(), *module._buffers.items()):
                if (span := _memory_span(tensor)) is not None:
                    self._spans[f"{name}.{attribute}" if name else attribute] = span

    def judge(self, site: LayerSite) -> Obstacle | None:
        """The first obstacle of a layer; those that forbid pruning come before the others."""
        layer = site.module
        reason = self.not_to_be_written(layer)
        if reason is not None:
            return Obstacle(reason, prunable=False)
        reason = self._read_directly(layer) or _would_be_lost(layer)
        if reason is None and self._pattern == ACTIVATION and is_conv(layer):
            reason = "zero activations are skipped by linear layers only"
        if reason is None and isinstance(self._pattern, Unstructured) and is_conv(layer):
            reason = "unstructured weights are run by linear layers only"
        reason = reason or _unsupported(layer)
        return None if reason is None else Obstacle(reason, prunable=True)

    def not_to_be_written(self, layer: nn.Module) -> str | None:
        """What is wrong with changing the weight of a layer in place."""
        return _foreign(layer) or self.not_its_own(layer)

    def not_its_own(self, layer: nn.Module) -> str | None:
        """The same of a layer whose class is known."""
        return _computed(layer) or _unreadable(layer) or self.tied(layer, "weight")

    def tied(self, layer: nn.Module, name: str) -> str | None:
        """Who else sees the memory of one of a layer's parameters."""
        tensor = layer._parameters[name]
        span = _memory_span(tensor)
        if tensor is None or span is None:
            return None
        if any(
            step == 0 and size > 1 for size, step in zip(tensor.shape, tensor.stride(), strict=True)
        ):
            return f"elements of its {name} share memory"
        begin, end = span
        sharers = [slot for slot, (b, e) in self._spans.items() if b < end and begin < e]
        return f"{name} is tied: {' = '.join(sharers)}" if len(sharers) > 1 else None

    def holders(self, layer: nn.Module) -> list[tuple[nn.Module, str]]:
        """Every module that holds a layer, and under which name."""
        return self._holders[layer]

    def _read_directly(self, layer: nn.Module) -> str | None:
        for holder, attribute in self._holders[layer]:
            if isinstance(holder, nn.MultiheadAttention) and attribute == "out_proj":
                return "MultiheadAttention reads out_proj.weight itself"
            # Its inference path hands both weights to one native function and calls neither layer.
            encoder = isinstance(holder, nn.TransformerEncoderLayer)
            if encoder and attribute in ("linear1", "linear2"):
                return f"TransformerEncoderLayer's fast path reads {attribute}.weight itself"
            # The name, since asking for the class would import the compiler.
            if type(holder).__name__ == "OptimizedModule":
                return "torch.compile() holds on to it; convert first, then compile"
        return None


def _memory_span(tensor: Tensor | None) -> tuple[int, int] | None:
    """First byte and end of a plain tensor's elements; None where there is no memory to share."""
    if tensor is None or type(tensor) not in (Tensor, nn.Parameter):
        return None
    if tensor.layout != torch.strided or tensor.device.type == "meta" or tensor.numel() == 0:
        return None
    steps = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    begin = tensor.data_ptr()
    return begin, begin + (steps + 1) * tensor.element_size()


def _foreign(layer: nn.Module) -> str | None:
    kind, dense = type(layer), dense_class(layer)
    if is_sparse(layer):
        return f"already a {kind.__name__}"
    if dense is None:
        expected = "Conv1d, Conv2d or Conv3d" if is_conv(layer) else "Linear"
        return f"{kind.__module__}.{kind.__name__} is not a torch.nn.{expected}"
    for method in ("forward", "_conv_forward"):
        if getattr(kind, method, None) is not getattr(dense, method, None):
            return f"{kind.__name__} overrides {method}"
        if replaced(layer, method):
            return f"{method} is replaced on this instance"
    return None


def _computed(layer: nn.Module) -> str | None:
    """Weights that are the result of something else, which a swap would cut off."""
    if parametrize.is_parametrized(layer):
        computed = layer.parametrizations
        assert isinstance(computed, nn.ModuleDict)
        return f"{' and '.join(computed)} parametrised (torch.nn.utils.parametrize)"
    missing = [name for name in ("weight", "bias") if name not in layer._parameters]
    if missing:
        hooks = ", ".join(type(hook).__name__ for hook in layer._forward_pre_hooks.values())
        return f"{' and '.join(missing)} computed before each call" + (f" ({hooks})" * bool(hooks))
    return None


def _unreadable(layer: nn.Module) -> str | None:
    weight = layer._parameters["weight"]
    if weight is None:
        return "has no weight"
    if isinstance(weight, UninitializedParameter):
        return "weight is not initialised yet"
    if type(weight) not in (Tensor, nn.Parameter):
        return f"weight is a {type(weight).__name__}, not a plain tensor"
    if weight.device.type == "meta":
        return "weight is on the meta device and has no values"
    if not weight.dtype.is_floating_point:
        return f"weight is {dtype_name(weight.dtype)}, not floating point"
    if weight.dtype not in VALUE_DTYPES:
        return f"weight is {dtype_name(weight.dtype)}, for which there is neither pruner nor kernel"
    if weight.numel() == 0:
        return f"weight is empty: {list(weight.shape)}"
    return None


def hooks_of(layer: nn.Module) -> list[str]:
    """The kinds of hooks on a layer, in words."""
    tables = [table for table in _HOOK_TABLES if layer.__dict__.get(table)]
    return [table.strip("_").replace("_", " ") for table in tables]


def _would_be_lost(layer: nn.Module) -> str | None:
    """What hangs on the layer and would not survive its replacement."""
    if hooks := hooks_of(layer):
        return f"has {' and '.join(hooks)}"
    more = {*layer._parameters, *layer._buffers, *layer._modules} - {"weight", "bias"}
    return f"holds more than weight and bias: {', '.join(sorted(more))}" if more else None


def _unsupported(layer: nn.Module) -> str | None:
    weight, bias = layer._parameters["weight"], layer._parameters["bias"]
    assert weight is not None
    if (reason := obstacle(weight.device)) is not None:
        return f"weight is on {weight.device}: {reason}"
    if weight.dtype not in KERNEL_DTYPES:
        return f"no fast kernel for {dtype_name(weight.dtype)}"
    if bias is not None and (bias.dtype, bias.device) != (weight.dtype, weight.device):
        return f"bias is {dtype_name(bias.dtype)} on {bias.device}, unlike the weight"
    return None


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
