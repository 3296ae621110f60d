"""The torch.library namespace in which every op is defined, and when a call may pass it by."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.overrides import has_torch_function_variadic

library = torch.library.Library("gossamer", "DEF")

# Of an op that reads on the host, or keeps what it makes of a tensor: in graphs of CUDA calls,
# whose memory and tensors are copies, torch's compiler leaves a gap for it.
TAGS_NOT_CAPTURED = (
    torch.Tag.pt2_compliant_tag,
    *((torch.Tag.cudagraph_unsafe,) if hasattr(torch.Tag, "cudagraph_unsafe") else ()),
)

_keys_of = torch._C._dispatch_keys
_keys_of_thread = torch._C._dispatch_tls_local_include_set
_profiler_enabled = torch._C._autograd._profiler_enabled


def _keys(*names: str) -> torch._C.DispatchKeySet:
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.Undefined)
    for name in names:
        keys = keys.add(getattr(torch._C.DispatchKey, name))
    return keys


# As torch keeps them with nothing special going on: outside of inference_mode and in it.
_PLAIN_THREAD = (_keys("BackendSelect", "ADInplaceOrView"), _keys("BackendSelect"))
_PLAIN_TENSOR = {
    device: (
        _keys(device, "ADInplaceOrView", f"Autograd{device}", f"Autocast{device}"),
        _keys(device, f"Autocast{device}"),
    )
    for device in ("CPU", "CUDA")
}


def is_recorded() -> bool:
    """Whether a call becomes a part of a graph, which has to hold the op and not what it does."""
    return torch.compiler.is_compiling() or torch._C._is_tracing()


def calls_cpu_kernel(*tensors: Tensor | None) -> bool:
    """Whether below autograd the dispatcher would call an op's CPU kernel and do nothing else.

    A caller may then do so itself, which saves the 4 to 5 us of a dispatched call from Python to
    Python. False for whatever torch or a user has put in between: modes and subclasses, functorch,
    tracing, fake, conjugate or negated tensors, other devices, a running profiler.
    """
    return _calls_kernel(tensors, _PLAIN_TENSOR["CPU"])


def calls_cuda_kernel(*tensors: Tensor | None) -> bool:
    """The same of its CUDA kernel."""
    return _calls_kernel(tensors, _PLAIN_TENSOR["CUDA"])


def _calls_kernel(
    tensors: tuple[Tensor | None, ...], plain: tuple[torch._C.DispatchKeySet, ...]
) -> bool:
    if _keys_of_thread() not in _PLAIN_THREAD or _profiler_enabled():
        return False
    if has_torch_function_variadic(*tensors):  # has no key of its own
        return False
    for tensor in tensors:  # noqa: SIM110 - a generator would cost half a microsecond
        if tensor is not None and _keys_of(tensor) not in plain:
            return False
    return True
