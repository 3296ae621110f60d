"""What the ops do with their operands before a kernel sees them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

from .._library import is_recorded

_ACTIVATIONS = {"none": None, "relu": F.relu, "gelu": F.gelu, "silu": F.silu}


def activation_of(op: str, name: str) -> Callable[[Tensor], Tensor] | None:
    """The activation by its name, or None for "none"."""
    if name not in _ACTIVATIONS:
        raise ValueError(f"{op}: activation {name!r}, expected None, 'relu', 'gelu' or 'silu'")
    return _ACTIVATIONS[name]


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast, where it is on for the device of x, would compute in."""
    if not isinstance(x, Tensor):
        raise TypeError(f"expected a torch.Tensor, got {type(x).__name__}")
    if x.layout != torch.strided or x.is_nested:
        raise TypeError(f"expected a dense tensor, got {_kind(x)}")
    device = "cpu" if x.is_cpu else "cuda"
    if torch.is_autocast_enabled(device) and (x.is_cpu or x.is_cuda):
        return torch.get_autocast_dtype(device)
    return None


def without_autocast(t: Tensor) -> AbstractContextManager[Any]:
    """Autocast off on the device of t; "meta" has none."""
    return nullcontext() if t.is_meta else torch.autocast(t.device.type, enabled=False)


def autocast_to(t: Tensor, dtype: torch.dtype) -> Tensor:
    # Autocast leaves float64 and integers alone, as it does for torch's own ops.
    return t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t


def all_autocast_to(dtype: torch.dtype, *tensors: Tensor | None) -> list[Any]:
    return [None if t is None else autocast_to(t, dtype) for t in tensors]


def has_content(t: Tensor) -> bool:
    """Whether there are numbers in it, as there are none on "meta" and in a fake tensor."""
    return not (t.is_meta or isinstance(t, FakeTensor))


def gradient_wanted(*operands: Tensor | None) -> bool:
    """Whether a call has to go through an autograd.Function."""
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in operands)
    # Forward-mode derivatives exist without requires_grad; the Function refuses them aloud. Of
    # functorch the innermost transform alone answers, and one around it may differentiate.
    if wanted or forward_ad._current_level >= 0:
        return True
    return torch._C._are_functorch_transforms_active() and not _is_functionalized()


def is_transformed() -> bool:
    """Whether functorch or a forward derivative goes through what is computed here."""
    return bool(torch._C._are_functorch_transforms_active()) or forward_ad._current_level >= 0


def _is_functionalized() -> bool:
    """Whether torch.func.functionalize is at work, which knows ops and no Function."""
    functorch = torch._C._functorch
    levels = functorch.get_interpreter_stack() or ()
    return any(level.key() == functorch.TransformType.Functionalize for level in levels)


def saved_for(by: Tensor, t: Tensor) -> Tensor | None:
    """What a gradient with respect to ``by`` alone is made of, where that may be wanted.

    Within vmap nothing says whether it is: a transform, or autograd, around it may differentiate.
    """
    return t if by.requires_grad or torch._C._are_functorch_transforms_active() else None


def apply_function(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """``function.apply`` without what it does for functorch where none of that is active."""
    # Function.apply binds its arguments by name for functorch, which takes 16 us.
    plain = super(torch.autograd.Function, function).apply  # type: ignore[misc]

    def apply(*args: Any) -> Any:
        functorch = torch._C._are_functorch_transforms_active()
        return function.apply(*args) if functorch else plain(*args)

    return apply


def recorded_or_applied(
    op: Callable[..., Any], function: type[torch.autograd.Function]
) -> Callable[..., Any]:
    """The op where a graph records it, and else the Function that differentiates it.

    Functorch works on a Function, and not on one that the dispatcher calls.
    """
    apply = apply_function(function)

    def call(*args: Any) -> Any:
        return op(*args) if is_recorded() or _is_functionalized() else apply(*args)

    return call


def check_tensor(op: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: x is {type(x).__name__}, expected a torch.Tensor")
    if x.layout != torch.strided or x.is_nested:
        raise TypeError(f"{op}: x is {_kind(x)}, expected a dense one")


def _kind(x: Tensor) -> str:
    if x.is_nested:
        return "a nested tensor (its values() are dense)"
    return f"a tensor of layout {x.layout}"


def as_rows(x: Tensor, dims: int) -> Tensor:
    """x [..., K] as a matrix; a view where its strides allow."""
    return x if dims == 2 else x.unsqueeze(0) if dims == 1 else x.flatten(0, -2)


def row_major(t: Tensor) -> Tensor:
    """A matrix as kernels read it: any distance between rows, none between columns."""
    return t if t.stride(1) == 1 else t.contiguous()


def check_features(op: str, x: Tensor, dims: int, in_features: int) -> None:
    if dims == 0:
        raise ValueError(f"{op}: x is 0-d, it needs at least one dimension")
    if x.shape[-1] != in_features:
        raise ValueError(f"{op}: x has {x.shape[-1]} features, the weight expects {in_features}")


def check_bias(op: str, bias: Tensor | None, outputs: int) -> None:
    if bias is not None and bias.shape != (outputs,):
        raise ValueError(f"{op}: bias has shape {list(bias.shape)}, expected [{outputs}]")


def check_dtypes(op: str, weight: torch.dtype, **others: Tensor | None) -> None:
    for name, operand in others.items():
        if operand is not None and operand.dtype != weight:
            raise TypeError(f"{op}: {name} is {operand.dtype}, the weight {weight}")


def check_devices(op: str, x: Tensor, **others: Tensor | None) -> None:
    # One real operand among meta tensors would get a result of no content.
    for name, operand in others.items():
        if operand is not None and operand.device != x.device:
            raise ValueError(f"{op}: x is on {x.device}, {name} on {operand.device}")
